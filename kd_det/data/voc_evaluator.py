"""Computes the metric of Pascal VOC on annotations as kd_det reads them."""

import logging
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from detectron2.evaluation import DatasetEvaluator
from detectron2.evaluation.pascal_voc_evaluation import voc_ap
from detectron2.utils import comm

from kd_det.data.voc_format import VocImage, voc_dataset

# Overlap thresholds in percent, above which a detection is a hit.
OVERLAPS = range(50, 100, 5)


class Detection(NamedTuple):
    """Holds a detected box with its score and the name of its image."""

    image: str
    score: float
    box: tuple[float, ...]


class Objects(NamedTuple):
    """Holds the objects of one class in one image: boxes (M, 4) and whether each is difficult, (M,)."""

    boxes: np.ndarray
    difficult: np.ndarray


class VocEvaluator(DatasetEvaluator):
    """Computes the average precision of boxes; agrees with Detectron2's evaluator wherever that one works.

    Detectron2's ``PascalVOCDetectionEvaluator`` parses the annotations itself, and needs whole numbers, every tag and
    names without blanks; a class without an object makes its mean too low, or not a number. This one uses the
    annotations of :class:`~kd_det.data.voc_format.VocFormat`, and averages over the classes that have an object which
    is not difficult.

    Args:
        dataset_name: A data set of DATASETS.VOC_FORMAT, or one of Detectron2's VOC data sets.
    """

    def __init__(self, dataset_name: str):
        self._dataset = voc_dataset(dataset_name)
        self._logger = logging.getLogger(__name__)
        self.reset()

    def reset(self) -> None:
        self._detections: dict[int, list[Detection]] = defaultdict(list)

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Stores the detections of a batch, rounded as in the files of the VOC challenge.

        Args:
            inputs: Dicts with `image_id`.
            outputs: Dicts with `instances`, which have `pred_boxes`, `scores` and `pred_classes`.
        """
        for record, output in zip(inputs, outputs, strict=True):
            instances = output["instances"].to("cpu")
            boxes = instances.pred_boxes.tensor.numpy() + np.array([1, 1, 0, 0], dtype=np.float32)
            for box, score, category in zip(
                boxes, instances.scores.tolist(), instances.pred_classes.tolist(), strict=True
            ):
                rounded = tuple(float(f"{value:.1f}") for value in box)
                self._detections[category].append(Detection(record["image_id"], float(f"{score:.3f}"), rounded))

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Gathers the detections of all processes and compares them with the annotations.

        Returns:
            In the main process, a dict that maps ``bbox`` to `AP` (mean over overlaps of 50 to 95 %), `AP50` and
            `AP75`, in percent, which are not a number if no class has an object. In other processes, {}.
        """
        parts = comm.gather(self._detections)
        if not comm.is_main_process():
            return {}
        truth = objects_by_class(self._dataset.images)
        absent = [name for index, name in enumerate(self._dataset.class_names) if index not in truth]
        if absent:
            self._logger.warning(
                "%s has no object of %s: the AP is the mean over the other classes.",
                self._dataset.name,
                ", ".join(absent),
            )
        precisions = []
        for category, objects in sorted(truth.items()):
            detections = [detection for part in parts for detection in part.get(category, [])]
            precisions.append(average_precisions(detections, objects, is_2007=self._dataset.year == 2007))
        means = [np.mean(row) for row in zip(*precisions, strict=True)] or [np.nan] * len(OVERLAPS)
        by_overlap = dict(zip(OVERLAPS, means, strict=True))
        return {"bbox": {"AP": np.mean(means), "AP50": by_overlap[50], "AP75": by_overlap[75]}}


def objects_by_class(images: Iterable[VocImage]) -> dict[int, dict[str, Objects]]:
    """Maps each class with an object that is not difficult to a dict from image names to the objects of that class."""
    boxes: dict[int, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    for image in images:
        for thing in image.objects:
            boxes[thing.category][image.name].append((thing.box, thing.difficult))
    evaluated = {}
    for category, by_image in boxes.items():
        objects = {name: Objects(*map(np.array, zip(*rows, strict=True))) for name, rows in by_image.items()}
        if not all(x.difficult.all() for x in objects.values()):
            evaluated[category] = objects
    return evaluated


def average_precisions(detections: list[Detection], objects: dict[str, Objects], *, is_2007: bool) -> list[float]:
    """Computes the average precision of one class, in percent, at each of :data:`OVERLAPS`.

    Args:
        detections: Detections of this class in all images.
        objects: Maps the name of each image with objects of this class to these objects.
        is_2007: Whether to take the mean of 11 points instead of the area under the curve.
    """
    order = np.argsort([-detection.score for detection in detections])
    matches = []
    for name, _, box in (detections[i] for i in order):
        matches.append((name, *(best_match(box, objects[name].boxes) if name in objects else (0.0, -1))))
    count = float(sum((~x.difficult).sum() for x in objects.values()))
    precisions = []
    for percent in OVERLAPS:
        hits, misses = judge(matches, objects, percent / 100)
        precision = hits / np.maximum(hits + misses, np.finfo(np.float64).eps)
        precisions.append(100 * voc_ap(hits / count, precision, is_2007))
    return precisions


def best_match(box: tuple[float, ...], boxes: np.ndarray) -> tuple[float, int]:
    """Returns the largest overlap (intersection over union) of a box with other boxes, and the index of that box.

    Pixels are counted as in VOC: a box from 3 to 5 is 3 pixels wide.
    """
    x0, y0, x1, y1 = boxes.T
    width = np.maximum(np.minimum(x1, box[2]) - np.maximum(x0, box[0]) + 1.0, 0.0)
    height = np.maximum(np.minimum(y1, box[3]) - np.maximum(y0, box[1]) + 1.0, 0.0)
    shared = width * height
    area = (box[2] - box[0] + 1.0) * (box[3] - box[1] + 1.0)
    overlaps = shared / (area + (x1 - x0 + 1.0) * (y1 - y0 + 1.0) - shared)
    best = int(np.argmax(overlaps))
    return float(overlaps[best]), best


def judge(
    matches: list[tuple[str, float, int]], objects: dict[str, Objects], threshold: float
) -> tuple[np.ndarray, np.ndarray]:
    """Counts hits and misses among the first 1, 2, ... detections; a detection of a difficult object is neither.

    Args:
        matches: Image, overlap and index of the best matching object of each detection, highest score first.
        objects: Maps the name of each image to its objects.
        threshold: The overlap that a hit must exceed.
    """
    hits, misses = np.zeros(len(matches)), np.zeros(len(matches))
    taken = set()
    for i, (image, overlap, index) in enumerate(matches):
        if overlap <= threshold:
            misses[i] = 1
        elif not objects[image].difficult[index]:
            (misses if (image, index) in taken else hits)[i] = 1
            taken.add((image, index))
    return hits.cumsum(), misses.cumsum()
