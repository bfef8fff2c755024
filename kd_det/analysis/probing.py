"""Reads features of a model, for whole images and for labelled boxes."""

from collections.abc import Callable, Collection

import torch
from detectron2.structures import BoxMode
from detectron2.utils.visualizer import GenericMask
from torch import Tensor, nn

from kd_det.analysis.run import Run
from kd_det.errors import InputError
from kd_det.taps import build_tap


def check_feature(run: Run, feature: str, others: Collection[str] = ("roi_features",)) -> int:
    """Checks that a model has a feature and returns the number of its channels.

    Args:
        run: The model.
        feature: Name of the feature.
        others: Features that are allowed in addition to maps.

    Raises:
        InputError: If the model lacks the feature.
    """
    known = {name: shape for name, shape in build_tap(run.model).spec().items() if shape.stride or name in others}
    if feature not in known:
        raise InputError(f"--feature: {feature!r} is no feature of {run.name!r}, which has {', '.join(known)}.")
    return known[feature].channels


def labelled_boxes(records: list[dict], batch: list[dict]) -> Tensor:
    """Returns the labelled boxes of a batch, without crowds, in pixels of its images.

    Args:
        records: Detectron2's dicts of the images.
        batch: The same images as the model gets them.

    Returns:
        (R, 5): image, x0, y0, x1, y1.
    """
    boxes = [torch.empty(0, 5)]
    for i, (record, image) in enumerate(zip(records, batch, strict=True)):
        height, width = image["image"].shape[-2:]
        scale = torch.tensor([width / image["width"], height / image["height"]]).repeat(2)
        for annotation in record["annotations"]:
            if annotation.get("iscrowd", 0):
                continue
            box = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
            boxes.append(torch.cat([torch.tensor([float(i)]), torch.tensor(box) * scale])[None])
    return torch.cat(boxes).float()


def object_mask(annotation: dict, height: int, width: int) -> Tensor | None:
    """Returns the mask of an object, (H, W), bool; None if it has none.

    Args:
        annotation: Detectron2's dict of the object, whose ``segmentation`` may be polygons or run lengths.
        height: Height of the image in pixels of its file.
        width: Its width.
    """
    segmentation = annotation.get("segmentation")
    return torch.from_numpy(GenericMask(segmentation, height, width).mask.astype(bool)) if segmentation else None


def feature_of_copies(model: nn.Module, feature: str, record: dict, sample: dict) -> Callable[[Tensor], Tensor]:
    """Makes a function that computes a feature for copies (n, 3, H, W) of an image.

    Args:
        record: Detectron2's dict of the image, whose boxes the features of boxes are computed for.
        sample: The same image as the model gets it.
    """
    tap = build_tap(model)

    def compute(images: Tensor) -> Tensor:
        batch = [sample | {"image": image} for image in images]
        boxes = labelled_boxes([record] * len(batch), batch) if feature.startswith("roi_") else torch.empty(0, 5)
        return tap.compute(batch, {feature}, {"roi_boxes": boxes.to(images.device)})[feature]

    return compute
