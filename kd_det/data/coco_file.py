"""Reads a COCO file so that Detectron2, pycocotools and COCOeval can use all of it, or reports what they cannot use."""

import contextlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from reprlib import repr as shorten
from typing import Any, NoReturn

from kd_det.data.coco_fields import FIELDS, read_area
from kd_det.data.coco_masks import mask_area, read_segmentation
from kd_det.errors import InputError

Item = dict[str, Any]
# Shortest side of a box in pixels; a shorter one is 0 in the precision of a network.
SMALLEST = 1e-3


@dataclass
class CocoFile:
    """Holds the content of a COCO file.

    Attributes:
        path: The file.
        data: Its content, which is valid and complete for the evaluation.
        changed: Whether `data` differs from the content of the file, or the file has another encoding.
        notes: Descriptions of the changes that affect the meaning, for the log.
    """

    path: str
    data: dict[str, list[Item]]
    changed: bool
    notes: list[str]

    @contextlib.contextmanager
    def readable(self) -> Iterator[str]:
        """Yields a path from which pycocotools can read the data: the file, or a copy that is deleted afterwards."""
        if not self.changed:
            yield self.path
            return
        with tempfile.TemporaryDirectory() as folder:
            copy = os.path.join(folder, os.path.basename(self.path))
            with open(copy, "w", encoding="ascii") as file:
                json.dump(self.data, file)
            yield copy


def read_coco(path: str) -> CocoFile:
    """Reads and checks a COCO file; :data:`~kd_det.data.coco_fields.FIELDS` describes the fields.

    Fields that only the evaluation needs are supplied if they are missing: `area`, `iscrowd`, `num_keypoints`, and
    annotation ids other than 0, which COCOeval takes for no match.

    Raises:
        InputError: If the file or an item is malformed; the message names both.
    """
    data, plain = _load(path)
    reader = _Reader(path, data)
    reader.run()
    return CocoFile(path, data, changed=reader.changed or not plain, notes=reader.notes)


def _load(path: str) -> tuple[dict[str, Any], bool]:
    """Returns the JSON of a file and whether it is plain ASCII, which pycocotools can read under any locale."""
    try:
        with open(path, "rb") as file:
            content = file.read()
        return json.loads(content), content.isascii() and json.detect_encoding(content) == "utf-8"
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a JSON file: {error}.") from error


class _Reader:
    """Makes the content of a COCO file valid, in place.

    Args:
        path: The file, for messages.
        data: Its content.
    """

    def __init__(self, path: str, data: Any):
        self.path = path
        self.data = data
        self.changed = False
        self.notes: list[str] = []

    def run(self) -> None:
        """Checks and completes the whole content."""
        self._check_lists()
        for key in FIELDS:
            self._read_fields(key)
            self._check_ids(key)
        images, categories = ({item["id"]: item for item in self.data[key]} for key in ("images", "categories"))
        self._check_references(images, categories)
        self._complete_keypoints(categories)
        self.changed |= complete(self.data["annotations"])

    def _fail(self, message: str) -> NoReturn:
        raise InputError(f"{self.path}: {message}")

    def _check_lists(self) -> None:
        data = self.data
        lacking = [key for key in FIELDS if not isinstance(data, dict) or not isinstance(data.get(key), list)]
        if lacking == ["annotations"] and "annotations" not in data:
            self._fail(
                "has images, but no annotations (like the image_info files of COCO's test images); it can be neither "
                "trained on nor evaluated."
            )
        if lacking:
            self._fail(f"lacks {', '.join(lacking)}; a COCO file has the lists images, annotations, categories.")
        for key in ("images", "categories"):
            if not data[key]:
                self._fail(f"the list {key} is empty.")

    def _read_fields(self, key: str) -> None:
        required = [name for name, field in FIELDS[key].items() if field.required]
        changes: dict[str, list[int]] = {}
        for i, item in enumerate(self.data[key]):
            lacking = [name for name in required if not isinstance(item, dict) or name not in item]
            if lacking:
                self._fail(f"{key}[{i}] lacks {', '.join(lacking)}; it needs {', '.join(required)}.")
            for name, field in FIELDS[key].items():
                given = item.get(name)
                try:
                    value = field.read(given)
                except ValueError as error:
                    self._fail(f"{key}[{i}] has {name} {shorten(given)}, which is not {error}.")
                if (name not in item and value is None) or value is given is not None:
                    continue
                self.changed = True
                if field.change and given is not None:
                    changes.setdefault(name, []).append(i)
                if value is None:
                    del item[name]
                else:
                    item[name] = value
        for name, places in changes.items():
            subject = f"{name} of {len(places)} of the {key} (first: {key}[{places[0]}])"
            self.notes.append(f"{self.path}: {subject} is {FIELDS[key][name].change}.")

    def _check_ids(self, key: str) -> None:
        """Refuses ids that are repeated or that cannot be sorted."""
        ids = [item["id"] for item in self.data[key]]
        repeated = [id_ for id_, count in Counter(ids).items() if count > 1]
        if repeated:
            self._fail(f"{len(repeated)} ids of {key} are used twice, the first is {shorten(repeated[0])}.")
        texts = [id_ for id_ in ids if isinstance(id_, str)]
        if key != "annotations" and 0 < len(texts) < len(ids):
            number = next(id_ for id_ in ids if not isinstance(id_, str))
            self._fail(f"ids of {key} are numbers and text, such as {number!r} and {shorten(texts[0])}; use one kind.")

    def _check_references(self, images: dict[Any, Item], categories: dict[Any, Item]) -> None:
        kind = type(self.data["images"][0]["id"])
        wrong, lost = [], 0
        for item in self.data["annotations"]:
            if item["category_id"] not in categories:
                self._fail(
                    f"annotation {item['id']} has category_id {shorten(item['category_id'])}; "
                    f"categories has {', '.join(map(shorten, categories))}."
                )
            if type(item["image_id"]) is not kind:
                self._fail(
                    f"annotation {item['id']} has image_id {shorten(item['image_id'])}, but images have ids like "
                    f"{shorten(self.data['images'][0]['id'])}: both must be numbers, or both text."
                )
            image = images.get(item["image_id"])
            if image is None:
                lost += 1
                continue
            if not _is_inside(item["bbox"], image["width"], image["height"]):
                wrong.append((item, image))
            self._check_mask(item, image)
        if lost:
            self.notes.append(f"{self.path}: {lost} of the annotations belong to no image and are left out.")
        if wrong:
            item, image = wrong[0]
            self._fail(
                f"{len(wrong)} boxes are empty or leave their image, the first is {item['bbox']} "
                f"(x, y, width, height) of annotation {item['id']} in {image['file_name']}, "
                f"which is {image['width']} x {image['height']}."
            )

    def _check_mask(self, item: Item, image: Item) -> None:
        mask = item.get("segmentation")
        if isinstance(mask, dict) and mask["size"] != [image["height"], image["width"]]:
            self._fail(
                f"annotation {item['id']} has an RLE mask of size {mask['size']} (height, width), but its image "
                f"{image['file_name']} is {image['width']} x {image['height']}."
            )

    def _complete_keypoints(self, categories: dict[Any, Item]) -> None:
        points = max(len(category.get("keypoints", ())) for category in categories.values())
        for item in self.data["annotations"]:
            if points or "keypoints" in item:
                self._complete_keypoints_of(item, categories[item["category_id"]], points)

    def _complete_keypoints_of(self, item: Item, category: Item, points: int) -> None:
        """Counts the visible keypoints; an object without keypoints gets invisible ones, to match other objects."""
        names = category.get("keypoints", ())
        if "keypoints" not in item:
            self.changed = True
            item |= {"keypoints": [0] * 3 * (len(names) or points), "num_keypoints": 0}
        if names and len(item["keypoints"]) != 3 * len(names):
            self._fail(
                f"annotation {item['id']} has {len(item['keypoints'])} numbers as keypoints; its category "
                f"{category['name']!r} has {len(names)} keypoints of three numbers each."
            )
        if "num_keypoints" not in item:
            self.changed = True
            item["num_keypoints"] = sum(visible > 0 for visible in item["keypoints"][2::3])


def complete(annotations: list[Item]) -> bool:
    """Supplies, in place, the fields of annotations that COCOeval reads: `iscrowd`, `area`, and ids other than 0.

    COCOeval takes the id 0 for no match, so that an object with this id always counts as missed.

    Returns:
        Whether anything has changed.
    """
    changed = False
    for item in annotations:
        if "iscrowd" not in item or read_area(item.get("area")) is None:
            changed = True
            item |= {"iscrowd": item.get("iscrowd", 0), "area": _area(item)}
    if not all(type(item["id"]) is int and item["id"] > 0 for item in annotations):
        changed = True
        for number, item in enumerate(annotations, 1):
            item["id"] = number
    return changed


def _area(item: Item) -> float:
    """Returns the area of an annotation: the given one, else that of its mask or its box."""
    given = read_area(item.get("area"))
    if given is not None:
        return given
    try:
        mask = read_segmentation(item.get("segmentation"))
    except ValueError:
        mask = None
    _, _, width, height = item["bbox"]
    return mask_area(mask) if mask else width * height


def _is_inside(box: Iterable[float], width: int, height: int) -> bool:
    """Returns whether a box has an area and lies in the image, with a tolerance of one pixel."""
    x, y, w, h = box
    return w >= SMALLEST and h >= SMALLEST and x >= -1 and y >= -1 and x + w <= width + 1 and y + h <= height + 1
