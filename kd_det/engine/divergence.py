"""Explains why a training has diverged, and lets ``--resume`` continue from before the divergence."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from detectron2.engine import TrainerBase
from detectron2.utils import comm

from kd_det.errors import one_line

# Matches Detectron2's assertions that fail only for predictions that are not finite or far too large.
NOT_FINITE = re.compile(r"infinite or NaN|Input boxes to \w+ are not valid")
NUMPY_FLOAT = re.compile(r"np\.float64\((.*?)\)")
# A loss counts as diverging if it exceeds LARGE times the median of the WINDOW losses before it.
LARGE, WINDOW = 3.0, 100
# If the losses grew before they became infinite, the weights were already bad this many iterations earlier.
MARGIN = 10


@contextmanager
def explaining_divergence(trainer: TrainerBase) -> Iterator[None]:
    """Turns the error of a diverged training into one that gives the losses, the iteration and a remedy.

    Raises:
        FloatingPointError: If the training has diverged.
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
    """Returns pairs of total loss and iteration since this process began; only the main process has them."""
    histories = trainer.storage.histories()
    return histories["total_loss"].values() if "total_loss" in histories else []


def last_sound_iteration(losses: Sequence[tuple[float, int]], start: int) -> int:
    """Finds the newest iteration whose weights are probably good: the next iteration's loss was of the usual size.

    The weights that this process began with count as good, unless its first loss was not finite.

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
    """Puts an error on one line, and adds the iteration and the latest losses if its message lacks them."""
    message = NUMPY_FLOAT.sub(r"\1", one_line(str(error))).rstrip(".")
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
    """Names the settings that help against divergence."""
    norm = " or add a norm to the FPN (MODEL.FPN.NORM)" if trainer.cfg.MODEL.FPN.IN_FEATURES else ""
    rate = f"lower {trainer.rate_key}, now {trainer.cfg.SOLVER.BASE_LR:g}"
    clip = "clip the gradients (SOLVER.CLIP_GRADIENTS.ENABLED)"
    return f"{rate}, {clip}{norm}" if norm else f"{rate}, or {clip}"
