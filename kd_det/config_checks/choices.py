"""Checks names in a config against the names that Detectron2 accepts there."""

from fnmatch import fnmatchcase
from typing import Any

from kd_det.config_kinds import first_match
from kd_det.errors import InputError, check_choice

NORMS = ("", "BN", "SyncBN", "FrozenBN", "GN", "LN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N")
# The choices that Detectron2 accepts.
CHOICES = {
    "SOLVER.LR_SCHEDULER_NAME": ("WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR"),
    "SOLVER.WARMUP_METHOD": ("linear", "constant"),
    "MODEL.TIMM.NORM": ("BN", "FrozenBN", "SyncBN"),
    "MODEL.*NORM": NORMS,
    "MODEL.FPN.FUSE_TYPE": ("sum", "avg"),
    "MODEL.*POOLER_TYPE": ("ROIAlignV2", "ROIAlign", "ROIPool"),
    "MODEL.*BBOX_REG_LOSS_TYPE": ("smooth_l1", "giou", "diou", "ciou"),
    "INPUT.RANDOM_FLIP": ("horizontal", "vertical", "none"),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": ("choice", "range"),
    "INPUT.MASK_FORMAT": ("polygon", "bitmask"),
    "INPUT.CROP.TYPE": ("relative_range", "relative", "absolute", "absolute_range"),
}
# Lists in which no name may be repeated.
UNIQUE = ("*IN_FEATURES", "*OUT_FEATURES", "*.SOURCES", "DATASETS.TRAIN", "DATASETS.TEST")


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
