"""The part of a comparison that is about detectors; ``classification`` has the same names for image classifiers."""

import os
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.data.datasets.coco import convert_to_coco_json
from detectron2.evaluation import COCOEvaluator, DatasetEvaluators
from detectron2.structures import Instances

from kd_det.analysis.runs import Run
from kd_det.data import DetectionMapper
from kd_det.data.voc_evaluator import VocEvaluator
from kd_det.engine.pictures import draw_detections, save

Mapper = DetectionMapper


class VOCMetric(VocEvaluator):
    """The metric of PASCAL VOC under a name of its own, beside COCO's."""

    def evaluate(self) -> dict[str, Any]:
        return {"voc": super().evaluate()["bbox"]}


def evaluate(runs: list[Run], dataset: str, records: list[dict]) -> list[dict[str, float]]:
    """COCO AP of boxes and masks, over all classes and per class, and where the data set is a VOC one also VOC AP."""
    masks = has_masks(records)
    with tempfile.TemporaryDirectory() as folder:
        coco_name = coco_version(dataset, folder)
        return [evaluate_run(run, dataset, coco_name, masks) for run in runs]


def evaluate_run(run: Run, dataset: str, coco_name: str, masks: bool) -> dict[str, float]:
    """The metrics of one run; `coco_name` is what COCOEvaluator is told, `masks` whether the data set has them."""
    tasks = ("bbox", "segm") if masks and run.cfg.MODEL.MASK_ON else ("bbox",)
    evaluators = [COCOEvaluator(coco_name, tasks=tasks, distributed=False)]
    if MetadataCatalog.get(dataset).evaluator_type == "pascal_voc":
        evaluators.append(VOCMetric(dataset))
    found = run.evaluate(dataset, DatasetEvaluators(evaluators))
    keys = ("AP", "AP50", "AP75")
    # NaN stands for a detector that finds nothing.
    metrics = {f"{task} {key}": float(np.nan_to_num(found[task][key])) for task in found for key in keys}
    for task in tasks:
        metrics |= {f"{task} {key}": value for key, value in found[task].items() if key.startswith("AP-")}
    return metrics


def has_masks(records: list[dict]) -> bool:
    """Whether every object has a mask."""
    return all("segmentation" in annotation for image in records for annotation in image["annotations"])


def coco_version(dataset: str, folder: str) -> str:
    """Name under which COCOEvaluator finds a data set's annotations; other formats are converted into `folder`."""
    metadata = MetadataCatalog.get(dataset)
    if "json_file" in metadata.as_dict():
        return dataset
    path = os.path.join(folder, "coco.json")
    convert_to_coco_json(dataset, path, allow_cached=False)
    MetadataCatalog.get(path).set(json_file=path, thing_classes=metadata.thing_classes)
    return path


def draw(
    images: list[dict], dataset: str, predictions: Mapping[str, Sequence[Instances]], threshold: float, path: str
) -> None:
    """Write the picture: every run's instances of at least a score on the same images."""
    save(draw_detections(images, MetadataCatalog.get(dataset).thing_classes, predictions, threshold), path)
