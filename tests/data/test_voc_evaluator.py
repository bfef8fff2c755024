"""The metric of Pascal VOC: Detectron2's to the last digit, and right where Detectron2's is not."""

import logging
import math

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.data.datasets import register_pascal_voc
from detectron2.evaluation import PascalVOCDetectionEvaluator
from detectron2.structures import Boxes, Instances

from kd_det.data import register_datasets
from kd_det.data.shapes import CLASSES
from kd_det.data.voc_evaluator import VocEvaluator
from kd_det.errors import InputError

both_years = pytest.mark.parametrize("year", [2007, 2012])


def make_instances(boxes, scores, classes):
    found = Instances((128, 128))
    found.pred_boxes = Boxes(torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    found.scores = torch.as_tensor(scores, dtype=torch.float32)
    found.pred_classes = torch.as_tensor(classes, dtype=torch.int64)
    return {"instances": found}


def perfect(record):
    things = record["annotations"]
    boxes, classes = [thing["bbox"] for thing in things], [thing["category_id"] for thing in things]
    return make_instances(boxes, [0.9] * len(things), classes)


def evaluate(evaluator, records, predict=perfect):
    evaluator.reset()
    for record in records:
        evaluator.process([record], [predict(record)])
    return evaluator.evaluate()["bbox"]


def register(cfg, root, classes, **entry):
    cfg.DATASETS.VOC_FORMAT["mine"] = CfgNode({"ROOT": str(root), "CLASSES": list(classes), **entry})
    register_datasets(cfg)
    return DatasetCatalog.get("mine")


def write_folder(root, images):
    """Annotations of images of 20 x 10 pixels, name to XML of the objects; the images themselves are empty files."""
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / folder).mkdir(parents=True)
    (root / "ImageSets/Main/test.txt").write_text("\n".join(images))
    size = "<size><width>20</width><height>10</height></size>"
    for name, things in images.items():
        (root / f"JPEGImages/{name}.jpg").touch()
        (root / f"Annotations/{name}.xml").write_text(f"<annotation>{size}{things}</annotation>")


def thing(name, box, tags=""):
    sides = "".join(f"<{side}>{x}</{side}>" for side, x in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
    return f"<object><name>{name}</name>{tags}<bndbox>{sides}</bndbox></object>"


@both_years
def test_is_detectron2s_to_the_last_digit(cfg, shapes_root, year, tmp_path):
    """Of well-formed annotations, some difficult, and detections that hit, miss, repeat each other and tie."""
    root = tmp_path / "shapes"
    (root / "Annotations").mkdir(parents=True)
    for folder in ("ImageSets", "JPEGImages"):
        (root / folder).symlink_to(shapes_root / folder)
    for i, path in enumerate(sorted((shapes_root / "Annotations").glob("*.xml"))):
        text = path.read_text()
        (root / "Annotations" / path.name).write_text(text.replace("<difficult>0", f"<difficult>{int(i % 4 == 0)}", 1))
    records = register(cfg, root, CLASSES, SPLIT="test", YEAR=year)
    rng = np.random.default_rng(0)
    outputs = {}
    for record in records:
        boxes = np.array([x["bbox"] for x in record["annotations"]]).repeat(4, axis=0)
        classes = np.array([x["category_id"] for x in record["annotations"]]).repeat(4)
        classes = np.where(rng.random(len(classes)) < 0.2, rng.integers(0, len(CLASSES), len(classes)), classes)
        boxes = boxes + rng.normal(0, 3, boxes.shape)
        outputs[record["image_id"]] = make_instances(boxes, rng.random(len(boxes)).round(1), classes)
    results = [
        evaluate(kind("mine"), records, lambda record: outputs[record["image_id"]])
        for kind in (VocEvaluator, PascalVOCDetectionEvaluator)
    ]
    assert results[0] == results[1]
    assert 10 < results[0]["AP"] < 90


@both_years
def test_classes_without_objects(cfg, tmp_path, year, caplog):
    """They are left out of the mean and named, also if only difficult objects are theirs, or detections."""
    difficult = thing("cow", [11, 1, 20, 10], "<difficult>1</difficult>")
    write_folder(tmp_path, {"1": thing("cat", [2, 3, 9, 9]) + difficult, "2": ""})
    records = register(cfg, tmp_path, ["cat", "dog", "cow"], SPLIT="test", YEAR=year)
    evaluator = VocEvaluator("mine")
    with caplog.at_level(logging.WARNING):
        assert evaluate(evaluator, records)["AP"] == pytest.approx(100)
    assert "mine has no object of dog, cow: the AP is the mean over the other classes." in caplog.text

    def with_a_false_dog(record):
        boxes = [x["bbox"] for x in record["annotations"]] + [[0, 0, 5, 5]]
        classes = [x["category_id"] for x in record["annotations"]] + [1]
        return make_instances(boxes, [0.9] * len(boxes), classes)

    assert evaluate(evaluator, records, with_a_false_dog)["AP"] == pytest.approx(100)


@pytest.mark.filterwarnings("error")
def test_no_object_at_all(cfg, tmp_path):
    write_folder(tmp_path, {"1": ""})
    records = register(cfg, tmp_path, ["cat"], SPLIT="test")
    assert all(math.isnan(value) for value in evaluate(VocEvaluator("mine"), records).values())


@both_years
def test_what_detectron2_cannot_read(cfg, tmp_path, year):
    fractional = thing("cat", [2.4, 3, 9, 9.7], "<truncated>0.0597</truncated>") + thing(" cat ", [11, 1, 20, 10])
    write_folder(tmp_path, {"IMG 1": fractional, "2": thing("cat", [1, 1, 5, 5])})
    records = register(cfg, tmp_path, ["cat"], SPLIT="test", YEAR=year)
    assert evaluate(VocEvaluator("mine"), records)["AP"] == pytest.approx(100)


def test_data_sets_that_detectron2_registers(cfg, tmp_path):
    """Such as voc_2012_val, which has fractional boxes, too."""
    write_folder(tmp_path, {"1": thing("cat", [2.4, 3, 9, 9.7]), "2": ""})
    register_pascal_voc("stock", str(tmp_path), "test", 2012, class_names=["cat"])
    assert evaluate(VocEvaluator("stock"), DatasetCatalog.get("stock"))["AP"] == pytest.approx(100)


def test_annotations_that_are_wrong(cfg, tmp_path):
    write_folder(tmp_path, {"1": thing("cat", [2, 3, 99, 9])})
    cfg.DATASETS.VOC_FORMAT["mine"] = CfgNode({"ROOT": str(tmp_path), "SPLIT": "test", "CLASSES": ["cat"]})
    register_datasets(cfg)
    with pytest.raises(InputError, match=r"Annotations/1.xml: the box \[2, 3, 99, 9\]"):
        VocEvaluator("mine").evaluate()
