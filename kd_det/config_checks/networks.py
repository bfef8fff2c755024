"""Checks that the values of MODEL fit together."""

from detectron2.config import CfgNode
from PIL import ImageMode

from kd_det.config import look_up, student_config
from kd_det.config_kinds import has_lists
from kd_det.errors import InputError

# Formats that Detectron2 itself converts from RGB, in addition to Pillow's modes.
FORMATS = {"BGR": 3, "YUV-BT.601": 3}
# Maps each meta-architecture with anchors to the key that lists the feature maps it predicts from.
ANCHORED = {
    "GeneralizedRCNN": "MODEL.RPN.IN_FEATURES",
    "PanopticFPN": "MODEL.RPN.IN_FEATURES",
    "ProposalNetwork": "MODEL.RPN.IN_FEATURES",
    "RetinaNet": "MODEL.RETINANET.IN_FEATURES",
}


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
            if len(weights) != 4:
                raise InputError(f"{key}.BBOX_REG_WEIGHTS: must be four numbers, got {list(weights)}.")


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
