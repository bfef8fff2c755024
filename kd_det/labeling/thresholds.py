"""Chooses the score threshold of each class on a labelled data set, and measures the labels that it lets through."""

import contextlib
import io
import logging
import math
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from detectron2.structures import Instances

from kd_det.analysis.compare_detectors import coco_evaluator, coco_version
from kd_det.engine.matching import Matches, match, operating_point
from kd_det.errors import InputError

logger = logging.getLogger(__name__)
Image = tuple[dict[str, Any], Instances]


@dataclass(frozen=True)
class Quality:
    """Holds how well the labels of one class agree with a labelled data set, at IoU 0.5; the numbers are in percent.

    Attributes:
        objects: Number of labelled objects.
        precision: Share of the labels that match an object; 0 without any label.
        recall: Share of the objects that a label matches; 0 without any object.
        f1: Harmonic mean of both.
    """

    objects: int
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True)
class Validation:
    """Holds how well labels agree with a labelled data set.

    Attributes:
        dataset: Its name.
        images: Number of its images.
        ap50: COCO's AP of boxes at IoU 0.5, in percent, of the labels alone: objects below the thresholds are missed.
        classes: Maps the name of each class to its quality.
    """

    dataset: str
    images: int
    ap50: float
    classes: dict[str, Quality]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Validation":
        classes = {name: Quality(**quality) for name, quality in data["classes"].items()}
        return cls(**{**data, "classes": classes})


def parse_thresholds(texts: Sequence[str], classes: Sequence[str]) -> list[float] | None:
    """Reads thresholds from arguments: one score for all classes, and NAME=SCORE for single classes.

    Args:
        texts: The arguments.
        classes: Names of the classes.

    Returns:
        The threshold of each class; None without arguments.

    Raises:
        InputError: If an argument is neither, a class is unknown, or a class has no threshold.
    """
    if not texts:
        return None
    for_all: float | None = None
    by_name: dict[str, float] = {}
    for text in texts:
        name, equals, number = text.rpartition("=")
        try:
            score = float(number)
        except ValueError:
            score = math.nan
        if not 0 <= score <= 1:
            raise InputError(f"--threshold: must be a score from 0 to 1, or CLASS=SCORE, got {text!r}.")
        if not equals:
            for_all = score
        elif name in classes:
            by_name[name] = score
        else:
            raise InputError(f"--threshold: {name!r} in {text!r} is not a class; there are {', '.join(classes)}.")
    scores = [by_name.get(name, for_all) for name in classes]
    lacking = [name for name, score in zip(classes, scores, strict=True) if score is None]
    if lacking:
        raise InputError(f"--threshold: none is given for {', '.join(lacking)}; a score without a name is for all.")
    return [score for score in scores if score is not None]


def choose_thresholds(images: Sequence[Image], classes: Sequence[str]) -> list[float]:
    """Chooses the score threshold with the best F1 at IoU 0.5 for each class.

    A class of which no object is found has the threshold with the best F1 of all classes together.

    Args:
        images: Detectron2's dict of each image with its annotations, and what was detected in it.
        classes: Names of the classes.
    """
    points = [operating_point(match_class(images, i)) for i in range(len(classes))]
    unknown = [name for name, point in zip(classes, points, strict=True) if not point.f1]
    if unknown:
        pairs = [(record["annotations"], instances) for record, instances in images]
        shared = operating_point(match(pairs, classes=len(classes))).threshold
        logger.warning(
            "No object of %s is found in the validation images; the threshold of all classes together, %.3f, is taken.",
            ", ".join(unknown),
            shared,
        )
        return [point.threshold if point.f1 else shared for point in points]
    return [point.threshold for point in points]


def match_class(images: Iterable[Image], index: int) -> list[Matches]:
    """Matches the detections of one class to its objects; see :func:`kd_det.engine.matching.match`."""
    return match(
        [
            (
                [item for item in record["annotations"] if item["category_id"] == index],
                instances[instances.pred_classes == index],
            )
            for record, instances in images
        ]
    )


def keep(instances: Instances, thresholds: Sequence[float]) -> Instances:
    """Returns the detections whose score reaches the threshold of their class."""
    limits = torch.tensor(thresholds, dtype=torch.float64)[instances.pred_classes]
    return instances[instances.scores.double() >= limits]


def validate(images: Sequence[Image], dataset: str, classes: Sequence[str], thresholds: Sequence[float]) -> Validation:
    """Compares labels with a labelled data set.

    Args:
        images: Detectron2's dict of each of its images, and what was detected in it.
        dataset: Its name.
        classes: Names of the classes.
        thresholds: The score threshold of each class.
    """
    qualities = {}
    for i, name in enumerate(classes):
        matches = match_class(images, i)
        outcomes = [image.at(thresholds[i]) for image in matches]
        hits, false, missed = (
            sum(int(np.count_nonzero(getattr(outcome, part))) for outcome in outcomes)
            for part in ("hits", "false", "missed")
        )
        f1 = operating_point(matches, thresholds[i]).f1
        precision, recall = hits / max(hits + false, 1), hits / max(hits + missed, 1)
        qualities[name] = Quality(hits + missed, 100 * precision, 100 * recall, 100 * f1)
    return Validation(dataset, len(images), average_precision(images, dataset, thresholds), qualities)


def average_precision(images: Sequence[Image], dataset: str, thresholds: Sequence[float]) -> float:
    """Computes COCO's AP of boxes at IoU 0.5, in percent, of the detections that reach the thresholds."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        evaluator = coco_evaluator(coco_version(dataset, folder), ("bbox",))
        evaluator.reset()
        for record, instances in images:
            evaluator.process([record], [{"instances": keep(instances, thresholds)}])
        results = evaluator.evaluate()
    value = float(results["bbox"]["AP50"])
    return 0.0 if math.isnan(value) else value
