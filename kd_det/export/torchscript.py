"""A model as TorchScript, compared with the eager one."""

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
    """Trace a model on an image, save it, and compare the saved file with the eager model.

    The traced function maps one image to a tuple of tensors. A detector takes images of any size; its boxes are in
    pixels of the image, its masks (R-CNN) are those of the boxes, (R, 1, m, m), as
    ``detectron2.layers.paste_masks_in_image`` takes them. A classifier takes images of the sample's size and gives its
    scores (K,).

    Returns:
        Names of the tensors, and the sizes at which the results were equal.

    Raises:
        InputError: If nothing is detected on the sample, or results differ.
    """
    inference = None
    if isinstance(model, GeneralizedRCNN):

        def inference(rcnn, inputs):
            return [{"instances": rcnn.inference(inputs, do_postprocess=False)[0]}]

    adapter = TracingAdapter(model, [{"image": sample}], inference).eval()
    results = adapter(sample)
    found = adapter.outputs_schema(results)[0]
    if isinstance(model, ImageClassifier):
        names, other, tolerance = list(found), sample.flip(2), 1e-5
    else:
        names, other, tolerance = _detected(found["instances"]), _resized(sample), 1e-3
    with warnings.catch_warnings():
        # About constants that the comparison below shows to be harmless.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        traced = torch.jit.trace(adapter, (sample,), check_trace=False)
    with open(path, "wb") as file:  # Given the path, torch would tell no reason where it cannot be written.
        torch.jit.save(traced, file)
    traced = torch.jit.load(path, map_location=sample.device)
    for image in (sample, other):
        _compare(adapter(image), traced(image), image.shape[-2:], tolerance)
    sizes = [tuple(image.shape[-2:]) for image in (sample, other)]
    return names, list(dict.fromkeys(sizes))


def _detected(found: Instances) -> list[str]:
    """Names of the tensors that instances consist of."""
    if not len(found):
        raise InputError(
            "student.ts: the student detects nothing on the sample, so a traced model cannot be compared with it; "
            "give an image with objects as --image, or leave TorchScript out with --no-torchscript."
        )
    return [*sorted(found.get_fields()), "image_size"]


def _resized(image: Tensor) -> Tensor:
    """An image at another size and shape."""
    height, width = image.shape[-2:]
    return F.interpolate(image[None], (round(0.77 * height), round(1.13 * width)), mode="bilinear")[0]


def _compare(expected: tuple[Tensor, ...], actual: tuple[Tensor, ...], size: tuple[int, int], tolerance: float) -> None:
    for own, other in zip(expected, actual, strict=True):
        if own.shape != other.shape or not torch.allclose(own.float(), other.float(), rtol=1e-4, atol=tolerance):
            raise InputError(
                f"student.ts: on an image of {size[0]} x {size[1]} the traced model gives other results than the eager "
                f"one (tensors of {list(other.shape)} and {list(own.shape)}). In a detector, boxes of equal scores, or "
                "that overlap by the very threshold of the non-maximum suppression, can cause it: try another --image, "
                "or leave TorchScript out with --no-torchscript."
            )
