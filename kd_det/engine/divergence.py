"""Explain a training that has diverged, and let ``--resume`` go on from before it did."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from detectron2.engine import TrainerBase
from detectron2.utils import comm

# Detectron2's assertions that only predictions which are not finite, or far too large, can breach.
NOT_FINITE = re.compile(r"infinite or NaN|Input boxes to \w+ are not valid")
NUMPY_FLOAT = re.compile(r"np\.float64\((.*?)\)")
# A loss is one of a training that diverges if it is so many times the median of so many before it.
LARGE, WINDOW = 3.0, 100
# Where the losses have grown before they were infinite, the weights were bad some iterations earlier.
MARGIN = 10


@contextmanager
def explaining_divergence(trainer: TrainerBase) -> Iterator[None]:
    """Turn what a diverged training meets into an error that says all there is to know, and what helps.

    Raises:
        FloatingPointError: With the losses, the iteration, and a remedy.
    """
    try:
        yield
    except (AssertionError, FloatingPointError) as error:
        if isinstance(error, AssertionError) and not NOT_FINITE.search(str(error)):
            raise
        if comm.is_main_process():
            sound = last_sound_iteration(recorded_losses(trainer), trainer.start_iter)
            trainer.checkpointer.retreat(sound, begun=trainer.start_iter == 0)
        raise FloatingPointError(f"{describe(error, trainer)}; {remedy(trainer)}") from error


def recorded_losses(trainer: TrainerBase) -> list[tuple[float, int]]:
    """Return the total loss of each iteration in this process, with its iteration; the main process alone has them."""
    histories = trainer.storage.histories()
    return histories["total_loss"].values() if "total_loss" in histories else []


def last_sound_iteration(losses: Sequence[tuple[float, int]], start: int) -> int:
    """Find the newest iteration whose weights are likely good: they gave a loss of the usual size in the one after it.

    What was there when this process began counts as good, unless its first loss was not finite.

    Args:
        losses: Total losses, all finite, with their iterations.
        start: The first iteration of this process.
    """
    sizes = [abs(loss) for loss, _ in losses]
    for i in range(len(sizes) - 1, 0, -1):
        if sizes[i] <= LARGE * np.median(sizes[max(i - WINDOW, 0) : i]):
            grown = i < len(sizes) - 1
            return max(losses[i][1] - 1 - MARGIN * grown, start - 1)
    return start - 1 if losses else start - 2


def describe(error: Exception, trainer: TrainerBase) -> str:
    """Put an error into one line, with the iteration and the losses known last if its message lacks them."""
    message = NUMPY_FLOAT.sub(r"\1", " ".join(str(error).split())).rstrip(".")
    if "iteration" in message:
        return message
    losses = recorded_losses(trainer)
    if not losses:
        return f"iteration {trainer.iter}: {message}"
    last = losses[-1][1]
    latest = trainer.storage.latest().items()
    values = ", ".join(f"{name} {value:.4g}" for name, (value, when) in latest if "loss" in name and when == last)
    return f"iteration {trainer.iter}: {message}; the losses of iteration {last} were {values}"


def remedy(trainer: TrainerBase) -> str:
    """Say what helps against divergence."""
    norm = " or add a norm to the FPN (MODEL.FPN.NORM)" if trainer.cfg.MODEL.FPN.IN_FEATURES else ""
    rate = f"lower {trainer.rate_key}, now {trainer.cfg.SOLVER.BASE_LR:g}"
    clip = "clip the gradients (SOLVER.CLIP_GRADIENTS.ENABLED)"
    return f"{rate}, {clip}{norm}" if norm else f"{rate}, or {clip}"
