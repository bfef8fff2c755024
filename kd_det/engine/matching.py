"""Matches detections to objects one to one at one IoU, as COCO does, and finds the threshold of the best F1."""

import contextlib
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from detectron2.structures import BoxMode, Instances
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval


@dataclass(frozen=True)
class Outcome:
    """Holds the outcome for one image's detections and objects at a score threshold.

    Attributes:
        hits: Whether each detection is shown and matches an object, (D,).
        false: Whether each detection is shown and matches nothing, (D,). Ignored detections are neither.
        missed: Whether each object is matched by no shown detection, (G,). Crowds never are.
    """

    hits: np.ndarray
    false: np.ndarray
    missed: np.ndarray


@dataclass(frozen=True)
class Matches:
    """Holds the matching of one image's detections to its objects, for all score thresholds.

    Detections choose their objects in descending order of score, so leaving out low scores does not affect the others.

    Attributes:
        scores: Score of each detection, (D,).
        hits: Whether each detection matches an object, (D,).
        ignored: Whether each detection is neither right nor wrong, because it matches only a crowd or its class is not
            labelled, (D,).
        found_at: Score of the detection that matches each object, (G,); -inf without a match, inf for a crowd.
    """

    scores: np.ndarray
    hits: np.ndarray
    ignored: np.ndarray
    found_at: np.ndarray

    def at(self, threshold: float) -> Outcome:
        """Returns the outcome if detections with at least this score are shown."""
        shown = self.scores >= threshold
        return Outcome(shown & self.hits, shown & ~self.hits & ~self.ignored, self.found_at < threshold)


@dataclass(frozen=True)
class OperatingPoint:
    """Holds a score threshold and the F1, from 0 to 1, that a detector reaches with it."""

    threshold: float
    f1: float


def match(
    images: Sequence[tuple[Sequence[dict], Instances]], *, classes: int | None = None, iou: float = 0.5
) -> list[Matches]:
    """Matches each detection to at most one object of its class, as COCO's metric does.

    Args:
        images: Annotations (Detectron2's dicts) and detections of each image.
        classes: Number of labelled classes; detections of later classes are ignored. None means that all are labelled.
        iou: Minimum IoU of two boxes that match.
    """
    truth, predicted = COCO(), COCO()
    truth.dataset = _describe([_read_annotations(annotations) for annotations, _ in images])
    predicted.dataset = _describe([_read_instances(instances) for _, instances in images])
    objects, detections = truth.dataset["annotations"], predicted.dataset["annotations"]
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        predicted.createIndex()
        evaluation = COCOeval(truth, predicted, "bbox")
        evaluation.params.iouThrs = [iou]
        evaluation.params.areaRng = [[0, np.inf]]
        evaluation.params.maxDets = [len(detections)]
        evaluation.params.catIds = sorted({item["category_id"] for item in (*objects, *detections)})
        evaluation.evaluate()
    scores = np.array([item["score"] for item in detections], dtype=float)
    hits = np.zeros(len(detections), dtype=bool)
    ignored = np.array([classes is not None and item["category_id"] >= classes for item in detections], dtype=bool)
    found_at = np.array([np.inf if item["iscrowd"] else -np.inf for item in objects])
    for part in filter(None, evaluation.evalImgs):
        # Both kinds of ids count from 1; 0 stands for no match.
        indices = np.array(part["dtIds"], dtype=int) - 1
        ignored[indices] |= part["dtIgnore"][0]
        hits[indices] = (part["dtMatches"][0] > 0) & ~ignored[indices]
        for number, matched in zip(part["gtIds"], part["gtMatches"][0].astype(int), strict=True):
            if matched:
                found_at[number - 1] = max(found_at[number - 1], scores[matched - 1])
    by_detection = np.cumsum([len(instances) for _, instances in images])[:-1]
    by_object = np.cumsum([len(annotations) for annotations, _ in images])[:-1]
    parts = (np.split(values, by_detection) for values in (scores, hits, ignored))
    return [Matches(*part) for part in zip(*parts, np.split(found_at, by_object), strict=True)]


def operating_point(matches: Iterable[Matches], threshold: float | None = None) -> OperatingPoint:
    """Returns a threshold and a detector's F1 at it, over all images and classes together.

    F1 is the harmonic mean of precision and recall, and 0 without any hit.

    Args:
        matches: The matches of all images of a data set.
        threshold: Minimum score that counts. None chooses the threshold with the highest F1, and the highest threshold
            if several are equal; without any detection it is 1.
    """
    matches = list(matches)
    objects = sum(np.count_nonzero(image.found_at < np.inf) for image in matches)
    scores = np.concatenate([image.scores[~image.ignored] for image in matches])
    hits = np.concatenate([image.hits[~image.ignored] for image in matches])
    candidates = np.unique(scores)[::-1] if threshold is None else np.array([threshold])
    if not len(candidates):
        return OperatingPoint(1.0, 0.0)
    order = np.argsort(scores)
    left_out = np.searchsorted(scores[order], candidates)
    right = hits.sum() - np.append(0, np.cumsum(hits[order]))[left_out]
    f1 = 2 * right / np.maximum(len(scores) - left_out + objects, 1)
    best = f1.argmax()
    return OperatingPoint(float(candidates[best]), float(f1[best]))


def _describe(images: Sequence[Sequence[dict]]) -> dict:
    """Converts annotations to COCO's format: an image's index is its id, and annotation ids count from 1."""
    items = [item | {"image_id": index} for index, image in enumerate(images) for item in image]
    return {
        "images": [{"id": index} for index in range(len(images))],
        "categories": [{"id": number} for number in {item["category_id"] for item in items}],
        "annotations": [item | {"id": number} for number, item in enumerate(items, 1)],
    }


def _read_annotations(annotations: Sequence[dict]) -> list[dict]:
    boxes = [list(BoxMode.convert(item["bbox"], item["bbox_mode"], BoxMode.XYWH_ABS)) for item in annotations]
    return [
        {"bbox": box, "area": box[2] * box[3], "category_id": item["category_id"], "iscrowd": item.get("iscrowd", 0)}
        for box, item in zip(boxes, annotations, strict=True)
    ]


def _read_instances(instances: Instances) -> list[dict]:
    boxes = BoxMode.convert(instances.pred_boxes.tensor, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS).tolist()
    items = zip(boxes, instances.pred_classes.tolist(), instances.scores.tolist(), strict=True)
    return [
        {"bbox": box, "area": box[2] * box[3], "category_id": number, "score": score} for box, number, score in items
    ]
