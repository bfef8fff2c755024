"""Logs scalars that are computed on the device only where they are written, since to read one the host has to wait."""

from collections.abc import Callable

import torch
from detectron2.utils.events import get_event_storage, has_event_storage
from torch import Tensor

# Detectron2's trainer writes the scalars of its storage every so many iterations.
WRITING_PERIOD = 20


@torch.compiler.disable
def log_scalar(name: str, compute: Callable[[], Tensor]) -> None:
    """Logs a scalar in the first iterations, and then in those after which Detectron2's trainer writes.

    Args:
        name: Name of the scalar.
        compute: Computes it.
    """
    if not has_event_storage():
        return
    storage = get_event_storage()
    if storage.iter < WRITING_PERIOD or (storage.iter + 1) % WRITING_PERIOD == 0:
        storage.put_scalar(name, compute())
