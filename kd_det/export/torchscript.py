"""Traces a model to TorchScript and compares the result with the eager model."""

import warnings

import torch
import torch.nn.functional as F
from detectron2.export import TracingAdapter
from detectron2.modeling import GeneralizedRCNN
from detectron2.structures import Instances
from torch import Tensor, nn

from kd_det.classification import ImageClassifier
from kd_det.errors import InputError


def trace(model: nn.Module, sample: Tensor, path: str) -> tuple[list[str], list[tuple[int, int]]]:
    """Traces a model on an image, saves it, and compares the saved file with the eager model.

    The traced function maps one image to a tuple of tensors. A detector takes images of any size. Its boxes are in
    pixels of the image; its masks (R-CNN), (R, 1, m, m), fill their boxes, in the form that
    ``detectron2.layers.paste_masks_in_image`` takes. A classifier takes images of the sample's size and returns its
    scores (K,).

    Args:
        model: The model, in evaluation mode.
        sample: Image (3, H, W) as the model expects it.
        path: The file to write.

    Returns:
        The names of the tensors, and the sizes at which the results were equal.

    Raises:
        InputError: If nothing is detected on the sample, or the results differ.
    """
    inference = _infer if isinstance(model, GeneralizedRCNN) else None
    adapter = TracingAdapter(model, [{"image": sample}], inference).eval()
    results = adapter(sample)  # The first call makes the schema.
    output = adapter.outputs_schema(results)[0]
    if isinstance(model, ImageClassifier):
        names, second, tolerance = list(output), sample.flip(2), 1e-5
    else:
        names, second, tolerance = _field_names(output["instances"]), _resize(sample), 1e-3
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


def _infer(model: GeneralizedRCNN, inputs: list[dict]) -> list[dict[str, Instances]]:
    """Runs an R-CNN and leaves its masks as they are, one for each box."""
    return [{"instances": model.inference(inputs, do_postprocess=False)[0]}]


def _field_names(instances: Instances) -> list[str]:
    """Returns the names of the tensors in instances."""
    if not len(instances):
        raise InputError(
            "student.ts: the student detects nothing on the sample, so a traced model cannot be compared with it; "
            "give an image with objects as --image, or leave TorchScript out with --no-torchscript."
        )
    return [*sorted(instances.get_fields()), "image_size"]


def _resize(image: Tensor) -> Tensor:
    """Resizes an image to another size and aspect ratio."""
    height, width = image.shape[-2:]
    return F.interpolate(image[None], (round(0.77 * height), round(1.13 * width)), mode="bilinear")[0]


def _compare(expected: tuple[Tensor, ...], actual: tuple[Tensor, ...], size: tuple[int, int], tolerance: float) -> None:
    for eager, traced in zip(expected, actual, strict=True):
        if eager.shape != traced.shape or not torch.allclose(eager.float(), traced.float(), rtol=1e-4, atol=tolerance):
            raise InputError(
                f"student.ts: on an image of {size[0]} x {size[1]} the traced model gives other results than the eager "
                f"one (tensors of {list(traced.shape)} and {list(eager.shape)}). In a detector, boxes with equal "
                "scores, or with an overlap right at the threshold of the non-maximum suppression, can cause this: try "
                "another --image, or leave TorchScript out with --no-torchscript."
            )
