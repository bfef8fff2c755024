"""Makes a Detectron2 data set of a folder in the layout of Pascal VOC."""

import codecs
import math
import os
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import PureWindowsPath
from typing import Any, NamedTuple

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from kd_det.data.coco_fields import FLAGS
from kd_det.data.images import image_size, image_suffixes
from kd_det.errors import InputError

# Keys that Detectron2 puts into the metadata of a VOC data set when it registers it.
METADATA = ("dirname", "split", "thing_classes", "year")
SIDES = ("xmin", "ymin", "xmax", "ymax")


class VocObject(NamedTuple):
    """Holds an annotated object.

    Attributes:
        category: Index of its class.
        box: xmin, ymin, xmax, ymax as in the file: the first pixel is 1, and the last one belongs to the box.
        difficult: Whether evaluations leave it out.
    """

    category: int
    box: tuple[float, ...]
    difficult: bool


class VocImage(NamedTuple):
    """Holds an image of a split: its name in the split, its file, its size and its objects."""

    name: str
    file_name: str
    width: int
    height: int
    objects: tuple[VocObject, ...]


@dataclass(frozen=True)
class VocFormat:
    """Reads a data set in the layout of Pascal VOC; a function for the DatasetCatalog.

    Attributes:
        name: Name of the data set.
        root: Folder with Annotations/*.xml, ImageSets/Main/*.txt and the images in JPEGImages.
        split: Name of a file in ImageSets/Main, without its suffix.
        class_names: The classes, in the order of their indices.
        year: 2007 for the 11-point AP, 2012 for the area under the curve.
        is_stock: Whether Detectron2 or a plugin registered it instead of the config.
    """

    name: str
    root: str
    split: str
    class_names: tuple[str, ...]
    year: int
    is_stock: bool = False

    def __str__(self) -> str:
        return f"{self.split} of {self.root} with the classes {', '.join(self.class_names)} and year {self.year}"

    def __call__(self) -> list[dict[str, Any]]:
        """Returns Detectron2's dicts of all images, as its `load_voc_instances` does.

        Raises:
            InputError: For the reasons of :attr:`images`.
        """
        return [
            {
                "file_name": image.file_name,
                "image_id": image.name,
                "height": image.height,
                "width": image.width,
                "annotations": [
                    {"category_id": category, "bbox": [x0 - 1, y0 - 1, x1, y1], "bbox_mode": BoxMode.XYXY_ABS}
                    for category, (x0, y0, x1, y1), _ in image.objects
                ],
            }
            for image in self.images
        ]

    def metadata(self) -> dict[str, Any]:
        return {
            "thing_classes": list(self.class_names),
            "dirname": self.root,
            "split": self.split,
            "year": self.year,
            "evaluator_type": "pascal_voc",
        }

    def check_files(self) -> None:
        """Checks the files and their content; the first call reads all annotations.

        Raises:
            InputError: For the reasons of :attr:`images`.
        """
        _ = self.images

    @cached_property
    def images(self) -> tuple[VocImage, ...]:
        """Reads the images of the split, in its order.

        Raises:
            InputError: If the split, an image or an annotation is missing or malformed.
        """
        for folder in ("", "Annotations", "JPEGImages"):
            path = os.path.join(self.root, folder)
            if not os.path.isdir(path):
                raise InputError(f"{path}: folder not found; {self._describe('ROOT')} is {self.root}.")
        if not os.path.isfile(self._split_file):
            raise InputError(f"{self._split_file}: file not found; {self._describe('SPLIT')} names it.")
        return tuple(self._read_image(name) for name in _read_split(self._split_file))

    def _describe(self, key: str) -> str:
        if self.is_stock:
            return f"the {key.lower()} of the data set {self.name!r}"
        return f"DATASETS.VOC_FORMAT.{self.name}.{key}"

    @property
    def _split_file(self) -> str:
        return os.path.join(self.root, "ImageSets", "Main", f"{self.split}.txt")

    def _read_image(self, name: str) -> VocImage:
        xml = os.path.join(self.root, "Annotations", f"{name}.xml")
        if not os.path.isfile(xml):
            raise InputError(
                f"{xml}: file not found, but {self._split_file} lists {name!r}; each line is a name without a suffix."
            )
        root = _parse(xml)
        file_name = self._find_image(name, root)
        width, height = _size(xml, root) or image_size(file_name)
        objects = tuple(self._read_object(xml, thing, width, height) for thing in _find_objects(xml, root))
        return VocImage(name, file_name, width, height, objects)

    def _find_image(self, name: str, root: ElementTree.Element) -> str:
        """Finds an image: `<name>.jpg`, else the only image with that name, else the one in `<filename>`."""
        path = os.path.join(self._image_folder, name)
        if os.path.isfile(f"{path}.jpg"):
            return f"{path}.jpg"
        candidates = [file for file in self._images_by_stem.get(path, []) if os.path.isfile(file)]
        if len(candidates) == 1:
            return candidates[0]
        # Some tools write a path there, possibly a Windows path.
        stated = PureWindowsPath((root.findtext("filename") or "").strip()).name
        stated = os.path.join(os.path.dirname(path), stated)
        if os.path.isfile(stated):
            return stated
        if candidates:
            names = ", ".join(candidates)
            raise InputError(f"{path}: {len(candidates)} images have this name: {names}; keep one of them.")
        raise InputError(
            f"{path}.jpg: file not found, nor an image of this name with another suffix, but {self._split_file} lists "
            f"{name!r}."
        )

    @property
    def _image_folder(self) -> str:
        return os.path.join(self.root, "JPEGImages")

    @cached_property
    def _images_by_stem(self) -> dict[str, list[str]]:
        """Maps the path of each image without its suffix to the paths with a suffix."""
        paths: dict[str, list[str]] = {}
        for folder, _, files in os.walk(self._image_folder, followlinks=True):
            for file in sorted(files):
                stem, suffix = os.path.splitext(os.path.join(folder, file))
                if suffix.lower() in image_suffixes():
                    paths.setdefault(stem, []).append(stem + suffix)
        return paths

    def _read_object(self, xml: str, thing: ElementTree.Element, width: int, height: int) -> VocObject:
        name = _text(xml, thing, "name")
        if name not in self.class_names:
            raise InputError(f"{xml}: class {name!r} found; the config allows {', '.join(self.class_names)}.")
        box = tuple(_number(xml, thing, f"bndbox/{side}") for side in SIDES)
        xmin, ymin, xmax, ymax = box
        # There is a tolerance of one pixel, since some tools count pixels from 0.
        if not (0 <= xmin <= xmax <= width + 1 and 0 <= ymin <= ymax <= height + 1):
            raise InputError(
                f"{xml}: the box [{', '.join(f'{value:.10g}' for value in box)}] ({', '.join(SIDES)}) of a {name} is "
                f"empty or leaves the image, which is {width} x {height}."
            )
        return VocObject(self.class_names.index(name), box, _is_difficult(xml, thing))


def voc_dataset(name: str) -> VocFormat:
    """Returns a registered VOC data set as a :class:`VocFormat`, also one of Detectron2's, such as ``voc_2007_test``.

    Raises:
        InputError: If its metadata is incomplete.
    """
    dataset = DatasetCatalog[name]
    if isinstance(dataset, VocFormat):
        return dataset
    metadata = MetadataCatalog.get(name).as_dict()
    lacking = [key for key in METADATA if key not in metadata]
    if lacking:
        raise InputError(f"data set {name!r}: its metadata lacks {', '.join(lacking)}; pascal_voc needs them.")
    root, split, classes, year = (metadata[key] for key in METADATA)
    return VocFormat(name, root, split, tuple(classes), year, is_stock=True)


def _read_split(path: str) -> list[str]:
    with open(path, "rb") as file:
        data = file.read()
    # Windows writes text with a byte order mark; PowerShell writes UTF-16.
    encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        lines = data.decode(encoding).splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a text file in UTF-8: {error}.") from error
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise InputError(f"{path}: lists no image; one name a line is needed.")
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise InputError(f"{path}: {len(repeated)} name(s) listed twice, the first is {repeated[0]!r}.")
    return names


def _parse(xml: str) -> ElementTree.Element:
    """Returns the root of an XML file, with namespaces removed from the tags."""
    try:
        root = ElementTree.parse(xml).getroot()
    # An unknown encoding raises a LookupError; one that the parser does not support raises a ValueError.
    except (ElementTree.ParseError, LookupError, ValueError, OSError) as error:
        raise InputError(f"{xml}: not an XML file that can be read: {error}.") from error
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
    return root


def _find_objects(xml: str, root: ElementTree.Element) -> list[ElementTree.Element]:
    """Returns the objects of an annotation, if any, after a check that all of them are direct children of the root."""
    objects = root.findall("object")
    if len(objects) < sum(1 for _ in root.iter("object")):
        raise InputError(f"{xml}: an <object> lies inside another tag; it must be right below <{root.tag}>.")
    if not objects and root.tag != "annotation":
        raise InputError(f"{xml}: not an annotation of Pascal VOC: <{root.tag}> found instead of <annotation>.")
    return objects


def _is_difficult(xml: str, thing: ElementTree.Element) -> bool:
    text = (thing.findtext("difficult") or "").strip()
    return bool(FLAGS[text] if text in FLAGS else _number(xml, thing, "difficult"))


def _size(xml: str, root: ElementTree.Element) -> tuple[int, int] | None:
    """Returns the width and the height in an annotation; None if they are missing or 0."""
    sides = []
    for tag in ("size/width", "size/height"):
        if not (root.findtext(tag) or "").strip():
            return None
        side = _number(xml, root, tag)
        if side < 0 or side != int(side):
            raise InputError(f"{xml}: <{tag}> is {side:.10g}; a number of pixels is needed.")
        sides.append(int(side))
    width, height = sides
    return (width, height) if width and height else None


def _text(xml: str, element: ElementTree.Element, tag: str) -> str:
    text = (element.findtext(tag) or "").strip()
    if not text:
        raise InputError(f"{xml}: <{element.tag}> lacks <{tag}>; each object needs name and bndbox.")
    return text


def _number(xml: str, element: ElementTree.Element, tag: str) -> float:
    text = _text(xml, element, tag)
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"{xml}: <{tag}> is {text!r}; a number is needed.")
    return value
