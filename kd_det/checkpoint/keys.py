"""Compares the keys of checkpoints and models."""

from torch import nn


def is_counted(key: str) -> bool:
    """Returns whether a key is compared between checkpoint and model; leaves out num_batches_tracked of batch norms."""
    return not key.endswith("num_batches_tracked")


def counted_keys(model: nn.Module) -> set[str]:
    """Returns the keys of a model that a checkpoint is compared with."""
    return set(filter(is_counted, model.state_dict()))
