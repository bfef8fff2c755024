"""Computes the weight of a head over the iterations of a run."""

import math
from dataclasses import dataclass

from kd_det.errors import InputError

DECAYS = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class WeightSchedule:
    """Maps an iteration to the weight of a distillation head.

    The weight is zero before `start` and from `stop` on. In between it grows linearly over `warmup` iterations, and
    then stays constant or falls to zero at `stop`, linearly or along half a cosine.

    Attributes:
        weight: The full weight.
        start: First iteration with a weight.
        warmup: Number w of iterations of linear growth: iteration `start + i` has (i + 1) / (w + 1) of the weight.
        stop: First iteration without a weight; None if there is none.
        decay: One of "constant", "linear", "cosine".

    Example:
        >>> schedule = WeightSchedule(weight=8.0, warmup=3, stop=7, decay="linear")
        >>> [schedule(iteration) for iteration in range(8)]
        [2.0, 4.0, 6.0, 8.0, 6.0, 4.0, 2.0, 0.0]
    """

    weight: float = 1.0
    start: int = 0
    warmup: int = 0
    stop: int | None = None
    decay: str = "constant"

    def __call__(self, iteration: int) -> float:
        stop = math.inf if self.stop is None else self.stop
        if not self.start <= iteration < stop:
            return 0.0
        since = iteration - self.start
        if since < self.warmup:
            return self.weight * (since + 1) / (self.warmup + 1)
        if self.decay == "constant":
            return self.weight
        progress = (since - self.warmup) / (stop - self.start - self.warmup)
        share = 1.0 - progress if self.decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
        return self.weight * share


def adapted_weight(weight: float, share: float, *, target: float, tolerance: float) -> float:
    """Computes the weight that brings a head's share of the gradient back into its band.

    RT-DETRv4 (https://github.com/RT-DETRs/RT-DETRv4): a share g within ``target +- tolerance`` leaves the weight as it
    is. Otherwise the weight is multiplied by ``q (1 - g) / (g (1 - q))``, at least 0.1 and at most 10, where q is the
    far edge of the band: target + tolerance from below, target - tolerance from above. As share / (1 - share) is
    proportional to the weight, the next share is q.

    Args:
        weight: The current weight.
        share: The measured share of the gradient, above 0 and at most 1.
        target: The share to hold.
        tolerance: Half the width of the band.

    Raises:
        InputError: If the band does not lie between 0 and 1.

    Example:
        >>> adapted_weight(1.0, 0.2, target=0.5, tolerance=0.0)
        4.0
    """
    if not 0 <= target - tolerance <= target + tolerance < 1:
        raise InputError(
            f"adapted_weight: target - tolerance must be 0 or more and target + tolerance below 1, "
            f"got target {target}, tolerance {tolerance}."
        )
    if target - tolerance <= share <= target + tolerance:
        return weight
    goal = target + tolerance if share < target else target - tolerance
    return weight * min(max(goal * (1 - share) / (share * (1 - goal)), 0.1), 10.0)


def build_schedule(node, max_iter: int, *, key: str) -> WeightSchedule:
    """Builds the schedule of a head from its config node.

    Args:
        node: The head's node, with WEIGHT and SCHEDULE.
        max_iter: Length of the run in iterations; a decay ends here if SCHEDULE.STOP is -1.
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
