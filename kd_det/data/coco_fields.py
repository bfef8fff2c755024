"""Defines the fields of a COCO file that Detectron2, pycocotools and COCOeval read, and their allowed values."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kd_det.data.coco_masks import are_numbers, read_segmentation

# COCOeval ignores larger objects.
LARGEST_AREA = 1e10
FLAGS = {"0": 0, "0.0": 0, "False": 0, "false": 0, "": 0, "1": 1, "1.0": 1, "True": 1, "true": 1}


@dataclass(frozen=True)
class Field:
    """Describes a field of the images, annotations or categories.

    Attributes:
        read: Returns the value as its readers need it, which is the very same object if it is already correct; raises a
            ValueError that says what the value must be.
        required: Whether every item needs the field. A missing optional field is read as null; a field that is read as
            None is removed.
        change: Text for a warning that describes a value which had to be changed; "" if its meaning is unchanged.
    """

    read: Callable[[Any], Any]
    required: bool = True
    change: str = ""


def read_text(value: Any) -> str:
    try:
        if isinstance(value, str) and value.encode("utf-8") is not None:
            return value
    except UnicodeEncodeError:
        pass
    raise ValueError("a name")


def read_id(value: Any) -> int | str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is int and -(2**63) <= value < 2**63:
        return value
    try:
        return read_text(value)
    except ValueError:
        raise ValueError("a whole number of 64 bits, or text") from None


def read_side(value: Any) -> int:
    if are_numbers([value]) and value == int(value) > 0:
        return value if type(value) is int else int(value)
    raise ValueError("a whole number above 0")


def read_box(value: Any) -> list[float]:
    if are_numbers(value) and len(value) == 4:
        return value
    rotated = "; five values are a rotated box, which cannot be read" if are_numbers(value) and len(value) == 5 else ""
    raise ValueError(f"a list of four numbers, x, y, width, height{rotated}")


def read_flag(value: Any) -> int:
    if value is None:
        return 0
    if not isinstance(value, str | int | float) or str(value) not in FLAGS:
        raise ValueError("0 or 1")
    return FLAGS[str(value)] if type(value) is not int else value


def read_ignore(value: Any) -> int | None:
    if read_flag(value):
        raise ValueError("0; Detectron2 has no use for it: set iscrowd to 1 instead, or delete the annotation")
    return None if value is None else read_flag(value)


def read_area(value: Any) -> float | None:
    """Returns the area if COCOeval can use it, else None."""
    return value if type(value) in (int, float) and 0 <= value <= LARGEST_AREA else None


def read_keypoints(value: Any) -> list[float] | None:
    if value is None or value == []:
        return None
    if are_numbers(value) and len(value) % 3 == 0:
        return value
    raise ValueError("a list of numbers x, y, visibility, x, y, visibility, ...")


def read_names(value: Any) -> list[str] | None:
    if value is None or value == []:
        return None
    if isinstance(value, list) and len({read_text(name) for name in value}) == len(value):
        return value
    raise ValueError("a list of different names")


def read_count(value: Any) -> int | None:
    return value if type(value) is int and value >= 0 else None


FIELDS = {
    "images": {
        "id": Field(read_id),
        "file_name": Field(read_text),
        "width": Field(read_side),
        "height": Field(read_side),
    },
    "categories": {
        "id": Field(read_id),
        "name": Field(read_text),
        "keypoints": Field(read_names, required=False),
    },
    "annotations": {
        "id": Field(read_id),
        "image_id": Field(read_id),
        "category_id": Field(read_id),
        "bbox": Field(read_box),
        "iscrowd": Field(read_flag, required=False),
        "ignore": Field(read_ignore, required=False),
        "area": Field(read_area, required=False, change="no possible area; that of the mask or the box is taken"),
        "segmentation": Field(
            read_segmentation,
            required=False,
            change="a flat list, read as one polygon, or has polygons of less than three points, which are left out",
        ),
        "keypoints": Field(read_keypoints, required=False),
        "num_keypoints": Field(read_count, required=False),
    },
}
