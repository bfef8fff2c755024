"""Choice of the evaluator of a data set."""

import os

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator, PascalVOCDetectionEvaluator

from kd_det.errors import InputError


def build_evaluator(cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
    """Build the evaluator that a data set's metadata names: COCO AP, or PASCAL VOC mAP.

    Raises:
        InputError: If the data set has no evaluator.
    """
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type", None)
    if kind == "coco":
        return COCOEvaluator(dataset_name, output_dir=os.path.join(cfg.OUTPUT_DIR, "inference"))
    if kind == "pascal_voc":
        return PascalVOCDetectionEvaluator(dataset_name)
    raise InputError(
        f"DATASETS.TEST: {dataset_name} cannot be evaluated: its evaluator_type is {kind!r}, not coco or pascal_voc."
    )
