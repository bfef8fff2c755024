"""Turns a student into a function from one image to tensors, which can be traced, and makes images to try it on."""

import torch.nn.functional as F
from detectron2.export import TracingAdapter
from detectron2.modeling import GeneralizedRCNN
from detectron2.structures import Instances
from torch import Tensor, nn

from kd_det.classification import ImageClassifier
from kd_det.errors import InputError


def make_adapter(model: nn.Module, sample: Tensor, file: str, remedy: str) -> tuple[TracingAdapter, list[str]]:
    """Makes a function that maps one image (3, H, W) to a tuple of tensors.

    The boxes of a detector are in pixels of the image; its masks (R-CNN), (R, 1, m, m), fill their boxes, in the form
    that ``detectron2.layers.paste_masks_in_image`` takes. A classifier returns its scores (K,).

    Args:
        model: The model, in evaluation mode.
        sample: Image (3, H, W) as the model expects it.
        file: The file that is being written, for messages.
        remedy: How to do without this file, for messages.

    Returns:
        The function, and the names of its tensors: the fields of Detectron2's instances in alphabetical order with
        "image_size" at the end, or "scores" alone.

    Raises:
        InputError: If nothing is detected on the sample.
    """
    inference = _infer if isinstance(model, GeneralizedRCNN) else None
    adapter = TracingAdapter(model, [{"image": sample}], inference).eval()
    results = adapter(sample)  # The first call makes the schema.
    output = adapter.outputs_schema(results)[0]
    if isinstance(model, ImageClassifier):
        return adapter, list(output)
    if not len(output["instances"]):
        raise InputError(
            f"{file}: the student detects nothing on the sample, so a traced model cannot be compared with it; "
            f"give an image with objects as --image, or {remedy}."
        )
    return adapter, [*sorted(output["instances"].get_fields()), "image_size"]


def _infer(model: GeneralizedRCNN, inputs: list[dict]) -> list[dict[str, Instances]]:
    """Runs an R-CNN and leaves its masks as they are, one for each box."""
    return [{"instances": model.inference(inputs, do_postprocess=False)[0]}]


def resize(image: Tensor, height: float, width: float) -> Tensor:
    """Resizes an image (3, H, W) by two factors."""
    size = (round(height * image.shape[1]), round(width * image.shape[2]))
    return F.interpolate(image[None], size, mode="bilinear")[0]
