"""Prepares evaluations: builds evaluators, checks their metrics, and gives all processes the same model."""

import os
from collections.abc import Sequence

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from torch import nn

from kd_det.classification.evaluator import MAX_LISTED, ClassificationEvaluator
from kd_det.config import has_peers, student_config
from kd_det.config_kinds import show
from kd_det.data import CocoEvaluator, class_names
from kd_det.data.coco_evaluator import distinct
from kd_det.data.coco_masks import are_numbers
from kd_det.data.voc_evaluator import VocEvaluator
from kd_det.errors import InputError
from kd_det.peers import load_peer_configs

KINDS = ("coco", "pascal_voc", "classification")
# Maps each task to the metrics of Detectron2's evaluators, apart from the AP of each class.
SIZES = ("AP", "AP50", "AP75", "APs", "APm", "APl")
METRICS = {
    "bbox": SIZES,
    "segm": SIZES,
    "keypoints": ("AP", "AP50", "AP75", "APm", "APl"),
    "box_proposals": tuple(f"AR{size}@{count}" for count in (100, 1000) for size in ("", "s", "m", "l")),
}
# Maps Detectron2's detectors to their tasks; R-CNNs have more with MODEL.MASK_ON and MODEL.KEYPOINT_ON.
TASKS = {
    "GeneralizedRCNN": ["bbox"],
    "PanopticFPN": ["bbox"],
    "RetinaNet": ["bbox"],
    "FCOS": ["bbox"],
    "ProposalNetwork": ["box_proposals"],
}
SHOWN = 12


def build_evaluator(cfg: CfgNode, dataset_name: str, *, tasks: Sequence[str] | None = None) -> DatasetEvaluator:
    """Builds the evaluator that a data set's metadata names: COCO AP, Pascal VOC mAP or accuracy.

    Args:
        tasks: Tasks to evaluate, from COCO's "bbox", "segm" and "keypoints"; None means all that the model predicts.

    Raises:
        InputError: If the data set has no evaluator.
    """
    kind = check_evaluator(dataset_name)
    if kind == "coco":
        return CocoEvaluator(
            dataset_name,
            masks=cfg.MODEL.MASK_ON if tasks is None else "segm" in tasks,
            tasks=tasks,
            output_dir=os.path.join(cfg.OUTPUT_DIR, "inference"),
            kpt_oks_sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS,
        )
    if kind == "pascal_voc":
        return VocEvaluator(dataset_name)
    return ClassificationEvaluator(dataset_name)


def check_evaluator(dataset_name: str) -> str:
    """Returns the kind of evaluator that a data set's metadata names.

    Raises:
        InputError: If it is not one of :data:`KINDS`.
    """
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type", None)
    if kind not in KINDS:
        raise InputError(
            f"DATASETS.TEST: {dataset_name} cannot be evaluated: its evaluator_type is {kind!r}; "
            f"allowed are {', '.join(KINDS)}."
        )
    return kind


def check_evaluation(cfg: CfgNode) -> None:
    """Checks that every data set of DATASETS.TEST can be evaluated and yields the metrics that TEST names.

    Raises:
        InputError: If a data set has no evaluator, or the evaluation does not yield a metric.
    """
    architecture = student_config(cfg).MODEL.META_ARCHITECTURE
    for name in cfg.DATASETS.TEST:
        if check_evaluator(name) == "pascal_voc" and "bbox" not in TASKS.get(architecture, ["bbox"]):
            raise InputError(
                f"DATASETS.TEST: {name} cannot be evaluated: {architecture} predicts no classes, whose AP is the "
                "metric of pascal_voc; COCO's format has metrics for proposals."
            )
    if cfg.TEST.BEST_METRIC:
        _check_metric(cfg, "TEST.BEST_METRIC", cfg.TEST.BEST_METRIC)
    for expected in cfg.TEST.EXPECTED_RESULTS:
        if list(map(type, expected[:2])) != [str, str] or not are_numbers(list(expected[2:])) or len(expected) != 4:
            raise InputError(
                f"TEST.EXPECTED_RESULTS: each must be [task, metric, value, tolerance], got {show(expected)}."
            )
        _check_metric(cfg, "TEST.EXPECTED_RESULTS", "/".join(expected[:2]))


def _check_metric(cfg: CfgNode, key: str, metric: str) -> None:
    names = metric_names(cfg) if cfg.DATASETS.TEST else []
    if names and metric not in names:
        more = f", ... ({len(names)} in all)" if len(names) > SHOWN else ""
        raise InputError(f"{key}: got {metric!r}; the evaluation gives {', '.join(names[:SHOWN])}{more}.")


def metric_names(cfg: CfgNode) -> list[str]:
    """Returns the names of all metrics of a run's evaluation; [] if its architecture comes from a plugin."""
    students = load_peer_configs(cfg) if has_peers(cfg) else [student_config(cfg)]
    metrics = [_student_metrics(student) for student in students]
    if not all(metrics):
        return []
    averaged = [f"ema/{name}" for name in metrics[0]] if cfg.SOLVER.EMA_DECAY else []
    return [*metrics[0], *averaged, *(f"peer_{i}/{name}" for i, names in enumerate(metrics[1:], 2) for name in names)]


def _student_metrics(cfg: CfgNode) -> list[str]:
    by_dataset = {name: _dataset_metrics(cfg, name) for name in cfg.DATASETS.TEST}
    if len(by_dataset) == 1:
        return next(iter(by_dataset.values()))
    return [f"{name}/{metric}" for name, metrics in by_dataset.items() for metric in metrics]


def _dataset_metrics(cfg: CfgNode, name: str) -> list[str]:
    kind, classes = check_evaluator(name), class_names(name)
    if kind == "classification":
        return _classification_metrics(cfg.MODEL.CLASSIFIER.NUM_CLASSES, classes)
    tasks = list(TASKS.get(cfg.MODEL.META_ARCHITECTURE, ()))
    if kind == "pascal_voc":
        return [f"bbox/{metric}" for metric in ("AP", "AP50", "AP75")] if tasks else []
    if cfg.MODEL.META_ARCHITECTURE in ("GeneralizedRCNN", "PanopticFPN"):
        tasks += [task for task, key in (("segm", "MASK_ON"), ("keypoints", "KEYPOINT_ON")) if cfg.MODEL[key]]
    per_class = [f"AP-{name}" for name in distinct(classes)] if len(classes) > 1 else []
    names = {task: [*METRICS[task], *(per_class if task != "box_proposals" else ())] for task in tasks}
    return [f"{task}/{metric}" for task, metrics in names.items() for metric in metrics]


def _classification_metrics(count: int, classes: Sequence[str]) -> list[str]:
    names = dict(enumerate(classes))
    per_class = [f"top1-{names.get(index, index)}" for index in range(count)] if count <= MAX_LISTED else []
    return [f"classification/{name}" for name in ("top1", *(["top5"] if count > 5 else []), "error", *per_class)]


def share_buffers(model: nn.Module) -> None:
    """Copies the main process's buffers to all processes, so that the evaluated model is the one that is saved.

    During training the batch norms of each process have their own running statistics.
    """
    if comm.get_world_size() > 1:
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, src=0)
