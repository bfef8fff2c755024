"""The weight of a head over the iterations of a run."""

import math
from dataclasses import dataclass

from kd_det.errors import InputError

DECAYS = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class WeightSchedule:
    """Weight of a distillation head at an iteration.

    Zero before `start` and from `stop` on. Between them the weight grows linearly over `warmup` iterations, and then
    stays (constant) or falls to zero at `stop` along a line or half a cosine.

    Attributes:
        weight: The full weight.
        start: First iteration with a weight.
        warmup: Iterations w of the linear growth: `start + i` has (i + 1) / (w + 1) of the weight.
        stop: First iteration without a weight.
        decay: One of "constant", "linear", "cosine".
    """

    weight: float = 1.0
    start: int = 0
    warmup: int = 0
    stop: int | None = None
    decay: str = "constant"

    def __call__(self, iteration: int) -> float:
        if iteration < self.start or (self.stop is not None and iteration >= self.stop):
            return 0.0
        since = iteration - self.start
        if since < self.warmup:
            return self.weight * (since + 1) / (self.warmup + 1)
        if self.decay == "constant":
            return self.weight
        progress = (since - self.warmup) / (self.stop - self.start - self.warmup)
        left = 1.0 - progress if self.decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
        return self.weight * left


def build_schedule(node, max_iter: int, *, key: str) -> WeightSchedule:
    """Build the schedule of a head from its config node.

    Args:
        node: The head's node, with WEIGHT and SCHEDULE.
        max_iter: Length of the run in iterations: where SCHEDULE.STOP is -1, a decay ends here.
        key: Name of the node, for messages.

    Raises:
        InputError: If a value is out of range.
    """
    start, warmup, stop, decay = (node.SCHEDULE[k] for k in ("START", "WARMUP", "STOP", "DECAY"))
    if decay not in DECAYS:
        raise InputError(f"{key}.SCHEDULE.DECAY: got {decay!r}; allowed are {', '.join(DECAYS)}.")
    if start < 0 or warmup < 0:
        raise InputError(f"{key}.SCHEDULE: START and WARMUP must be 0 or more, got START {start}, WARMUP {warmup}.")
    if not math.isfinite(node.WEIGHT) or node.WEIGHT < 0:
        raise InputError(f"{key}.WEIGHT: must be finite and 0 or more, got {node.WEIGHT}.")
    end = max_iter if stop < 0 else stop
    if stop >= 0 and stop <= start + warmup:
        raise InputError(
            f"{key}.SCHEDULE.STOP: must lie after START + WARMUP = {start + warmup}, or be -1 for the end of the run; "
            f"got {stop}."
        )
    if decay != "constant" and end <= start + warmup:
        raise InputError(
            f"{key}.SCHEDULE: a {decay} decay needs iterations after START + WARMUP = {start + warmup}, "
            f"but the run ends at {end}."
        )
    return WeightSchedule(float(node.WEIGHT), start, warmup, None if stop < 0 and decay == "constant" else end, decay)
