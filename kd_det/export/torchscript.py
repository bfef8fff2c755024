"""Traces a model to TorchScript and compares the result with the eager model."""

import warnings

import torch
from torch import Tensor, nn

from kd_det.classification import ImageClassifier
from kd_det.errors import InputError
from kd_det.export.adapter import make_adapter, resize


def trace(model: nn.Module, sample: Tensor, path: str) -> tuple[list[str], list[tuple[int, int]]]:
    """Traces a model on an image, saves it, and compares the saved file with the eager model.

    The traced function is that of :func:`make_adapter`. A detector takes images of any size, a classifier those of the
    sample's size.

    Args:
        model: The model, in evaluation mode.
        sample: Image (3, H, W) as the model expects it.
        path: The file to write.

    Returns:
        The names of the tensors, and the sizes at which the results were equal.

    Raises:
        InputError: If nothing is detected on the sample, or the results differ.
    """
    adapter, names = make_adapter(model, sample, "student.ts", "leave TorchScript out with --no-torchscript")
    if isinstance(model, ImageClassifier):
        second, tolerance = sample.flip(2), 1e-5
    else:
        second, tolerance = resize(sample, 0.77, 1.13), 1e-3
    with warnings.catch_warnings():
        # The tracer warns about constants, which the comparison below shows to be harmless.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        traced = torch.jit.trace(adapter, (sample,), check_trace=False)
    with open(path, "wb") as file:  # Given only the path, torch does not say why it cannot write a file.
        torch.jit.save(traced, file)
    traced = torch.jit.load(path, map_location=sample.device)
    sizes = []
    for image in (sample, second):
        height, width = image.shape[-2:]
        _compare(adapter(image), traced(image), (height, width), tolerance)
        sizes.append((height, width))
    return names, list(dict.fromkeys(sizes))


def _compare(expected: tuple[Tensor, ...], actual: tuple[Tensor, ...], size: tuple[int, int], tolerance: float) -> None:
    for eager, traced in zip(expected, actual, strict=True):
        if eager.shape != traced.shape or not torch.allclose(eager.float(), traced.float(), rtol=1e-4, atol=tolerance):
            raise InputError(
                f"student.ts: on an image of {size[0]} x {size[1]} the traced model gives other results than the eager "
                f"one (tensors of {list(traced.shape)} and {list(eager.shape)}). In a detector, boxes with equal "
                "scores, or with an overlap right at the threshold of the non-maximum suppression, can cause this: try "
                "another --image, or leave TorchScript out with --no-torchscript."
            )
