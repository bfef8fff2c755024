"""Loads the checkpoints that a run wrote, one after the other."""

import logging
import os
from collections.abc import Iterator

from torch import Tensor
from torch.nn.utils import parameters_to_vector

from kd_det.analysis.run import Run
from kd_det.checkpoint import load_strictly
from kd_det.checkpoint_files import read_header
from kd_det.checkpoint_folder import read_headers
from kd_det.export import find_run

logger = logging.getLogger(__name__)


def find_checkpoints(source: str) -> list[str]:
    """Returns the paths of a run's checkpoints in the order of training; skips those of other runs in its folder.

    Args:
        source: The output folder, or "CONFIG:WEIGHTS", which is a single checkpoint.
    """
    if not os.path.isdir(source):
        return [source.split(":", 1)[1]]
    last = find_run(source)[1]
    last_header = read_header(last)
    headers, reasons = read_headers(source)
    for damaged in reasons.values():
        logger.warning("%s; it is left out.", damaged)
    # The last checkpoint often exists twice, under its number and as model_final.pth.
    paths = {header.iteration: path for path, header in headers.items() if header.run == last_header.run}
    return [path for _, path in sorted((paths | {last_header.iteration: last}).items())]


def load_checkpoints(run: Run) -> Iterator[tuple[str, Tensor]]:
    """Loads each checkpoint of a run into its model, in the order of training.

    Yields:
        The path of the checkpoint, and the distance of its weights from those of the checkpoint before, divided by the
        norm of the first checkpoint's weights.
    """
    first: Tensor | None = None
    previous: Tensor | None = None
    for path in find_checkpoints(run.source):
        load_strictly(run.model, path, key=f"--run {run.name}")
        weights = parameters_to_vector(run.model.parameters()).double()
        first = weights if first is None else first
        previous = weights if previous is None else previous
        yield path, (weights - previous).norm() / first.norm()
        previous = weights
