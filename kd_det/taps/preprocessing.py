"""Shares preprocessed images between models that preprocess them alike."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, cast

from detectron2.modeling import Backbone
from torch import Tensor, nn


class ImageModel(Protocol):
    """Describes what the models of Detectron2 have in common that preprocess images for a backbone."""

    backbone: Backbone
    pixel_mean: Tensor
    pixel_std: Tensor
    preprocess_image: Callable[[list[dict]], Any]


def preprocess_alike(one: nn.Module, other: nn.Module) -> bool:
    """Reports whether two models turn equal images into equal tensors; False if this cannot be determined."""
    methods = [getattr(type(model), "preprocess_image", None) for model in (one, other)]
    if methods[0] is None or methods[0] is not methods[1]:
        return False
    # A method from another package may depend on anything.
    if methods[0].__module__.partition(".")[0] not in ("detectron2", "kd_det"):
        return False
    models = [cast(ImageModel, model) for model in (one, other)]
    paddings = [padding_of(model.backbone) for model in models]
    return _statistics(models[0]) == _statistics(models[1]) and paddings[0] == paddings[1]


def _statistics(model: ImageModel) -> tuple[list[float], list[float]]:
    return model.pixel_mean.flatten().tolist(), model.pixel_std.flatten().tolist()


def padding_of(backbone: nn.Module) -> tuple[int, int]:
    """Returns the number that the sides of a padded batch are multiples of, and the side of its square, or 0."""
    constraints = getattr(backbone, "padding_constraints", {})
    divisor = constraints.get("size_divisibility", getattr(backbone, "size_divisibility", 0))
    return max(divisor, 1), constraints.get("square_size", 0)


def padded_size(size: Sequence[int], padding: tuple[int, int]) -> tuple[int, int]:
    """Returns the height and width to which a batch is padded.

    Args:
        size: Largest height and largest width of its images.
        padding: What :func:`padding_of` returns.

    Example:
        >>> padded_size((50, 70), (32, 0)), padded_size((50, 70), (1, 96))
        ((64, 96), (96, 96))
    """
    divisor, square = padding
    height, width = (-(-(square or pixels) // divisor) * divisor for pixels in size)
    return height, width


@contextmanager
def shared_images(models: Sequence[nn.Module], batched_inputs: list[dict]) -> Iterator[None]:
    """Lets the first model preprocess a batch, and all models use the result.

    Args:
        models: Models that :func:`preprocess_alike`, on one device.
        batched_inputs: The batch that all of them are given.
    """
    sharing = [cast(ImageModel, model) for model in models]
    images = sharing[0].preprocess_image(batched_inputs)
    for model in sharing:
        model.preprocess_image = lambda _: images
    try:
        yield
    finally:
        for model in sharing:
            del model.preprocess_image
