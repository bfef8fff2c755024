"""A folder in the layout of Pascal VOC as a Detectron2 data set."""

import os
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from typing import Any

from detectron2.data.datasets import load_voc_instances

from kd_det.errors import InputError

BOX = ("xmin", "ymin", "xmax", "ymax")


@dataclass(frozen=True)
class VocFormat:
    """The data set as a function for the DatasetCatalog: calling it validates and loads.

    Attributes:
        name: Name of the data set.
        root: Folder with Annotations/*.xml, ImageSets/Main/*.txt and JPEGImages/*.jpg.
        split: Name of a file in ImageSets/Main, without its suffix.
        class_names: The classes, in the order of their indices.
        year: 2007 for the 11-point AP, 2012 for the area under the curve.
    """

    name: str
    root: str
    split: str
    class_names: tuple[str, ...]
    year: int

    def __str__(self) -> str:
        return f"{self.split} of {self.root} with the classes {', '.join(self.class_names)} and year {self.year}"

    def __call__(self) -> list[dict[str, Any]]:
        """Detectron2's dicts of all images.

        Raises:
            InputError: If the split, an image or an annotation is missing or malformed.
        """
        self.check_files()
        for image in self._read_split():
            self._check_image(image)
        return load_voc_instances(self.root, self.split, self.class_names)

    def metadata(self) -> dict[str, Any]:
        return {
            "thing_classes": list(self.class_names),
            "dirname": self.root,
            "split": self.split,
            "year": self.year,
            "evaluator_type": "pascal_voc",
        }

    def check_files(self) -> None:
        key = f"DATASETS.VOC_FORMAT.{self.name}"
        for folder in ("", "Annotations", "JPEGImages"):
            path = os.path.join(self.root, folder)
            if not os.path.isdir(path):
                raise InputError(f"{path}: folder not found; {key}.ROOT is {self.root}.")
        if not os.path.isfile(self._split_file):
            raise InputError(f"{self._split_file}: file not found; {key}.SPLIT names it.")

    @property
    def _split_file(self) -> str:
        return os.path.join(self.root, "ImageSets", "Main", f"{self.split}.txt")

    def _read_split(self) -> list[str]:
        with open(self._split_file, encoding="utf-8") as file:
            images = file.read().splitlines()
        for number, image in enumerate(images, 1):
            if len(image.split()) != 1:
                raise InputError(f"{self._split_file}: line {number} is {image!r}; one name of an image is needed.")
        if len(images) < 2:  # Detectron2 reads the file with numpy.loadtxt, which makes no list of one line
            raise InputError(f"{self._split_file}: lists {len(images)} images; Detectron2 needs two or more.")
        return images

    def _check_image(self, image: str) -> None:
        """Check what Detectron2's loader and its VOC evaluator read of an image."""
        xml = os.path.join(self.root, "Annotations", f"{image}.xml")
        jpg = os.path.join(self.root, "JPEGImages", f"{image}.jpg")
        for path in (xml, jpg):
            if not os.path.isfile(path):
                raise InputError(f"{path}: file not found, but {self._split_file} lists {image}.")
        try:
            tree = ElementTree.parse(xml)
        except ElementTree.ParseError as error:
            raise InputError(f"{xml}: not an XML file: {error}.") from error
        width, height = (_integer(xml, tree.getroot(), f"size/{side}") for side in ("width", "height"))
        for thing in tree.findall("object"):
            name = _text(xml, thing, "name")
            if name not in self.class_names:
                raise InputError(f"{xml}: class {name!r} found; the config allows {', '.join(self.class_names)}.")
            _text(xml, thing, "pose")
            for tag in ("truncated", "difficult"):
                _integer(xml, thing, tag)
            box = [_integer(xml, thing, f"bndbox/{side}") for side in BOX]
            xmin, ymin, xmax, ymax = box
            # The first pixel is 1 and the last one belongs to the box, give or take one pixel.
            if not (0 <= xmin <= xmax <= width + 1 and 0 <= ymin <= ymax <= height + 1):
                raise InputError(
                    f"{xml}: the box {box} ({', '.join(BOX)}) of a {name} is empty or leaves the image, "
                    f"which is {width} x {height}."
                )


def _text(xml: str, element: ElementTree.Element, tag: str) -> str:
    text = element.findtext(tag)
    if not text:
        raise InputError(f"{xml}: <{element.tag}> lacks <{tag}>, which Detectron2 reads.")
    return text


def _integer(xml: str, element: ElementTree.Element, tag: str) -> int:
    text = _text(xml, element, tag)
    try:
        return int(text)
    except ValueError:
        raise InputError(f"{xml}: <{tag}> is {text!r}; Detectron2 reads whole numbers only.") from None
