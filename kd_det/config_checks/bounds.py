"""Checks numbers in a config against the range of their key."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kd_det.config_kinds import first_match, show
from kd_det.errors import InputError

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
    "MODEL.*DROPOUT": Bounds(0, 1, open_above=True),
    "MODEL.FULLY_CONNECTED.UNITS": CHANNELS,
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
    # Detectron2 cannot flip an image of one pixel.
    "INPUT.MAX_SIZE_TRAIN": Bounds(2),
    "INPUT.MAX_SIZE_TEST": COUNT,
    "INPUT.CLASSIFICATION.*": Bounds(0, PIXELS.most),
    "DATALOADER.NUM_WORKERS": Bounds(0, 1024),
    "DATALOADER.REPEAT_THRESHOLD": SHARE,
    "DATALOADER.RANDOM_SUBSET_RATIO": Bounds(0, 1, open_below=True),
    "DATASETS.TRAIN_SHARE": Bounds(0, 1, open_below=True),
    "DATASETS.TRAIN_SHARE_SEED": Bounds(),
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
    "KD.*.SCHEDULE.GRADIENT_SHARE": Bounds(0, 1, open_above=True),
    "KD.TEACHER*.SCALE": Bounds(0, 16, open_below=True),
    "KD.ATTENTION_TRANSFER.POWER": Bounds(1, 100),
    "KD.*.FACTOR_RATE": Bounds(0, 100, open_below=True),
    "*": Bounds(),
}


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
