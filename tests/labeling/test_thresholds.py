"""Tests thresholds and the quality of labels against numbers that were counted by hand."""

import logging

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances

from kd_det import InputError
from kd_det.labeling.thresholds import Validation, choose_thresholds, keep, parse_thresholds, validate

CLASSES = ("cat", "dog", "owl")
PLACES = [(0, 0, 20, 20), (30, 0, 50, 20), (60, 0, 80, 20), (0, 30, 20, 50), (30, 30, 50, 50)]


def record(number, *objects):
    """An image with objects: class and place."""
    boxes = [
        {"bbox": list(PLACES[place]), "bbox_mode": BoxMode.XYXY_ABS, "category_id": category}
        for category, place in objects
    ]
    return {"file_name": f"{number}.png", "image_id": number, "height": 60, "width": 90, "annotations": boxes}


def detections(*found):
    """Detections: class, place and score."""
    instances = Instances((60, 90))
    instances.pred_boxes = Boxes(torch.tensor([PLACES[place] for _, place, _ in found]).float().reshape(-1, 4))
    instances.pred_classes = torch.tensor([category for category, _, _ in found], dtype=torch.int64)
    instances.scores = torch.tensor([score for _, _, score in found])
    return instances


# Cats: hits at 0.75 and 0.5, a false one at 0.625, one object is missed. Dogs: a hit at 0.25 and none before it.
# Owls: no object, one false detection at 0.875.
IMAGES = [
    (record(1, (0, 0), (0, 1), (1, 2)), detections((0, 0, 0.75), (0, 1, 0.5), (0, 4, 0.625), (1, 2, 0.25))),
    (record(2, (0, 0)), detections((2, 3, 0.875))),
]


def test_each_class_has_the_threshold_of_its_best_f1(caplog):
    with caplog.at_level(logging.WARNING):
        thresholds = choose_thresholds(IMAGES, CLASSES)
    # Cats, F1 by threshold: 2 * 1 / (1 + 3) at 0.75, 2 / (2 + 3) at 0.625, 4 / (3 + 3) at 0.5. All classes together:
    # the best is 6 / (5 + 4) at 0.25, which owls get, too.
    assert thresholds == [0.5, 0.25, 0.25]
    assert "No object of owl is found" in caplog.text


def test_the_threshold_itself_is_kept():
    kept = keep(IMAGES[0][1], [0.625, 0.5, 0.0])
    assert kept.scores.tolist() == [0.75, 0.625]


def test_quality(request):
    DatasetCatalog.register("by_hand", lambda: [image for image, _ in IMAGES])
    MetadataCatalog.get("by_hand").set(thing_classes=list(CLASSES), evaluator_type="coco")
    request.addfinalizer(lambda: (DatasetCatalog.remove("by_hand"), MetadataCatalog.remove("by_hand")))
    found = validate(IMAGES, "by_hand", CLASSES, [0.5, 0.5, 0.5])
    cat, dog, owl = (found.classes[name] for name in CLASSES)
    assert (cat.objects, cat.precision, cat.recall, cat.f1) == pytest.approx((3, 200 / 3, 200 / 3, 200 / 3))
    assert (dog.objects, dog.precision, dog.recall, dog.f1) == (1, 0, 0, 0)
    assert (owl.objects, owl.precision, owl.recall, owl.f1) == (0, 0, 0, 0)
    # Cats: precision is 1 up to a recall of 1/3 and 2/3 up to 2/3, at 34 and 33 of 101 points; the dog is below its
    # threshold, and classes without objects do not count.
    assert found.ap50 == pytest.approx(100 * (34 + 33 * 2 / 3) / 101 / 2)
    assert Validation.from_dict(found.as_dict()) == found


def test_given_thresholds():
    assert parse_thresholds([], CLASSES) is None
    assert parse_thresholds(["0.5", "dog=0.25"], CLASSES) == [0.5, 0.25, 0.5]
    assert parse_thresholds(["a=b=1"], ["a=b"]) == [1.0]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["high"], "must be a score from 0 to 1, or CLASS=SCORE, got 'high'"),
        (["cat=1.5", "0.5"], "must be a score from 0 to 1, or CLASS=SCORE, got 'cat=1.5'"),
        (["nan"], "must be a score"),
        (["cow=0.5"], "'cow' in 'cow=0.5' is not a class; there are cat, dog, owl"),
        (["cat=0.5", "owl=0.5"], "none is given for dog"),
    ],
)
def test_wrong_thresholds(texts, message):
    with pytest.raises(InputError, match=f"^--threshold: {message}"):
        parse_thresholds(texts, CLASSES)
