"""Writes instance masks as COCO JSON and as Pascal VOC XML."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import cv2
import numpy as np
from pycocotools import mask as mask_util


def mask_to_polygons(mask: np.ndarray) -> list[list[float]]:
    """Traces the outer borders of a mask exactly enough for pycocotools to draw the same pixels again.

    A contour of OpenCV runs through the centres of the border pixels and loses half a pixel on every side; on a mask
    that is enlarged four times, it loses only an eighth of a pixel. Holes are filled, since a COCO polygon has none.

    Args:
        mask: (H, W) bool with at least one pixel.

    Returns:
        A polygon (x, y, x, y, ...) for each connected region.
    """
    mask = mask.astype(np.uint8)
    x, y, width, height = cv2.boundingRect(mask)
    large = cv2.resize(mask[y : y + height, x : x + width], None, fx=4, fy=4, interpolation=cv2.INTER_NEAREST)
    contours, _ = cv2.findContours(large, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE, offset=(4 * x, 4 * y))
    return [((contour.ravel() + 0.5) / 4).tolist() for contour in contours]


def coco_annotation(mask: np.ndarray, **fields: Any) -> dict[str, Any]:
    """Makes a COCO annotation whose polygons, tight box and area agree with each other.

    Args:
        mask: (H, W) bool with at least one pixel.
        fields: The other fields: `id`, `image_id` and `category_id`.
    """
    polygons = mask_to_polygons(mask)
    rle = mask_util.merge(mask_util.frPyObjects(polygons, *mask.shape))
    box = [int(value) for value in mask_util.toBbox(rle)]
    return {**fields, "bbox": box, "area": int(mask_util.area(rle)), "iscrowd": 0, "segmentation": polygons}


def write_coco(path: Path, images: list[dict], annotations: list[dict], class_names: Iterable[str]) -> None:
    """Writes a COCO annotation file atomically; the first class has id 1."""
    categories = [{"id": i, "name": name} for i, name in enumerate(class_names, 1)]
    data = {"images": images, "annotations": annotations, "categories": categories}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(data), encoding="utf-8")
    os.replace(partial, path)


def write_voc(path: Path, image: dict[str, Any], objects: Iterable[tuple[str, list[int]]]) -> None:
    """Writes the VOC annotation of one image.

    Args:
        path: The XML file.
        image: The image's entry in the COCO file.
        objects: Class name and COCO box (x, y, width, height) of each object.
    """
    root = ElementTree.Element("annotation")

    def add(parent: ElementTree.Element, **children: Any) -> None:
        for tag, value in children.items():
            ElementTree.SubElement(parent, tag).text = str(value)

    add(root, filename=image["file_name"])
    add(ElementTree.SubElement(root, "size"), width=image["width"], height=image["height"], depth=3)
    add(root, segmented=0)
    for name, (x, y, width, height) in objects:
        thing = ElementTree.SubElement(root, "object")
        add(thing, name=name, pose="Unspecified", truncated=0, difficult=0)
        # VOC counts pixels from 1, and the last one belongs to the box.
        add(ElementTree.SubElement(thing, "bndbox"), xmin=x + 1, ymin=y + 1, xmax=x + width, ymax=y + height)
    ElementTree.indent(root)
    ElementTree.ElementTree(root).write(path, encoding="utf-8")
