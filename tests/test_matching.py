"""Tests hits, false detections, misses and the best F1, by hand and against a plain search."""

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, BoxMode, Instances

from kd_det.engine.matching import OperatingPoint, match, operating_point

SQUARE, FAR = (0, 0, 10, 10), (50, 50, 60, 60)


def objects(*boxes, classes=None, crowds=()):
    """Annotations with boxes (x0, y0, x1, y1), of class 0 if none are given."""
    classes = classes or [0] * len(boxes)
    return [
        {"bbox": list(box), "bbox_mode": BoxMode.XYXY_ABS, "category_id": number, "iscrowd": int(i in crowds)}
        for i, (box, number) in enumerate(zip(boxes, classes, strict=True))
    ]


def detections(*found):
    """Detections from (box, score, class), or from (box, score) of class 0."""
    instances = Instances((100, 100))
    instances.pred_boxes = Boxes(torch.tensor([box for box, *_ in found], dtype=torch.float32).reshape(-1, 4))
    instances.scores = torch.tensor([score for _, score, *_ in found], dtype=torch.float64)
    instances.pred_classes = torch.tensor([sum(number) for _, _, *number in found], dtype=torch.int64)
    return instances


def outcome(annotations, found, threshold=0.0):
    """Hits, false detections and missed objects of one image, as lists of booleans."""
    (matches,) = match([(annotations, found)])
    result = matches.at(threshold)
    return result.hits.tolist(), result.false.tolist(), result.missed.tolist()


def test_highest_score_matches_an_object_once():
    assert outcome(objects(SQUARE), detections((SQUARE, 0.5), (SQUARE, 0.9))) == ([False, True], [True, False], [False])


def test_detection_matches_the_object_with_the_largest_overlap():
    """The first one overlaps the second object less, so the second detection finds that object."""
    near, between = (2, 0, 12, 10), (0.5, 0, 10.5, 10)
    found = detections((between, 0.9), (near, 0.8))
    assert outcome(objects(near, SQUARE), found) == ([True, True], [False, False], [False, False])


def test_wrong_class_or_small_overlap_is_a_false_detection():
    half = (0, 0, 10, 4.9)
    assert outcome(objects(SQUARE), detections((SQUARE, 0.9, 1), (half, 0.8))) == ([False] * 2, [True] * 2, [True])
    assert outcome(objects(SQUARE), detections(((0, 0, 10, 5), 0.8))) == ([True], [False], [False])


def test_detections_below_the_threshold_do_not_count():
    found = detections((SQUARE, 0.9), (FAR, 0.4), ((20, 20, 30, 30), 0.3))
    annotations = objects(SQUARE, FAR)
    assert outcome(annotations, found, 0.4) == ([True, True, False], [False] * 3, [False, False])
    assert outcome(annotations, found, 0.41) == ([True, False, False], [False] * 3, [False, True])


def test_crowds_are_neither_missed_nor_hit():
    found = detections(((40, 40, 45, 45), 0.9), ((42, 42, 48, 48), 0.8), (SQUARE, 0.7))
    annotations = objects((30, 30, 80, 80), SQUARE, crowds=[0])
    assert outcome(annotations, found) == ([False, False, True], [False] * 3, [False, False])
    assert operating_point(match([(annotations, found)])) == OperatingPoint(0.7, 1.0)


def test_unlabelled_classes_are_ignored():
    images = [(objects(SQUARE), detections((FAR, 0.9, 1), (SQUARE, 0.8), (FAR, 0.7, 2)))]
    (matches,) = match(images, classes=1)
    assert matches.at(0).hits.tolist() == [False, True, False]
    assert not matches.at(0).false.any()
    assert operating_point([matches]) == OperatingPoint(0.8, 1.0)


def test_matches_are_split_by_image():
    images = [
        (objects(SQUARE), detections((FAR, 0.6))),
        ([], detections()),
        (objects(FAR, SQUARE), detections((SQUARE, 0.7), (FAR, 0.8))),
    ]
    first, empty, last = (x.at(0) for x in match(images))
    assert (first.false.tolist(), first.missed.tolist()) == ([True], [True])
    assert len(empty.hits) == len(empty.missed) == 0
    assert (last.hits.tolist(), last.missed.tolist()) == ([True, True], [False, False])


def test_best_f1_computed_by_hand():
    """Of three objects: after 0.9 F1 is 2 * 1 / (1 + 3), after 0.8 2 / (2 + 3), after 0.7 4 / (3 + 3), then 4 / 7."""
    annotations = objects(SQUARE, FAR, (20, 0, 30, 10))
    found = detections((SQUARE, 0.9), ((80, 0, 90, 10), 0.8), (FAR, 0.7), ((80, 80, 90, 90), 0.6))
    matches = match([(annotations, found)])
    assert operating_point(matches) == OperatingPoint(0.7, pytest.approx(2 / 3))
    assert operating_point(matches, 0.85) == OperatingPoint(0.85, pytest.approx(0.5))
    assert operating_point(matches, 0.95) == OperatingPoint(0.95, 0.0)


def test_equal_scores_count_together():
    """No threshold shows the hit without the false detection."""
    found = detections((SQUARE, 0.5), (FAR, 0.5))
    assert operating_point(match([(objects(SQUARE), found)])) == OperatingPoint(0.5, pytest.approx(2 / 3))


def test_highest_threshold_of_equal_f1_is_chosen():
    """Both 2 / (1 + 2) and 4 / (4 + 2) are 2 / 3."""
    found = detections((SQUARE, 0.9), ((80, 0, 90, 10), 0.8), ((80, 80, 90, 90), 0.7), (FAR, 0.6))
    assert operating_point(match([(objects(SQUARE, FAR), found)])).threshold == 0.9


@pytest.mark.parametrize(
    ("annotations", "found", "threshold"),
    [
        (objects(SQUARE), detections(), 1.0),
        ([], detections(), 1.0),
        ([], detections((SQUARE, 0.3)), 0.3),
        (objects(SQUARE), detections((FAR, 0.3), (FAR, 0.2)), 0.3),
    ],
)
def test_without_a_hit_f1_is_zero(annotations, found, threshold):
    assert operating_point(match([(annotations, found)])) == OperatingPoint(threshold, 0.0)


def scene(rng, *, perfect: bool = False):
    """Random objects of three classes, and detections near them with scores of two digits, or of just these boxes."""
    boxes = [(x, y, x + w, y + h) for x, y, w, h in rng.integers(1, 40, (rng.integers(0, 8), 4)).tolist()]
    classes = rng.integers(0, 3, len(boxes)).tolist()
    if perfect:
        found = [(box, rng.uniform(0.2, 1), number) for box, number in zip(boxes, classes, strict=True)]
        return objects(*boxes, classes=classes), detections(*found)
    found = [
        (np.add(box, rng.integers(-4, 5, 4)).tolist(), float(rng.integers(1, 100)) / 100, int(rng.integers(0, 3)))
        for box in boxes * 2
    ]
    found = [((x, y, max(x + 1, u), max(y + 1, v)), *rest) for (x, y, u, v), *rest in found]
    return objects(*boxes, classes=classes, crowds=[0]), detections(*found)


def test_perfect_detections_are_hits_only():
    rng = np.random.default_rng(0)
    images = [scene(rng, perfect=True) for _ in range(10)]
    matches = match(images)
    point = operating_point(matches)
    assert point == OperatingPoint(min(found.scores.min().item() for _, found in images if len(found)), 1.0)
    for (annotations, _), image in zip(images, matches, strict=True):
        result = image.at(point.threshold)
        assert result.hits.tolist() == [True] * len(annotations)
        assert not result.false.any()
        assert not result.missed.any()


@pytest.mark.parametrize("seed", range(5))
def test_best_f1_equals_that_of_a_search_over_all_thresholds(seed):
    """For each threshold the detections above it are matched anew, as if there were no others."""
    rng = np.random.default_rng(seed)
    images = [scene(rng) for _ in range(8)]
    tried = {}
    for threshold in sorted({score for _, found in images for score in found.scores.tolist()}, reverse=True):
        outcomes = [x.at(0) for x in match([(truth, found[found.scores >= threshold]) for truth, found in images])]
        hits, false, missed = (sum(getattr(x, name).sum() for x in outcomes) for name in ("hits", "false", "missed"))
        tried[threshold] = 2 * hits / (2 * hits + false + missed)
    point = operating_point(match(images))
    assert point.f1 == pytest.approx(max(tried.values()))
    assert point.f1 > 0
    assert point.threshold == next(score for score, f1 in tried.items() if f1 == pytest.approx(point.f1))
