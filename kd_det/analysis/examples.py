"""Collects the test images of a report: what each model finds in them, and where its features are active."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.data import detection_utils as utils
from detectron2.structures import Instances
from detectron2.utils.visualizer import GenericMask
from torch import Tensor

from kd_det.analysis.run import Run
from kd_det.data import class_names
from kd_det.data.images import read_image
from kd_det.engine import build_test_mapper, picture_grid
from kd_det.engine.picture_grid import printable
from kd_det.engine.pictures import FALSE, HIT, KINDS, MISSED, OBJECT, Choice, class_name, count, mark_images, overlay
from kd_det.engine.visualization import attention_maps
from kd_det.errors import InputError
from kd_det.reporting.gallery import (
    Answer,
    Attention,
    Example,
    Gallery,
    Kind,
    Mark,
    Picture,
    View,
    embed,
    place_labels,
)
from kd_det.taps import build_tap

LEGENDS = {
    OBJECT: "annotated object",
    HIT: "true positive",
    FALSE: "false positive",
    MISSED: "missed object",
}
ATTENTION_IMAGES, ATTENTION_LEVELS = 3, 3
ATTENTION_SIDE = 320  # Pixels on the longer side of a map.
DETAIL = 500  # An outline may deviate from its mask by one pixel, or by this fraction of the image's longer side.


def detection_gallery(
    images: Sequence[dict],
    dataset: str,
    predictions: Mapping[str, Sequence[Instances]],
    choices: Mapping[str, Choice],
) -> Gallery:
    """Collects what detectors find in images, with the same marks as :func:`kd_det.engine.pictures.draw_detections`.

    Args:
        images: Detectron2's dicts of the images.
        dataset: Name of the test set.
        predictions: Maps the name of a detector to its instances on each image.
        choices: Maps the name of a detector to the choice of its instances that are shown.
    """
    names = class_names(dataset)
    objects, found = mark_images(images, names, predictions, choices)
    examples = []
    for i, image in enumerate(images):
        pixels = read_image(image["file_name"], "RGB")
        picture = embed(pixels)
        file = image_name(image, i)
        caption = f"objects: {len(objects[i])}"
        by_model = {name: marks[i] for name, marks in found.items()}
        views = [make_view("ground truth", caption, file, objects[i], picture)]
        views += [make_view(name, count(marks), file, marks, picture) for name, marks in by_model.items()]
        categories = {mark.category for marks in (objects[i], *by_model.values()) for mark in marks}
        differing = differing_classes(list(by_model.values()))
        examples.append(Example(file, picture, caption, sorted(categories), sorted(differing), views))
    thresholds = "; ".join(f"{name}: {choice}" for name, choice in choices.items())
    note = (
        f"{len(examples)} images, evenly spread over the test set. A model's boxes are those above the score at "
        f"which its F1 on the whole test set is measured ({thresholds})."
    )
    kinds = [Kind(style.name, style.color, style.symbol, LEGENDS[style]) for style in KINDS]
    return Gallery(note, examples, _used_classes(names, examples), kinds)


def classification_gallery(
    images: Sequence[dict], dataset: str, predictions: Mapping[str, Sequence[Tensor]]
) -> Gallery:
    """Collects the classes that classifiers give images.

    Args:
        images: Dicts with `label`, and with `image` (H, W, 3) as RGB or its `file_name`.
        dataset: Name of the test set.
        predictions: Maps the name of a classifier to its scores (K,) for each image.
    """
    names = class_names(dataset)
    examples = []
    for i, image in enumerate(images):
        pixels = image["image"] if "image" in image else read_image(image["file_name"], "RGB")
        file = image_name(image, i)
        label, answers, predicted = image["label"], [], []
        for name, scores in predictions.items():
            best = int(scores[i].argmax())
            predicted.append(best)
            answers.append(Answer(name, class_name(names, best), float(scores[i][best]), best == label))
        differing = {label, *predicted} if len(set(predicted)) > 1 else set()
        caption = f"label: {class_name(names, label)}"
        examples.append(
            Example(file, embed(pixels), caption, sorted({label, *predicted}), sorted(differing), answers=answers)
        )
    note = (
        f"{len(examples)} images, evenly spread over the test set, and the class that each model finds most probable."
    )
    return Gallery(note, examples, _used_classes(names, examples))


def image_name(image: dict, index: int) -> str:
    """Names an image by its file, or by its number if it has none."""
    return printable(os.path.basename(image["file_name"])) if "file_name" in image else f"image {index + 1}"


def differing_classes(models: Sequence[Sequence[picture_grid.Mark]]) -> set[int]:
    """Finds the classes of which models miss different objects of an image or show another number of false boxes.

    Args:
        models: The marks of each model on one image.
    """
    categories = {mark.category for marks in models for mark in marks}

    def outcome(marks: Sequence[picture_grid.Mark], category: int) -> tuple[frozenset, int]:
        own = [mark for mark in marks if mark.category == category]
        missed = frozenset(tuple(mark.box) for mark in own if mark.style is MISSED)
        return missed, sum(mark.style is FALSE for mark in own)

    return {category for category in categories if len({outcome(marks, category) for marks in models}) > 1}


def make_view(title: str, caption: str, file: str, marks: Sequence[picture_grid.Mark], picture: Picture) -> View:
    """Describes an image with marks on it, the most important first.

    Args:
        title: Heading of the view: a model, or what the marks are.
        caption: Text next to the heading.
        file: Name of the image.
        marks: The marks.
        picture: The image.
    """
    drawn = []
    for mark in marks:
        x0, y0, x1, y1 = (round(float(x), 1) for x in mark.box)
        path = "" if mark.mask is None else outline(mark.mask, picture)
        drawn.append(Mark(mark.style.name, mark.category, (x0, y0, x1, y1), mark.label, path))
    return View(title, caption, f"{title}, {file}: {caption}", place_labels(drawn, picture))


def outline(mask: Any, picture: Picture) -> str:
    """Draws the outline of a mask, in a form that GenericMask reads, as an SVG path in pixels of the image."""
    tolerance = max(1.0, max(picture.width, picture.height) / DETAIL)  # The edge of a mask is a staircase of pixels.
    parts = []
    for polygon in GenericMask(mask, picture.height, picture.width).polygons:
        points = cv2.approxPolyDP(polygon.reshape(-1, 1, 2).astype(np.float32), tolerance, True)[:, 0]
        parts.append("M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points) + "Z")
    return "".join(parts)


def _used_classes(names: Sequence[str], examples: Sequence[Example]) -> dict[int, str]:
    return {i: class_name(names, i) for i in sorted({i for example in examples for i in example.categories})}


def draw_attention(runs: Sequence[Run], images: Sequence[dict]) -> list[Attention]:
    """Draws where the features of models are active, as attention transfer measures it, on the first images.

    The maps are those in the middle of the backbone's levels that all models have; without a common level there are
    none. A model that has no backbone, such as an ensemble, is left out.

    Args:
        runs: The models, each under a name of its own.
        images: Detectron2's dicts of the images.
    """
    strides: dict[str, dict[str, int]] = {}
    for run in runs:
        try:
            shapes = build_tap(run.model).backbone.output_shape()
        except (InputError, AttributeError):  # It has no tap, or its tap finds no backbone of the usual name.
            continue
        strides[run.name] = {name: shape.stride for name, shape in shapes.items() if shape.stride}
    drawn = [run for run in runs if run.name in strides]
    common = [name for name in next(iter(strides.values()), {}) if all(name in each for each in strides.values())]
    start = max(0, (len(common) - ATTENTION_LEVELS) // 2)
    levels = common[start : start + ATTENTION_LEVELS]
    found = []
    for i, image in enumerate(images[:ATTENTION_IMAGES] if levels else []):
        maps = [_attention(run, image, {level: strides[run.name][level] for level in levels}) for run in drawn]
        pictures = [(level, [embed(each[level], side=ATTENTION_SIDE) for each in maps]) for level in levels]
        found.append(Attention(image_name(image, i), [run.name for run in drawn], pictures))
    return found


@torch.no_grad()
def _attention(run: Run, image: dict, strides: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Maps each level to the image as the model reads it, grey, with the map over it, RGB uint8 (H, W, 3)."""
    record = build_test_mapper(run.cfg)(dict(image))
    pixels = utils.convert_image_to_rgb(record["image"].permute(1, 2, 0), run.cfg.INPUT.FORMAT)
    grey = np.repeat(pixels.mean(axis=2, keepdims=True), 3, axis=2)
    with build_tap(run.model).record(strides) as signals:
        run.model([record])
    shown = {}
    for level, stride in strides.items():
        (heat,) = attention_maps(signals[level], stride, [pixels.shape[:2]])
        shown[level] = overlay(grey, heat, "inferno")
    return shown
