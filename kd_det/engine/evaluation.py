"""Prepares evaluations: builds evaluators, checks their metrics, and gives all processes the same model."""

import importlib.util
import logging
import os
from collections.abc import Sequence

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOPanopticEvaluator, DatasetEvaluator, DatasetEvaluators
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from torch import nn

from kd_det.classification.evaluator import MAX_LISTED, ClassificationEvaluator
from kd_det.config import has_peers, student_config
from kd_det.config_kinds import show
from kd_det.data import CocoEvaluator, class_names
from kd_det.data.coco_evaluator import distinct
from kd_det.data.coco_masks import are_numbers
from kd_det.data.sem_seg_evaluator import SegmentationEvaluator
from kd_det.data.voc_evaluator import VocEvaluator
from kd_det.errors import InputError
from kd_det.peers import load_peer_configs

logger = logging.getLogger(__name__)
KINDS = ("coco", "pascal_voc", "classification")
# Kinds of data sets for models that segment all of an image.
SEGMENTED_KINDS = ("sem_seg", "coco_panoptic_seg")
# Maps each task to the metrics of Detectron2's evaluators, apart from the AP of each class.
SIZES = ("AP", "AP50", "AP75", "APs", "APm", "APl")
METRICS = {
    "bbox": SIZES,
    "segm": SIZES,
    "keypoints": ("AP", "AP50", "AP75", "APm", "APl"),
    "box_proposals": tuple(f"AR{size}@{count}" for count in (100, 1000) for size in ("", "s", "m", "l")),
    "sem_seg": ("mIoU", "fwIoU", "mACC", "pACC"),
    "panoptic_seg": tuple(f"{name}{part}" for part in ("", "_th", "_st") for name in ("PQ", "SQ", "RQ")),
}
# Metrics of single classes of a semantic segmentation.
OF_STUFF = ("IoU", "BoundaryIoU", "min(IoU, B-Iou)", "ACC")
# Maps Detectron2's detectors to their tasks; R-CNNs have more with MODEL.MASK_ON and MODEL.KEYPOINT_ON.
TASKS = {
    "GeneralizedRCNN": ["bbox"],
    "PanopticFPN": ["bbox"],
    "RetinaNet": ["bbox"],
    "FCOS": ["bbox"],
    "ProposalNetwork": ["box_proposals"],
    "SemanticSegmentor": [],
}
# Metadata of a data set that the evaluation of each task needs.
METADATA = {
    "sem_seg": ("stuff_classes", "ignore_label"),
    "panoptic_seg": (
        "panoptic_json",
        "panoptic_root",
        "thing_dataset_id_to_contiguous_id",
        "stuff_dataset_id_to_contiguous_id",
    ),
}
PANOPTIC_API = "panopticapi"
SHOWN = 12


def build_evaluator(cfg: CfgNode, dataset_name: str, *, tasks: Sequence[str] | None = None) -> DatasetEvaluator:
    """Builds the evaluator that a data set's metadata names.

    It computes COCO AP, Pascal VOC mAP, accuracy, the mean IoU of a semantic segmentation, or, for panoptic
    segmentation, COCO AP, the mean IoU and, if the package ``panopticapi`` is installed, the panoptic quality.

    Args:
        tasks: Tasks to evaluate, from "bbox", "segm", "keypoints", "sem_seg" and "panoptic_seg"; None means all that
            the model predicts.

    Raises:
        InputError: If the data set has no evaluator.
    """
    cfg = student_config(cfg)
    kind = check_evaluator(dataset_name, allowed_kinds(cfg))
    if kind == "pascal_voc":
        return VocEvaluator(dataset_name)
    if kind == "classification":
        return ClassificationEvaluator(dataset_name)
    folder = os.path.join(cfg.OUTPUT_DIR, "inference")
    evaluators: list[DatasetEvaluator] = []
    if kind != "sem_seg" and TASKS.get(cfg.MODEL.META_ARCHITECTURE, ["bbox"]):
        coco_tasks = None if tasks is None else tuple(task for task in tasks if task not in METADATA)
        evaluators.append(
            CocoEvaluator(
                dataset_name,
                masks=cfg.MODEL.MASK_ON if tasks is None else "segm" in tasks,
                tasks=coco_tasks,
                output_dir=folder,
                kpt_oks_sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS,
            )
        )
    segmented = [task for task in segmentation_tasks(cfg, kind) if tasks is None or task in tasks]
    if "sem_seg" in segmented:
        evaluators.append(SegmentationEvaluator(dataset_name, output_dir=folder))
    if "panoptic_seg" in segmented and has_panoptic_api():
        evaluators.append(COCOPanopticEvaluator(dataset_name, folder))
    return evaluators[0] if len(evaluators) == 1 else DatasetEvaluators(evaluators)


def check_evaluator(dataset_name: str, allowed: Sequence[str] = KINDS) -> str:
    """Returns the kind of evaluator that a data set's metadata names.

    Args:
        allowed: The kinds that fit the model.

    Raises:
        InputError: If it is none of these.
    """
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type", None)
    if kind not in allowed:
        raise InputError(
            f"DATASETS.TEST: {dataset_name} cannot be evaluated: its evaluator_type is {kind!r}; "
            f"allowed are {', '.join(allowed)}."
        )
    return kind


def allowed_kinds(cfg: CfgNode) -> tuple[str, ...]:
    """Returns the kinds of data sets on which a model can be evaluated.

    Args:
        cfg: The config of a plain model.
    """
    architecture = cfg.MODEL.META_ARCHITECTURE
    if architecture == "SemanticSegmentor":
        return SEGMENTED_KINDS
    segments = architecture == "PanopticFPN" or architecture not in (*TASKS, "ImageClassifier")
    return (*KINDS, *SEGMENTED_KINDS) if segments else KINDS


def segmentation_tasks(cfg: CfgNode, kind: str) -> list[str]:
    """Lists which segmentations of whole images a model predicts and a kind of data set has: semantic and panoptic.

    Args:
        cfg: The config of a plain model.
        kind: The evaluator_type of the data set.
    """
    if kind not in SEGMENTED_KINDS or kind not in allowed_kinds(cfg):
        return []
    architecture = cfg.MODEL.META_ARCHITECTURE
    combines = architecture != "PanopticFPN" or cfg.MODEL.PANOPTIC_FPN.COMBINE.ENABLED
    is_panoptic = kind == "coco_panoptic_seg" and architecture != "SemanticSegmentor" and combines
    return ["sem_seg", "panoptic_seg"] if is_panoptic else ["sem_seg"]


def has_panoptic_api() -> bool:
    """Checks whether the package is installed that computes the panoptic quality."""
    return importlib.util.find_spec(PANOPTIC_API) is not None


def check_evaluation(cfg: CfgNode) -> None:
    """Checks that every data set of DATASETS.TEST can be evaluated and yields the metrics that TEST names.

    Raises:
        InputError: If a data set has no evaluator, or the evaluation does not yield a metric.
    """
    student = student_config(cfg)
    architecture = student.MODEL.META_ARCHITECTURE
    for name in cfg.DATASETS.TEST:
        kind = check_evaluator(name, allowed_kinds(student))
        if kind == "pascal_voc" and "bbox" not in TASKS.get(architecture, ["bbox"]):
            raise InputError(
                f"DATASETS.TEST: {name} cannot be evaluated: {architecture} predicts no classes, whose AP is the "
                "metric of pascal_voc; COCO's format has metrics for proposals."
            )
        for task in segmentation_tasks(student, kind):
            _check_segmentation(name, task)
    if cfg.TEST.BEST_METRIC:
        _check_metric(cfg, "TEST.BEST_METRIC", cfg.TEST.BEST_METRIC)
    for expected in cfg.TEST.EXPECTED_RESULTS:
        if list(map(type, expected[:2])) != [str, str] or not are_numbers(list(expected[2:])) or len(expected) != 4:
            raise InputError(
                f"TEST.EXPECTED_RESULTS: each must be [task, metric, value, tolerance], got {show(expected)}."
            )
        _check_metric(cfg, "TEST.EXPECTED_RESULTS", "/".join(expected[:2]))


def _check_segmentation(name: str, task: str) -> None:
    """Checks that a test set has what the evaluation of a segmentation needs.

    Raises:
        InputError: If its metadata lacks an entry, or a file that the metadata names is missing.
    """
    if task == "panoptic_seg" and not has_panoptic_api():
        logger.warning(
            "DATASETS.TEST: the panoptic quality (PQ) on %s is left out, since the package %s is not installed "
            "(pip install git+https://github.com/cocodataset/panopticapi.git).",
            name,
            PANOPTIC_API,
        )
        return
    metadata = MetadataCatalog.get(name).as_dict()
    missing = [key for key in METADATA[task] if key not in metadata]
    if missing:
        raise InputError(
            f"DATASETS.TEST: {name} cannot be evaluated: its metadata has no {' and no '.join(missing)}, which "
            f"{task} needs."
        )
    for path in (metadata[key] for key in METADATA[task] if key in ("panoptic_json", "panoptic_root")):
        if not PathManager.exists(path):
            raise InputError(f"{path}: not found, but the evaluation of {name!r} in DATASETS.TEST needs it.")


def _check_metric(cfg: CfgNode, key: str, metric: str) -> None:
    names = metric_names(cfg) if cfg.DATASETS.TEST else []
    if names and metric not in names:
        more = f", ... ({len(names)} in all)" if len(names) > SHOWN else ""
        hint = f" panoptic_seg needs the package {PANOPTIC_API}." if "panoptic_seg/" in metric else ""
        raise InputError(f"{key}: got {metric!r}; the evaluation gives {', '.join(names[:SHOWN])}{more}.{hint}")


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
    kind, classes = check_evaluator(name, allowed_kinds(cfg)), class_names(name)
    if kind == "classification":
        return _classification_metrics(cfg.MODEL.CLASSIFIER.NUM_CLASSES, classes)
    if cfg.MODEL.META_ARCHITECTURE not in TASKS:
        return []
    tasks = list(TASKS[cfg.MODEL.META_ARCHITECTURE])
    if kind == "pascal_voc":
        return [f"bbox/{metric}" for metric in ("AP", "AP50", "AP75")] if tasks else []
    if cfg.MODEL.META_ARCHITECTURE in ("GeneralizedRCNN", "PanopticFPN"):
        tasks += [task for task, key in (("segm", "MASK_ON"), ("keypoints", "KEYPOINT_ON")) if cfg.MODEL[key]]
    per_class = [f"AP-{name}" for name in distinct(classes)] if len(classes) > 1 else []
    if kind == "sem_seg":
        tasks = []
    names = {task: [*METRICS[task], *(per_class if task != "box_proposals" else ())] for task in tasks}
    segmented = segmentation_tasks(cfg, kind)
    if segmented:
        stuff = class_names(name, "stuff_classes")
        names["sem_seg"] = [*METRICS["sem_seg"], *(f"{metric}-{each}" for each in stuff for metric in OF_STUFF)]
    if "panoptic_seg" in segmented and has_panoptic_api():
        names["panoptic_seg"] = list(METRICS["panoptic_seg"])
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
