"""The evaluators on registered data sets, with the ground truth as predictions."""

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, BoxMode, Instances, PolygonMasks

from kd_det.data import register_datasets
from kd_det.data.shapes import CLASSES
from kd_det.data.voc_evaluator import VocEvaluator


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
