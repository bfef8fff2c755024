"""Draws the predictions and attention maps of several models on the same images."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from detectron2.structures import BoxMode, Instances
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Tensor

from kd_det.data.images import read_image
from kd_det.engine.matching import OperatingPoint, Outcome, match
from kd_det.engine.picture_grid import Mark, Scene, Style, Words, draw_grid, printable

CELL = 640  # This is the width in pixels of a column of detections.
SMALL_CELL = 200  # This is the width in pixels of a column of classifications.
LETTERS = 20  # A label shows at most this many letters of a class name.
# These colours of Okabe and Ito can be distinguished by colour-blind readers.
OBJECT = Style("object", "#56B4E9", "-")
HIT = Style("hit", "#009E73", "-", "✓")
FALSE = Style("false", "#D55E00", ":", "✗")
MISSED = Style("missed", "#E69F00", "--", "○")
KINDS = (OBJECT, HIT, FALSE, MISSED)


@dataclass(frozen=True)
class Choice:
    """Selects which of a detector's instances are drawn, and formats their line in its title.

    Attributes:
        point: The score threshold, and the F1 at it.
        note: Text after the F1.
    """

    point: OperatingPoint
    note: str

    def __str__(self) -> str:
        return f"score ≥ {self.point.threshold:.2f}: F1 {100 * self.point.f1:.2f}{self.note}"


def draw_detections(
    images: Sequence[dict],
    class_names: Sequence[str],
    predictions: Mapping[str, Sequence[Instances]],
    choices: Mapping[str, Choice],
) -> Figure:
    """Draws a grid: one row per image, the ground truth in the first column, then one column per detector.

    A detector's column shows its hits, its false detections and the objects that it misses, as
    :func:`kd_det.engine.matching.match` finds them. Crowds are left out, and so are detections on them or of classes
    without a name. Each instance's mask has its own shade of the colour of its box.

    Args:
        images: Detectron2's dicts of the images.
        class_names: Names of the classes.
        predictions: Maps the name of a detector to its instances on each image.
        choices: Maps the name of a detector to the choice of its instances that are drawn.
    """
    objects, found = mark_images(images, class_names, predictions, choices)
    titles = ["ground truth", *(f"{printable(name)}\n{choices[name]}" for name in predictions)]
    rows = []
    for image, truth, *marked in zip(images, objects, *found.values(), strict=True):
        pixels = read_image(image["file_name"], "RGB")
        caption = f"{printable(os.path.basename(image['file_name']))}, objects: {len(truth)}"
        rows.append([Scene(pixels, truth, caption), *(Scene(pixels, marks, count(marks)) for marks in marked)])
    return draw_grid(titles, rows, CELL, legend=KINDS)


def mark_images(
    images: Sequence[dict],
    class_names: Sequence[str],
    predictions: Mapping[str, Sequence[Instances]],
    choices: Mapping[str, Choice],
) -> tuple[list[list[Mark]], dict[str, list[list[Mark]]]]:
    """Marks the objects of each image, and what each detector finds and misses in it; see :func:`draw_detections`.

    Returns:
        The marks of each image's objects, and by the name of each detector the marks of each image.
    """
    masks = any(instances.has("pred_masks") for column in predictions.values() for instances in column)
    truth = [image["annotations"] for image in images]
    objects = [mark_objects(annotations, class_names, masks=masks) for annotations in truth]
    found = {}
    for name, column in predictions.items():
        matches = match(list(zip(truth, column, strict=True)), classes=len(class_names))
        outcomes = [image.at(choices[name].point.threshold) for image in matches]
        found[name] = [mark_outcome(*image, class_names) for image in zip(outcomes, truth, column, strict=True)]
    return objects, found


def draw_classifications(
    images: Sequence[dict], class_names: Sequence[str], predictions: Mapping[str, Sequence[Tensor]]
) -> Figure:
    """Draws a grid: one row per image with its label, then one column per classifier.

    A classifier's column shows its most probable class and the probability, green with a tick if the class is the label
    and red with a cross if not.

    Args:
        images: Dicts with `label`, and with `image` (H, W, 3) as RGB or its `file_name`.
        class_names: Names of the classes; the index is shown for a class without a name.
        predictions: Maps the name of a classifier to its scores (K,) for each image.
    """
    rows = []
    for i, image in enumerate(images):
        pixels = image["image"] if "image" in image else read_image(image["file_name"], "RGB")
        label = image["label"]
        cells = [pixels, Words(class_name(class_names, label))]
        for scores in predictions.values():
            predicted = int(scores[i].argmax())
            style = HIT if predicted == label else FALSE
            name = style.label(class_name(class_names, predicted))
            cells.append(Words(f"{name}\n{scores[i][predicted]:.0%}", style.color))
        rows.append(cells)
    return draw_grid(["image", "label", *map(printable, predictions)], rows, SMALL_CELL)


def draw_attention(images: Sequence[np.ndarray], maps: Mapping[str, Sequence[np.ndarray]]) -> Figure:
    """Draws a grid: one row per image, the image in the first column, then one column per network with its map.

    Args:
        images: RGB, uint8 (H, W, 3).
        maps: Maps the name of a network to its map of each image, (H, W), from 0 (blue) to 1 (red).
    """
    rows = [
        [pixels, *(overlay(pixels, heat) for heat in row)] for pixels, *row in zip(images, *maps.values(), strict=True)
    ]
    width = max(SMALL_CELL, min(CELL // 2, max(pixels.shape[1] for pixels in images)))
    return draw_grid(["image", *maps], rows, width)


def overlay(pixels: np.ndarray, values: np.ndarray, colors: str = "jet") -> np.ndarray:
    """Averages an image (H, W, 3) with the colours of values (H, W) from 0 to 1, in a colour map of matplotlib."""
    return ((pixels + 255 * colormaps[colors](values)[..., :3]) / 2).astype(np.uint8)


def mark_objects(annotations: Sequence[dict], class_names: Sequence[str], *, masks: bool) -> list[Mark]:
    """Marks the annotated objects of an image, with their masks if these are wanted and present."""
    marks = []
    for item in annotations:
        if not item.get("iscrowd", 0):
            mask = item.get("segmentation") if masks else None
            category = item["category_id"]
            marks.append(Mark(box_of(item), OBJECT, short_name(class_names, category), mask or None, category))
    return marks


def mark_outcome(
    outcome: Outcome, annotations: Sequence[dict], instances: Instances, class_names: Sequence[str]
) -> list[Mark]:
    """Marks hits, false detections and missed objects, in descending order of score."""
    boxes, scores = instances.pred_boxes.tensor.tolist(), instances.scores.tolist()
    masks = instances.pred_masks.numpy() if instances.has("pred_masks") else None
    marks = []
    for style, shown in ((HIT, outcome.hits), (FALSE, outcome.false)):
        for i in sorted(np.flatnonzero(shown), key=lambda i: -scores[i]):
            category = instances.pred_classes[i].item()
            label = style.label(f"{short_name(class_names, category)} {scores[i]:.0%}".strip())
            marks.append(Mark(boxes[i], style, label, None if masks is None else masks[i], category))
    for item, is_missed in zip(annotations, outcome.missed, strict=True):
        if is_missed:
            category = item["category_id"]
            name = short_name(class_names, category)
            marks.append(Mark(box_of(item), MISSED, MISSED.label(name) if name else "", category=category))
    return marks


def box_of(annotation: dict) -> list[float]:
    """Returns an annotation's box as (x0, y0, x1, y1)."""
    return BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)


def class_name(class_names: Sequence[str], index: int) -> str:
    """Returns the name of a class on one line, or its index if it has none."""
    return printable(class_names[index]) if index < len(class_names) else str(index)


def short_name(class_names: Sequence[str], index: int) -> str:
    """Shortens the name of a class to fit a label; returns "" for the only class."""
    name = "" if len(class_names) == 1 else class_name(class_names, index)
    return name if len(name) <= LETTERS else f"{name[: LETTERS - 1]}…"


def count(marks: Sequence[Mark]) -> str:
    """Describes the numbers of hits, false detections and missed objects in words."""
    return ", ".join(f"{sum(mark.style is style for mark in marks)} {style.name}" for style in (HIT, FALSE, MISSED))
