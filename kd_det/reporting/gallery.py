"""Describes the test images of a report: embedded pictures, and what each model says about them."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

SIDE = 640  # Larger images are reduced to this many pixels on their longer side.
QUALITY = 80
PIXELATED = 100  # Smaller images are enlarged without interpolation.
# A label's size relative to the image's longer side, and the mean width of its letters relative to that size.
LABEL, LETTER = 0.037, 0.6


@dataclass(frozen=True)
class Picture:
    """Holds an image as a data URI, with the size in pixels of the original, which marks refer to."""

    uri: str
    width: int
    height: int

    @property
    def is_tiny(self) -> bool:
        return max(self.width, self.height) < PIXELATED

    @property
    def label_size(self) -> float:
        """Returns the height of labels in pixels of the original."""
        return round(LABEL * max(self.width, self.height), 2)


@dataclass(frozen=True)
class Kind:
    """Describes a kind of mark: its name, its colour, and the symbol and text of its legend."""

    name: str
    color: str
    symbol: str
    legend: str


@dataclass(frozen=True)
class Mark:
    """Holds a box (x0, y0, x1, y1) in pixels of the original, and its mask as an SVG path.

    Attributes:
        kind: Name of its kind.
        category: Index of its class.
        box: The box.
        label: What is said about it.
        mask: The mask; empty without one.
        corner: Left end and baseline of the label; None hides the label, which then remains as a tooltip.
    """

    kind: str
    category: int
    box: tuple[float, float, float, float]
    label: str
    mask: str = ""
    corner: tuple[float, float] | None = None


@dataclass(frozen=True)
class View:
    """Holds what a model finds in an image; `description` says it in words."""

    title: str
    caption: str
    description: str
    marks: Sequence[Mark]


@dataclass(frozen=True)
class Answer:
    """Holds the class that a classifier gives an image, and whether it is the label."""

    title: str
    label: str
    probability: float
    is_right: bool


@dataclass(frozen=True)
class Example:
    """Holds a test image.

    Attributes:
        name: Its file name or its number.
        picture: The image.
        caption: What it shows: its label, or the number of its objects.
        categories: Indices of all classes that it shows or that a model finds in it.
        differing: Indices of the classes about which the models differ.
        views: What detectors find in it; the first view has the annotated objects.
        answers: What classifiers say about it.
    """

    name: str
    picture: Picture
    caption: str
    categories: Sequence[int]
    differing: Sequence[int]
    views: Sequence[View] = ()
    answers: Sequence[Answer] = ()


@dataclass(frozen=True)
class Gallery:
    """Holds the test images of a report.

    Attributes:
        note: How the images were chosen, and what the models' marks depend on.
        examples: The images.
        classes: Maps indices of classes to their names.
        kinds: The kinds of marks; empty for classifiers.
        title: Heading of the gallery.
    """

    note: str
    examples: Sequence[Example]
    classes: dict[int, str]
    kinds: Sequence[Kind] = ()
    title: str = "Test images"

    @property
    def compares(self) -> bool:
        """Returns whether there are models to compare, which may differ."""
        return any(len(example.views) != 1 for example in self.examples)


@dataclass(frozen=True)
class Attention:
    """Holds the maps of one image: for each level of features, the picture of each model.

    Attributes:
        name: Name of the image.
        models: Names of the models.
        levels: Name of each level, and the models' pictures.
    """

    name: str
    models: Sequence[str]
    levels: Sequence[tuple[str, Sequence[Picture]]]


def embed(pixels: np.ndarray, *, side: int = SIDE) -> Picture:
    """Encodes an image, RGB uint8 (H, W, 3), as a data URI; tiny images without loss, and all others as WebP.

    Args:
        pixels: The image.
        side: Largest number of pixels on its longer side.
    """
    height, width = pixels.shape[:2]
    image = Image.fromarray(np.ascontiguousarray(pixels))
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=QUALITY, lossless=max(width, height) < PIXELATED)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return Picture(f"data:image/webp;base64,{data}", width, height)


def place_labels(marks: Sequence[Mark], picture: Picture) -> list[Mark]:
    """Places labels above their boxes, or below where there is no room; those that would cover another have no place.

    Args:
        marks: The marks of one view, the most important first.
        picture: The image that they lie on.
    """
    size = picture.label_size
    taken: list[tuple[float, float, float, float]] = []
    placed = []
    for mark in marks:
        width, corner = LETTER * size * len(mark.label), None
        x0, y0, _, y1 = mark.box
        left = max(0.0, min(x0, picture.width - width))
        for top in (y0 - 1.2 * size, y1 + 0.2 * size):
            area = left, top, left + width, top + size
            if mark.label and top >= 0 and area[3] <= picture.height and not any(_overlap(area, x) for x in taken):
                taken.append(area)
                corner = round(left, 1), round(top + 0.85 * size, 1)
                break
        placed.append(Mark(mark.kind, mark.category, mark.box, mark.label, mark.mask, corner))
    return placed


def _overlap(a: Sequence[float], b: Sequence[float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
