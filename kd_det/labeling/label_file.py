"""Turns detections into a COCO file."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from detectron2.structures import BoxMode, Instances

from kd_det.files import write_whole

# Decimals of coordinates in pixels, and of scores.
PIXEL_DIGITS, SCORE_DIGITS = 2, 6


def describe_objects(instances: Instances) -> list[dict[str, Any]]:
    """Returns COCO annotations of detections, without their ids and that of the image.

    Masks are RLE. Objects that are smaller than a hundredth of a pixel, or whose mask is empty, are left out.

    Args:
        instances: The detections, with ``pred_masks`` (N, H, W) bool or without masks.
    """
    boxes = BoxMode.convert(instances.pred_boxes.tensor, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS).tolist()
    masks = instances.pred_masks.numpy() if instances.has("pred_masks") else None
    objects = []
    for i, box in enumerate(boxes):
        box = [round(value, PIXEL_DIGITS) for value in box]
        item: dict[str, Any] = {
            "category_id": int(instances.pred_classes[i]) + 1,
            "bbox": box,
            "area": round(box[2] * box[3], PIXEL_DIGITS),
            "iscrowd": 0,
            "score": min(round(float(instances.scores[i]), SCORE_DIGITS), 1.0),
        }
        if masks is not None:
            rle = mask_util.encode(np.asfortranarray(masks[i], dtype=np.uint8))
            rle["counts"] = rle["counts"].decode("ascii")
            item |= {"area": int(mask_util.area(rle)), "segmentation": rle}
        if item["area"] > 0:
            objects.append(item)
    return objects


def make_label_file(images: Iterable[dict[str, Any]], classes: Sequence[str], info: dict[str, Any]) -> dict[str, Any]:
    """Makes the content of a COCO file.

    Args:
        images: The name, width and height of each image, and its `annotations` as :func:`describe_objects` returns
            them.
        classes: Names of the classes; the first one has id 1.
        info: Origin of the labels.
    """
    data: dict[str, Any] = {"info": info, "images": [], "annotations": []}
    data["categories"] = [{"id": i, "name": name} for i, name in enumerate(classes, 1)]
    for number, image in enumerate(images, 1):
        data["images"].append({"id": number} | {key: image[key] for key in ("file_name", "width", "height")})
        for item in image["annotations"]:
            data["annotations"].append({"id": len(data["annotations"]) + 1, "image_id": number} | item)
    return data


def write_label_file(path: str, data: dict[str, Any]) -> None:
    """Writes a COCO file atomically.

    Raises:
        InputError: If it cannot be written.
    """
    write_whole(path, lambda file: file.write(json.dumps(data).encode("ascii")))
