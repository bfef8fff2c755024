"""A COCO-format annotation file and its image folder as a Detectron2 data set."""

import json
import os
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from detectron2.data.datasets import load_coco_json

from kd_det.errors import InputError

REQUIRED = {
    "images": ("id", "file_name", "width", "height"),
    "annotations": ("id", "image_id", "category_id", "bbox"),
    "categories": ("id", "name"),
}
# Where a field must have a type for the file to be read at all. The boxes are looked at one by one.
TYPES = {
    "id": int | str,
    "image_id": int | str,
    "category_id": int | str,
    "file_name": str,
    "name": str,
    "width": int | float,
    "height": int | float,
}


@dataclass(frozen=True)
class CocoFormat:
    """The data set as a function for the DatasetCatalog: calling it validates and loads.

    Attributes:
        name: Name of the data set.
        json_file: Annotations: polygons, RLE or boxes alone.
        image_root: The folder below which the images lie.
    """

    name: str
    json_file: str
    image_root: str

    def __str__(self) -> str:
        return f"{self.json_file} with {self.image_root}"

    def __call__(self) -> list[dict[str, Any]]:
        """Detectron2's dicts of all images; also completes the metadata, as `load_coco_json` does.

        Raises:
            InputError: If the file, an image or an annotation is missing or malformed.
        """
        _ = self.classes
        try:
            return load_coco_json(self.json_file, self.image_root, self.name)
        except (AssertionError, KeyError, ValueError) as error:
            raise InputError(f"{self.json_file}: {error}") from error

    def metadata(self) -> dict[str, Any]:
        return {"json_file": self.json_file, "image_root": self.image_root, "evaluator_type": "coco"}

    def check_files(self) -> None:
        key = f"DATASETS.COCO_FORMAT.{self.name}"
        if not os.path.isfile(self.json_file):
            raise InputError(f"{self.json_file}: file not found; {key}.JSON names it.")
        if not os.path.isdir(self.image_root):
            raise InputError(f"{self.image_root}: folder not found; {key}.IMAGE_ROOT names it.")

    @cached_property
    def classes(self) -> list[str]:
        """Class names in the order of their ids. The first access reads and validates the whole file."""
        self.check_files()
        data = _read(self.json_file)
        self._check_images(data["images"])
        _check_annotations(self.json_file, data)
        return [category["name"] for category in sorted(data["categories"], key=lambda c: c["id"])]

    def _check_images(self, images: list[dict[str, Any]]) -> None:
        paths = [os.path.join(self.image_root, image["file_name"]) for image in images]
        missing = [path for path in paths if not os.path.isfile(path)]
        if missing:
            raise InputError(
                f"{self.json_file}: {len(missing)} of {len(paths)} image files not found, the first is {missing[0]}."
            )


def _read(json_file: str) -> dict[str, list[dict[str, Any]]]:
    try:
        with open(json_file, encoding="utf-8") as file:
            data = json.load(file)
    except ValueError as error:
        raise InputError(f"{json_file}: not a JSON file: {error}.") from error
    lacking = [key for key in REQUIRED if not isinstance(data, dict) or not isinstance(data.get(key), list)]
    if lacking:
        raise InputError(f"{json_file}: lacks {', '.join(lacking)}; a COCO file has the lists {', '.join(REQUIRED)}.")
    for key in ("images", "categories"):
        if not data[key]:
            raise InputError(f"{json_file}: the list {key} is empty.")
    for key, fields in REQUIRED.items():
        for i, item in enumerate(data[key]):
            lacking = [field for field in fields if not isinstance(item, dict) or field not in item]
            if lacking:
                raise InputError(f"{json_file}: {key}[{i}] lacks {', '.join(lacking)}; it needs {', '.join(fields)}.")
            for field in fields:
                if not isinstance(item[field], TYPES.get(field, object)):
                    raise InputError(
                        f"{json_file}: {key}[{i}] has {field} {item[field]!r}, which is not a "
                        f"{'name' if TYPES[field] is str else 'number'}."
                    )
        repeated = [id_ for id_, count in Counter(item["id"] for item in data[key]).items() if count > 1]
        if repeated:
            raise InputError(f"{json_file}: {len(repeated)} ids of {key} are used twice, the first is {repeated[0]!r}.")
    return data


def _check_annotations(json_file: str, data: dict[str, list[dict[str, Any]]]) -> None:
    images = {image["id"]: image for image in data["images"]}
    categories = [category["id"] for category in data["categories"]]
    wrong = []
    for annotation in data["annotations"]:
        if annotation["category_id"] not in categories:
            raise InputError(
                f"{json_file}: annotation {annotation['id']} has category_id {annotation['category_id']!r}; "
                f"categories has {', '.join(map(str, categories))}."
            )
        image = images.get(annotation["image_id"])  # of no image: Detectron2 warns and leaves it out
        if image and not _is_valid(annotation["bbox"], image["width"], image["height"]):
            wrong.append((annotation, image))
    if wrong:
        annotation, image = wrong[0]
        raise InputError(
            f"{json_file}: {len(wrong)} boxes are empty or leave their image, the first is {annotation['bbox']} "
            f"(x, y, width, height) of annotation {annotation['id']} in {image['file_name']}, "
            f"which is {image['width']} x {image['height']}."
        )


def _is_valid(box: Any, width: int, height: int) -> bool:
    """Whether a box has an area and lies in the image, with a tolerance of one pixel."""
    if not isinstance(box, list) or len(box) != 4 or not all(isinstance(value, (int, float)) for value in box):
        return False
    x, y, w, h = box
    return w > 0 and h > 0 and x >= -1 and y >= -1 and x + w <= width + 1 and y + h <= height + 1
