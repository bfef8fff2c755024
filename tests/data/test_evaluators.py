"""Evaluators on registered data sets, with the ground truth as predictions."""

import json

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, BoxMode, Instances, PolygonMasks
from helpers import tiny_cfg, write_coco_folder

from kd_det.data import CocoEvaluator, register_datasets
from kd_det.data.shapes import CLASSES
from kd_det.data.voc_evaluator import VocEvaluator
from kd_det.engine.evaluation import build_evaluator

from .coco_mutations import define, forget, perfect_detections, use, write


def evaluate(evaluator, name):
    evaluator.reset()
    for record in DatasetCatalog.get(name):
        things = record["annotations"]
        size = (record["height"], record["width"])
        instances = Instances(size)
        boxes = [BoxMode.convert(t["bbox"], t["bbox_mode"], BoxMode.XYXY_ABS) for t in things]
        instances.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
        instances.scores = torch.ones(len(things))
        instances.pred_classes = torch.tensor([t["category_id"] for t in things], dtype=torch.int64)
        if things and "segmentation" in things[0]:
            polygons = PolygonMasks([t["segmentation"] for t in things])
            masks = [
                polygons[i].crop_and_resize(torch.tensor([[0, 0, size[1], size[0]]]), size[0])
                for i in range(len(things))
            ]
            instances.pred_masks = torch.cat(masks)
        evaluator.process([record], [{"instances": instances}])
    return evaluator.evaluate()


def test_coco(cfg, shapes_root):
    entry = {"JSON": str(shapes_root / "coco/instances_test.json"), "IMAGE_ROOT": str(shapes_root / "JPEGImages")}
    cfg.DATASETS.COCO_FORMAT["mine"] = CfgNode(entry)
    register_datasets(cfg)
    results = evaluate(COCOEvaluator("mine", distributed=False), "mine")
    assert results["bbox"]["AP"] == pytest.approx(100, abs=0.1)
    assert results["segm"]["AP"] == pytest.approx(100, abs=0.1)
    assert {f"AP-{name}" for name in CLASSES} <= set(results["bbox"])


@pytest.mark.parametrize("year", [2007, 2012])
def test_voc(cfg, shapes_root, year):
    entry = {"ROOT": str(shapes_root), "SPLIT": "test", "CLASSES": list(CLASSES), "YEAR": year}
    cfg.DATASETS.VOC_FORMAT["mine"] = CfgNode(entry)
    register_datasets(cfg)
    results = evaluate(VocEvaluator("mine"), "mine")
    assert results["bbox"]["AP"] == pytest.approx(100, abs=0.1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_coco_folder(tmp_path_factory.mktemp("evaluators") / "data")


@pytest.fixture
def data(folder):
    return json.loads((folder / "instances.json").read_text())


@pytest.fixture
def coco(folder, tmp_path):
    """Registers a COCO file's content for a tiny detector; gives the config and the name."""
    names = []

    def coco(data, **options):
        cfg = tiny_cfg(options={"MODEL.MASK_ON": False, "OUTPUT_DIR": str(tmp_path)} | options)
        names.append(define(cfg, write(tmp_path / f"{len(names)}.json", data), folder / "images"))
        return cfg, names[-1]

    yield coco
    for name in names:
        forget(name)


def count_from_0(data):
    for i, annotation in enumerate(data["annotations"]):
        annotation["id"] = i


def count_from_0_with_one_object(data):
    del data["annotations"][1:]
    count_from_0(data)


def name_ids(data):
    for items in data.values():
        for item in items:
            item |= {key: f"x{value}" for key, value in item.items() if key.endswith("id")}


def set_areas(*areas):
    def change(data):
        for annotation, area in zip(data["annotations"], areas * 8, strict=False):
            annotation["area"] = area

    return change


def remove(field):
    def change(data):
        for annotation in data["annotations"]:
            del annotation[field]

    return change


@pytest.mark.parametrize(
    "change",
    [
        count_from_0,
        count_from_0_with_one_object,
        name_ids,
        set_areas(None, "12", [3], float("nan"), -1, 1e11, True),
        remove("area"),
        remove("iscrowd"),
        remove("segmentation"),
    ],
)
def test_perfect_detections_of_an_incomplete_file(coco, data, change):
    change(data)
    results = use(*coco(data))
    assert results["bbox"]["AP"] == pytest.approx(100)


def test_two_classes_of_one_name(coco, data):
    data["categories"][1]["name"] = "square"
    results = use(*coco(data))["bbox"]
    assert [results[f"AP-{name}"] for name in ("square (class 1)", "square (class 2)", "bar")] == pytest.approx(
        [100] * 3
    )


def test_area_of_a_mask(coco, data):
    """A triangle is half of its box."""
    annotation = data["annotations"][0]
    del annotation["area"]
    annotation["segmentation"] = [[4, 6, 28, 6, 28, 30]]
    cfg, name = coco(data)
    DatasetCatalog.get(name)
    areas = [item["area"] for item in build_evaluator(cfg, name)._coco_api.dataset["annotations"]]
    assert areas == [24 * 24 / 2, *(item["area"] for item in data["annotations"][1:])]


def test_a_complete_file_has_the_results_of_the_stock_evaluator(coco, data):
    """To the digit, with detections that are not perfect."""
    cfg, name = coco(data, **{"MODEL.MASK_ON": True})
    results = []
    records = DatasetCatalog.get(name)
    for evaluator in (COCOEvaluator(name, distributed=False), build_evaluator(cfg, name)):
        evaluator.reset()
        for i, record in enumerate(records):
            found = perfect_detections(record, masks=True)
            found.pred_boxes.tensor += i
            found.pred_classes[0] = 0
            evaluator.process([record], [{"instances": found}])
        results.append(evaluator.evaluate())
    assert results[0]["bbox"]["AP"] < 90
    assert [str(result) for result in results[1:]] == [str(results[0])]


def test_a_model_of_more_classes_than_the_test_set(coco, data):
    cfg, name = coco(data)
    records = DatasetCatalog.get(name)
    evaluator = build_evaluator(cfg, name)
    evaluator.reset()
    for record in records:
        found = perfect_detections(record)
        others = perfect_detections(record)
        others.pred_classes += 70
        others.scores += 0.05
        evaluator.process([record], [{"instances": Instances.cat([others, found])}])
    assert evaluator.evaluate()["bbox"]["AP"] == pytest.approx(100)


def test_objects_without_mask_are_neither_found_nor_missed(coco, data):
    """Nor is a crowd without one."""
    data["annotations"][0]["segmentation"] = [[4, 6, 28, 30]]
    data["annotations"][3] |= {"segmentation": [], "iscrowd": 1}
    results = use(*coco(data, **{"MODEL.MASK_ON": True}))
    assert results["bbox"]["AP"] == results["segm"]["AP"] == pytest.approx(100)


def test_a_data_set_that_a_plugin_registers(folder, data, tmp_path):
    count_from_0(data)
    remove("area")(data)
    remove("iscrowd")(data)
    register_coco_instances("theirs", {}, str(write(tmp_path / "a.json", data)), str(folder / "images"))
    try:
        results = evaluate(CocoEvaluator("theirs", masks=False, distributed=False), "theirs")
    finally:
        forget("theirs")
    assert results["bbox"]["AP"] == pytest.approx(100)
