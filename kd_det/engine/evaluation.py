"""What an evaluation needs: the evaluator of a data set, and one model in all processes."""

import os
from collections.abc import Sequence

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator
from detectron2.utils import comm
from torch import nn

from kd_det.classification.evaluator import ClassificationEvaluator
from kd_det.data.voc_evaluator import VocEvaluator
from kd_det.errors import InputError


def build_evaluator(cfg: CfgNode, dataset_name: str, *, tasks: Sequence[str] | None = None) -> DatasetEvaluator:
    """Build the evaluator that a data set's metadata names: COCO AP, PASCAL VOC mAP, or accuracy.

    Args:
        tasks: Of COCO's "bbox", "segm", "keypoints" those to evaluate; None: all that the model predicts.

    Raises:
        InputError: If the data set has no evaluator.
    """
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type", None)
    if kind == "coco":
        return COCOEvaluator(dataset_name, tasks=tasks, output_dir=os.path.join(cfg.OUTPUT_DIR, "inference"))
    if kind == "pascal_voc":
        return VocEvaluator(dataset_name)
    if kind == "classification":
        return ClassificationEvaluator(dataset_name)
    raise InputError(
        f"DATASETS.TEST: {dataset_name} cannot be evaluated: its evaluator_type is {kind!r}; "
        "allowed are coco, pascal_voc, classification."
    )


def share_buffers(model: nn.Module) -> None:
    """Give all processes the main one's buffers: what is evaluated is what is saved.

    Each process of a training has running statistics of its own in its batch norms.
    """
    if comm.get_world_size() > 1:
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, src=0)
