"""Checks that the values of a training and of its images fit together."""

import importlib.util

from detectron2.config import CfgNode

from kd_det.config import has_peers, look_up, student_config
from kd_det.errors import InputError


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


def check_determinism(cfg: CfgNode) -> None:
    """Checks that a deterministic run does not choose algorithms by measuring their speed."""
    if cfg.KD.DETERMINISTIC and cfg.CUDNN_BENCHMARK:
        raise InputError(
            "CUDNN_BENCHMARK: must be False where KD.DETERMINISTIC is True, because it chooses algorithms by their "
            "speed, which differs from run to run; got True."
        )


def check_patience(cfg: CfgNode) -> None:
    """Checks that a run that may end early is evaluated while it trains, by a metric."""
    patience, metric, period = cfg.TEST.PATIENCE, cfg.TEST.BEST_METRIC, cfg.TEST.EVAL_PERIOD
    if patience and not (metric and period):
        raise InputError(
            f"TEST.PATIENCE: must be 0 without TEST.BEST_METRIC and TEST.EVAL_PERIOD, got {patience} with BEST_METRIC "
            f"{metric!r} and EVAL_PERIOD {period}."
        )


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
    architecture = (cfg if has_peers(cfg) else student_config(cfg)).MODEL.META_ARCHITECTURE
    if cfg.TEST.AUG.ENABLED and (
        architecture != "GeneralizedRCNN" or cfg.MODEL.KEYPOINT_ON or cfg.MODEL.LOAD_PROPOSALS
    ):
        raise InputError(
            f"TEST.AUG.ENABLED: must be False for {architecture}, or with keypoints or loaded proposals; Detectron2 "
            "augments the test images of GeneralizedRCNN only."
        )
    if cfg.TEST.AUG.ENABLED and not cfg.TEST.AUG.MIN_SIZES:
        raise InputError("TEST.AUG.MIN_SIZES: must name a size where TEST.AUG.ENABLED is True, got none.")
