"""Checks config values that Detectron2 would reject late or never: bounds, names, and keys that must fit together.

All tables map :mod:`fnmatch` patterns of keys to the allowed values; the first pattern that matches applies.
"""

import importlib.util
import math
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from detectron2.config import CfgNode
from detectron2.modeling import (
    ANCHOR_GENERATOR_REGISTRY,
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_BOX_HEAD_REGISTRY,
    ROI_HEADS_REGISTRY,
    ROI_KEYPOINT_HEAD_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
    SEM_SEG_HEADS_REGISTRY,
)
from detectron2.modeling.proposal_generator.rpn import RPN_HEAD_REGISTRY
from detectron2.utils.registry import Registry
from PIL import ImageMode

from kd_det.config import default_config, look_up, student_config
from kd_det.config_kinds import first_match, has_lists, leaves, show
from kd_det.errors import InputError, check_choice
from kd_det.registry import KD_HEAD_REGISTRY, config_key

# ---- Bounds ----
# Default upper bound of whole numbers, which is also that of torch's sizes.
LARGEST = 2**31 - 1


@dataclass(frozen=True)
class Bounds:
    """Describes the range of finite numbers that a key may have.

    Attributes:
        least: Lower bound.
        most: Upper bound.
        open_below: Whether the lower bound itself is excluded.
        open_above: Whether the upper bound itself is excluded.
        infinite: Whether inf is allowed.
    """

    least: float = 0
    most: float = math.inf
    open_below: bool = False
    open_above: bool = False
    infinite: bool = False

    def refusal(self, value: float) -> str:
        """Returns what a value must be instead, for messages; "" if the value is allowed."""
        if not math.isfinite(value):
            return "" if self.infinite and value == math.inf else f"finite and {self._lower()}"
        finite = "finite and " if isinstance(value, float) else ""
        if value < self.least or (self.open_below and value == self.least):
            return finite + self._lower()
        most = LARGEST if self.most == math.inf and isinstance(value, int) else self.most
        if value > most or (self.open_above and value == most):
            return f"{'below' if self.open_above else 'at most'} {most}"
        return ""

    def _lower(self) -> str:
        return f"above {self.least}" if self.open_below else f"{self.least} or more"


ANY = Bounds(-LARGEST, LARGEST)
POSITIVE = Bounds(open_below=True)
SHARE = Bounds(most=1)
# A larger value can only be a typing error: a million classes, 65536 channels or images per step, images that OpenCV
# cannot hold. Models of such a size would fill the memory before any error is reported.
COUNT, CLASSES, CHANNELS, DEPTH, PIXELS = (Bounds(1, most) for most in (2**31 - 1, 10**6, 2**16, 1000, 2**15 - 1))
BOUNDS = {
    "VERSION": ANY,
    "GLOBAL.HACK": ANY,
    # Detectron2 draws a random seed if this is negative; numpy's seeds end at 2**32.
    "SEED": Bounds(-(2**31), 2**32 - 2**16),
    "*BASE_LR": POSITIVE,
    "*NUM_CLASSES": CLASSES,
    "*NUM_KEYPOINTS": CLASSES,
    "*_CHANNELS": CHANNELS,
    "MODEL.*_DIM": CHANNELS,
    "MODEL.*CONVS_DIM": CHANNELS,
    "MODEL.RPN.CONV_DIMS": Bounds(-1, CHANNELS.most),
    "MODEL.*CONV_DIMS": CHANNELS,
    "MODEL.*.NUM_CONV": Bounds(0, DEPTH.most),
    "MODEL.*.NUM_CONVS": Bounds(0, DEPTH.most),
    "MODEL.*.NUM_FC": Bounds(0, DEPTH.most),
    "MODEL.RESNETS.*": CHANNELS,
    # Below 1, Detectron2's networks freeze nothing.
    "MODEL.BACKBONE.FREEZE_AT": Bounds(-1, DEPTH.most),
    "MODEL.PIXEL_MEAN": ANY,
    "MODEL.PIXEL_STD": POSITIVE,
    "MODEL.*.IOU_LABELS": Bounds(-1, 1),
    "MODEL.*.IOU_THRESHOLDS": SHARE,
    "MODEL.*.IOUS": SHARE,
    "MODEL.*POSITIVE_FRACTION": SHARE,
    "MODEL.*.PRIOR_PROB": Bounds(0, 1, open_below=True, open_above=True),
    "MODEL.*SCORE_THRESH*": Bounds(-1),
    "MODEL.RPN.BOUNDARY_THRESH": Bounds(-1),
    "MODEL.SEM_SEG_HEAD.IGNORE_VALUE": ANY,
    "MODEL.SEM_SEG_HEAD.COMMON_STRIDE": COUNT,
    "MODEL.ANCHOR_GENERATOR.ANGLES": ANY,
    "MODEL.ANCHOR_GENERATOR.OFFSET": Bounds(0, 1, open_above=True),
    "MODEL.ANCHOR_GENERATOR.*": Bounds(0, PIXELS.most, open_below=True),
    "MODEL.*POOLER_RESOLUTION": Bounds(1, 1024),
    # Below 1, torchvision chooses the number of samples itself.
    "MODEL.*POOLER_SAMPLING_RATIO": Bounds(-1, 1024),
    "MODEL.*BATCH_SIZE_PER_IMAGE": COUNT,
    "MODEL.*BBOX_REG_WEIGHTS": POSITIVE,
    "INPUT.MIN_SIZE_*": Bounds(0, PIXELS.most),
    "INPUT.MAX_SIZE_*": COUNT,
    "INPUT.CLASSIFICATION.*": Bounds(0, PIXELS.most),
    "DATALOADER.NUM_WORKERS": Bounds(0, 1024),
    "DATALOADER.REPEAT_THRESHOLD": SHARE,
    "DATALOADER.RANDOM_SUBSET_RATIO": Bounds(0, 1, open_below=True),
    "SOLVER.IMS_PER_BATCH": Bounds(1, 2**16),
    "SOLVER.MAX_ITER": COUNT,
    "SOLVER.CHECKPOINT_PERIOD": COUNT,
    "SOLVER.NUM_DECAYS": COUNT,
    # This is checked where the number of images per process is known.
    "SOLVER.ACCUMULATE": ANY,
    "SOLVER.MOMENTUM": SHARE,
    "SOLVER.GAMMA": Bounds(0, 1000),
    "SOLVER.WEIGHT_DECAY*": Bounds(0, 1000),
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": POSITIVE,
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": Bounds(open_below=True, infinite=True),
    # A negative number keeps all detections.
    "TEST.DETECTIONS_PER_IMAGE": Bounds(-1),
    "TEST.AUG.MIN_SIZES": PIXELS,
    "TEST.AUG.MAX_SIZE": COUNT,
    "TEST.PRECISE_BN.NUM_ITER": COUNT,
    "KD.*.SCHEDULE.STOP": Bounds(-1),
    "KD.ATTENTION_TRANSFER.POWER": Bounds(1, 100),
    "KD.*.FACTOR_RATE": Bounds(0, 100, open_below=True),
    "*": Bounds(),
}
# ---- Names ----
NORMS = ("", "BN", "SyncBN", "FrozenBN", "GN", "LN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N")
# The choices that Detectron2 accepts.
CHOICES = {
    "SOLVER.LR_SCHEDULER_NAME": ("WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR"),
    "SOLVER.WARMUP_METHOD": ("linear", "constant"),
    "MODEL.TIMM.NORM": ("BN", "FrozenBN", "SyncBN"),
    "MODEL.*NORM": NORMS,
    "MODEL.FPN.FUSE_TYPE": ("sum", "avg"),
    "MODEL.*POOLER_TYPE": ("ROIAlignV2", "ROIAlign", "ROIPool", "ROIAlignRotated"),
    "MODEL.*BBOX_REG_LOSS_TYPE": ("smooth_l1", "giou", "diou", "ciou"),
    "INPUT.RANDOM_FLIP": ("horizontal", "vertical", "none"),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": ("choice", "range"),
    "INPUT.MASK_FORMAT": ("polygon", "bitmask"),
    "INPUT.CROP.TYPE": ("relative_range", "relative", "absolute", "absolute_range"),
}
# Formats that Detectron2 itself converts from RGB, in addition to Pillow's modes.
FORMATS = {"BGR": 3, "YUV-BT.601": 3}
# Lists in which no name may be repeated.
UNIQUE = ("*IN_FEATURES", "*OUT_FEATURES", "*.SOURCES", "DATASETS.TRAIN", "DATASETS.TEST")

# ---- Registered parts ----
RPN = {"MODEL.RPN.HEAD_NAME": RPN_HEAD_REGISTRY, "MODEL.ANCHOR_GENERATOR.NAME": ANCHOR_GENERATOR_REGISTRY}
PROPOSALS = {"MODEL.PROPOSAL_GENERATOR.NAME": PROPOSAL_GENERATOR_REGISTRY}
ROI_HEADS = {"MODEL.ROI_HEADS.NAME": ROI_HEADS_REGISTRY}
SEM_SEG = {"MODEL.SEM_SEG_HEAD.NAME": SEM_SEG_HEADS_REGISTRY}
# Maps each of Detectron2's meta-architectures to its keys that name registered classes; others may not use these keys.
PARTS = {
    "GeneralizedRCNN": PROPOSALS | ROI_HEADS,
    "PanopticFPN": PROPOSALS | ROI_HEADS | SEM_SEG,
    "ProposalNetwork": PROPOSALS,
    "SemanticSegmentor": SEM_SEG,
    "RetinaNet": {"MODEL.ANCHOR_GENERATOR.NAME": ANCHOR_GENERATOR_REGISTRY},
}
# Maps each meta-architecture with anchors to the key that lists the feature maps it predicts from.
ANCHORED = {
    "GeneralizedRCNN": "MODEL.RPN.IN_FEATURES",
    "PanopticFPN": "MODEL.RPN.IN_FEATURES",
    "ProposalNetwork": "MODEL.RPN.IN_FEATURES",
    "RetinaNet": "MODEL.RETINANET.IN_FEATURES",
}


# ---- Values ----
def check_run_values(cfg: CfgNode) -> None:
    """Checks for values that Detectron2 would reject late, without naming the key, or misinterpret.

    Args:
        cfg: A config of the right kinds; see :mod:`kd_det.config_kinds`.

    Raises:
        InputError: If a value is not allowed; names the key, its value and what is allowed.
    """
    check_each(cfg)
    check_solver(cfg)
    check_network(cfg)
    check_augmentation(cfg)
    check_tta(cfg)


def check_network_values(cfg: CfgNode, source: str) -> None:
    """Checks only those values of a config that describe a network and its images; see :func:`check_run_values`.

    Args:
        source: Origin of the config, for messages.

    Raises:
        InputError: If a value is not allowed, or names a class that is not registered.
    """
    check_parts(cfg, source)
    try:
        check_each(cfg, sections=("MODEL.", "INPUT."))
        check_network(cfg)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error


def check_each(cfg: CfgNode, *, sections: tuple[str, ...] = ("",)) -> None:
    """Checks each value on its own, for the keys that begin with one of the sections."""
    defaults = default_config()
    # A head that is defined outside this package checks its own values.
    foreign = tuple(f"KD.{config_key(name)}." for name, head in KD_HEAD_REGISTRY if not is_own(head))
    for key, value, _ in leaves(cfg, defaults):
        if key.startswith(sections) and not key.startswith(foreign):
            check_bounds(key, value)
            check_listed_choice(key, value)
            check_unique(key, value)
    if cfg.VERSION != defaults.VERSION:
        raise InputError(f"VERSION: must be {defaults.VERSION}, got {cfg.VERSION}.")


def is_own(head: type) -> bool:
    """Returns whether a head is defined in this package."""
    return head.__module__.split(".")[0] == __package__


def check_bounds(key: str, value: Any) -> None:
    """Checks a number, or all numbers in a list, against ``BOUNDS``."""
    for number in numbers(value):
        refusal = first_match(BOUNDS, key).refusal(number)
        if refusal:
            raise InputError(f"{key}: must be {refusal}, got {show(value)}.")


def numbers(value: Any) -> Iterator[float]:
    """Yields all numbers of a value, which may be a list of lists."""
    if isinstance(value, list | tuple):
        for item in value:
            yield from numbers(item)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def check_listed_choice(key: str, value: Any) -> None:
    """Checks a name against ``CHOICES``."""
    allowed = first_match(CHOICES, key)
    if allowed:
        check_choice(key, value, allowed)


def check_unique(key: str, value: Any) -> None:
    """Checks that a list of names has no duplicates."""
    if not any(fnmatchcase(key, pattern) for pattern in UNIQUE):
        return
    twice = next((name for i, name in enumerate(value) if name in value[:i]), None)
    if twice is not None:
        raise InputError(f"{key}: {twice!r} is named twice, got {list(value)}; a name may stand there once.")


def check_solver(cfg: CfgNode) -> None:
    """Checks that the values of SOLVER and KD.PRETRAIN fit together."""
    node = cfg.SOLVER
    for key in ("SOLVER.STEPS", "KD.PRETRAIN.STEPS"):
        steps = list(look_up(cfg, key))
        if steps != sorted(steps):
            raise InputError(f"{key}: must be in increasing order, got {steps}.")
    if node.CLIP_GRADIENTS.ENABLED and node.CLIP_GRADIENTS.CLIP_TYPE not in ("value", "norm"):
        raise InputError(
            f"SOLVER.CLIP_GRADIENTS.CLIP_TYPE: {node.CLIP_GRADIENTS.CLIP_TYPE!r} is not one of value, norm."
        )
    if node.NESTEROV and not node.MOMENTUM:
        raise InputError("SOLVER.MOMENTUM: must be above 0 where SOLVER.NESTEROV is True, got 0.")
    if node.LR_SCHEDULER_NAME == "WarmupCosineLR" and node.BASE_LR_END > node.BASE_LR:
        raise InputError(f"SOLVER.BASE_LR_END: must be at most SOLVER.BASE_LR, {node.BASE_LR}, got {node.BASE_LR_END}.")
    if node.LR_SCHEDULER_NAME == "WarmupStepWithFixedGammaLR":
        if not node.GAMMA:
            raise InputError("SOLVER.GAMMA: must be above 0 for SOLVER.LR_SCHEDULER_NAME WarmupStepWithFixedGammaLR.")
        if node.WARMUP_ITERS >= node.MAX_ITER:
            raise InputError(
                f"SOLVER.WARMUP_ITERS: must be below SOLVER.MAX_ITER, {node.MAX_ITER}, for SOLVER.LR_SCHEDULER_NAME "
                f"WarmupStepWithFixedGammaLR, got {node.WARMUP_ITERS}."
            )
    if node.REFERENCE_WORLD_SIZE and node.IMS_PER_BATCH % node.REFERENCE_WORLD_SIZE:
        raise InputError(
            f"SOLVER.REFERENCE_WORLD_SIZE: must divide SOLVER.IMS_PER_BATCH, {node.IMS_PER_BATCH}, got "
            f"{node.REFERENCE_WORLD_SIZE}."
        )


def check_network(cfg: CfgNode) -> None:
    """Checks that the values of MODEL fit together and suit the channels of the images."""
    channels = image_channels(cfg.INPUT.FORMAT)
    if not channels:
        names = ", ".join([*FORMATS, "RGB", "L"])
        raise InputError(f"INPUT.FORMAT: {cfg.INPUT.FORMAT!r} is neither one of {names}, nor another mode of Pillow.")
    mean, std = list(cfg.MODEL.PIXEL_MEAN), list(cfg.MODEL.PIXEL_STD)
    # A grey image is repeated for each of several means.
    if len(mean) != len(std) or not mean or (channels > 1 and len(mean) != channels):
        raise InputError(
            f"MODEL.PIXEL_MEAN, MODEL.PIXEL_STD: must have one number for each of the {channels} channel(s) of "
            f"INPUT.FORMAT {cfg.INPUT.FORMAT}, got {mean} and {std}."
        )
    check_box_weights(cfg)
    check_anchors(cfg)
    check_overlaps(cfg)


def check_augmentation(cfg: CfgNode) -> None:
    """Checks the sizes to which training images are resized and cropped."""
    node, crop = cfg.INPUT, cfg.INPUT.CROP
    sizes = list(node.MIN_SIZE_TRAIN)
    if not sizes or (node.MIN_SIZE_TRAIN_SAMPLING == "range" and (len(sizes) != 2 or sizes[0] > sizes[1])):
        raise InputError(f"INPUT.MIN_SIZE_TRAIN: must be sizes, for a range the least and the greatest, got {sizes}.")
    if not crop.ENABLED:
        return
    relative = crop.TYPE.startswith("relative")
    if len(crop.SIZE) != 2 or not all((0 < x <= 1) if relative else (x >= 1 and x == int(x)) for x in crop.SIZE):
        allowed = "shares above 0 and at most 1" if relative else "whole numbers of pixels"
        raise InputError(f"INPUT.CROP.SIZE: must be two {allowed} for INPUT.CROP.TYPE {crop.TYPE}, got {crop.SIZE}.")
    if crop.TYPE == "absolute_range" and crop.SIZE[0] > crop.SIZE[1]:
        raise InputError(f"INPUT.CROP.SIZE: must be the least and the greatest, got {crop.SIZE}.")
    if cfg.MODEL.MASK_ON and node.MASK_FORMAT == "polygon" and not importlib.util.find_spec("shapely"):
        raise InputError(
            "INPUT.CROP.ENABLED: cropping polygons needs the package shapely (pip install shapely); without it set "
            "INPUT.MASK_FORMAT to bitmask, or INPUT.CROP.ENABLED to False."
        )


def check_tta(cfg: CfgNode) -> None:
    """Checks that Detectron2 supports test-time augmentation of this model, if it is enabled."""
    architecture = student_config(cfg).MODEL.META_ARCHITECTURE
    if cfg.MODEL.META_ARCHITECTURE == "MutualStudents":
        architecture = cfg.MODEL.META_ARCHITECTURE
    if cfg.TEST.AUG.ENABLED and (
        architecture != "GeneralizedRCNN" or cfg.MODEL.KEYPOINT_ON or cfg.MODEL.LOAD_PROPOSALS
    ):
        raise InputError(
            f"TEST.AUG.ENABLED: must be False for {architecture}, or with keypoints or loaded proposals; Detectron2 "
            "augments the test images of GeneralizedRCNN only."
        )
    if cfg.TEST.AUG.ENABLED and not cfg.TEST.AUG.MIN_SIZES:
        raise InputError("TEST.AUG.MIN_SIZES: must name a size where TEST.AUG.ENABLED is True, got none.")


def image_channels(image_format: str) -> int:
    """Returns the number of channels of a format of Detectron2 or Pillow; 0 if there is no such format."""
    try:
        return FORMATS.get(image_format) or len(ImageMode.getmode(image_format).bands)
    except KeyError:
        return 0


def check_box_weights(cfg: CfgNode) -> None:
    """Checks the lengths of BBOX_REG_WEIGHTS, which Detectron2 takes for granted."""
    node = cfg.MODEL
    weights_of = {f"MODEL.{key}": [node[key].BBOX_REG_WEIGHTS] for key in ("RPN", "ROI_BOX_HEAD", "RETINANET")}
    weights_of["MODEL.ROI_BOX_CASCADE_HEAD"] = node.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS
    for key, lists in weights_of.items():
        for weights in lists:
            if len(weights) not in (4, 5):
                raise InputError(
                    f"{key}.BBOX_REG_WEIGHTS: must be four numbers, of rotated boxes five, got {list(weights)}."
                )


def check_anchors(cfg: CfgNode) -> None:
    """Checks that every feature map that the model predicts from has anchors."""
    key = ANCHORED.get(student_config(cfg).MODEL.META_ARCHITECTURE)
    if key is None:
        return
    levels = look_up(cfg, key)
    for name in ("SIZES", "ASPECT_RATIOS"):
        lists = cfg.MODEL.ANCHOR_GENERATOR[name]
        if not lists or (has_lists(lists) and not (all(lists) and len(lists) in (1, len(levels)))):
            raise InputError(
                f"MODEL.ANCHOR_GENERATOR.{name}: must have one list, or one for each of the {len(levels)} features of "
                f"{key}, got {lists}."
            )


def check_overlaps(cfg: CfgNode) -> None:
    """Checks the overlap thresholds that make anchors and proposals objects or background."""
    for name in ("RPN", "ROI_HEADS", "RETINANET"):
        thresholds, labels = list(cfg.MODEL[name].IOU_THRESHOLDS), list(cfg.MODEL[name].IOU_LABELS)
        increasing = thresholds and all(thresholds) and thresholds == sorted(thresholds)
        if not increasing or len(labels) != len(thresholds) + 1:
            raise InputError(
                f"MODEL.{name}.IOU_THRESHOLDS, MODEL.{name}.IOU_LABELS: must be overlaps above 0 in increasing order "
                f"and one label more, got {thresholds} and {labels}."
            )


def check_parts(cfg: CfgNode, source: str) -> None:
    """Checks that every class and function that the config names for its model is registered.

    Args:
        source: Origin of the config, for messages.

    Raises:
        InputError: If one is not.
    """
    for key, (registry, name) in registered_parts(cfg).items():
        if name not in registry:
            known = ", ".join(sorted(known for known, _ in registry))
            raise InputError(
                f"{source}: {key} is {name!r}, which nothing registers (--plugin FILE imports what does); there are "
                f"{known}."
            )


def registered_parts(cfg: CfgNode) -> dict[str, tuple[Registry, str]]:
    """Maps the keys that name a registered part of the model to the registry and the name of the part."""
    node = cfg.MODEL
    parts = {"MODEL.META_ARCHITECTURE": META_ARCH_REGISTRY, "MODEL.BACKBONE.NAME": BACKBONE_REGISTRY}
    parts |= PARTS.get(student_config(cfg).MODEL.META_ARCHITECTURE, {})
    if node.PROPOSAL_GENERATOR.NAME == "PrecomputedProposals":
        parts.pop("MODEL.PROPOSAL_GENERATOR.NAME", None)
    elif "MODEL.PROPOSAL_GENERATOR.NAME" in parts and node.PROPOSAL_GENERATOR.NAME in ("RPN", "RRPN"):
        parts |= RPN
    if "MODEL.ROI_HEADS.NAME" in parts:
        if node.ROI_BOX_HEAD.NAME:
            parts["MODEL.ROI_BOX_HEAD.NAME"] = ROI_BOX_HEAD_REGISTRY
        if node.MASK_ON:
            parts["MODEL.ROI_MASK_HEAD.NAME"] = ROI_MASK_HEAD_REGISTRY
        if node.KEYPOINT_ON:
            parts["MODEL.ROI_KEYPOINT_HEAD.NAME"] = ROI_KEYPOINT_HEAD_REGISTRY
    return {key: (registry, look_up(cfg, key)) for key, registry in parts.items()}
