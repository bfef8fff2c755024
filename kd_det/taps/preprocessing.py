"""Shares preprocessed images between models that preprocess them alike."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn


def preprocess_alike(one: nn.Module, other: nn.Module) -> bool:
    """Reports whether two models turn equal images into equal tensors; False if this cannot be determined."""
    methods = [getattr(type(model), "preprocess_image", None) for model in (one, other)]
    if methods[0] is None or methods[0] is not methods[1]:
        return False
    # A method from another package may depend on anything.
    if methods[0].__module__.partition(".")[0] not in ("detectron2", "kd_det"):
        return False
    return _statistics(one) == _statistics(other) and _padding(one) == _padding(other)


def _statistics(model: nn.Module) -> tuple[list[float], list[float]]:
    return model.pixel_mean.flatten().tolist(), model.pixel_std.flatten().tolist()


def _padding(model: nn.Module) -> tuple[int, dict[str, int]]:
    return model.backbone.size_divisibility, model.backbone.padding_constraints


@contextmanager
def shared_images(models: Sequence[nn.Module], batched_inputs: list[dict]) -> Iterator[None]:
    """Lets the first model preprocess a batch, and all models use the result.

    Args:
        models: Models that :func:`preprocess_alike`, on one device.
        batched_inputs: The batch that all of them are given.
    """
    images = models[0].preprocess_image(batched_inputs)
    for model in models:
        model.preprocess_image = lambda _: images
    try:
        yield
    finally:
        for model in models:
            del model.preprocess_image
