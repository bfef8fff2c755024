"""Checks, before training, that the teacher has the student's classes and has learned something about the images."""

import logging
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import inference_on_dataset
from torch import nn

from kd_det.class_partition import CLASS_PREDICTIONS, ClassPartition
from kd_det.config import UNNAMED, has_teacher, student_config
from kd_det.data import choose_images, class_names, known_class_names
from kd_det.engine.evaluation import allowed_kinds, build_evaluator
from kd_det.engine.loaders import build_test_loader
from kd_det.errors import InputError
from kd_det.heads.build import student_signals
from kd_det.taps import count_classes
from kd_det.teacher import build_teacher
from kd_det.teacher_choices import heads_of, select_teacher, used_teachers, with_keys_of
from kd_det.teacher_classes import count_object_classes, declared_names, divide_classes
from kd_det.teacher_kinds import teacher_kind

logger = logging.getLogger(__name__)
# Maps models that predict other classes than those of objects or images to the metadata that names theirs.
KINDS_OF_CLASSES = {
    "PanopticFPN": ("thing_classes", "stuff_classes"),
    "SemanticSegmentor": ("stuff_classes",),
}
SUBSET = "kd_det_sanity_check"
# A detector with an AP below this has learned nothing about the images.
LEAST_AP = 1.0
# A segmentation with less of the way from chance to a perfect accuracy has learned nothing about the images.
LEAST_GAIN = 0.1
# Maps the metadata that names classes to the signals in which each of these classes has a fixed position.
PREDICTIONS = {
    "thing_classes": {*CLASS_PREDICTIONS, "input_gradient"},
    "stuff_classes": {"sem_seg_logits"},
    "keypoint_names": {"keypoint_logits"},
}


def check_class_order(cfg: CfgNode, heads: Mapping[str, nn.Module]) -> None:
    """Compares the names of the teacher's classes with the student's, if the data sets of both configs are available.

    The names are those of objects or images, of the pixels of semantic segmentation, and of keypoints, each only if a
    head compares predictions of them. Those of objects and images are not checked if ``KD.TEACHER.CLASSES`` or
    ``SYNONYMS`` is set, because classes are then compared by name.

    Args:
        cfg: The run's config; its data sets are already registered.
        heads: The distillation heads; nothing is checked if none of them compares such predictions.

    Raises:
        InputError: If the names are the same in another order. Different names cause only a warning.
    """
    for name in used_teachers(cfg) or [UNNAMED]:
        taught = {head: heads[head] for head in heads_of(name, cfg, heads)}
        with select_teacher(cfg, name) as selected:
            _check_class_order(selected, taught, name)


def _check_class_order(cfg: CfgNode, heads: Mapping[str, nn.Module], teacher: str) -> None:
    """Checks the classes of the teacher in ``KD.TEACHER``, whose name is `teacher`, for the heads that it teaches."""
    for kind, predictions in PREDICTIONS.items():
        comparing = [name for name, head in heads.items() if predictions.intersection(student_signals(head))]
        by_name = kind == "thing_classes" and (cfg.KD.TEACHER.CLASSES or cfg.KD.TEACHER.SYNONYMS)
        if comparing and not by_name:
            _compare_names(cfg, kind, comparing, teacher)


def _compare_names(cfg: CfgNode, kind: str, comparing: Sequence[str], name: str) -> None:
    named_teacher = teacher_kind(cfg)
    student, teacher = known_class_names(cfg, kind), declared_names(named_teacher, kind)
    different = [(a, b) for a, b in zip(student, teacher, strict=False) if a != b]
    if len(student) != len(teacher) or not different:
        return
    reordered = set(student) == set(teacher)
    named = "keypoints" if kind == "keypoint_names" else "classes"
    difference = f"list the same {named} in another order" if reordered else f"name other {named}"
    message = (
        f"KD.TEACHER.CONFIG_FILE: the data sets of {cfg.KD.TEACHER.CONFIG_FILE} {difference} than the student's, "
        f"{different[0][1]!r} for {different[0][0]!r}, but {', '.join(comparing)} compares them one by one. "
        + ("List the teacher's in KD.TEACHER.CLASSES to compare them by name. " if kind == "thing_classes" else "")
        + f"If these are not the teacher's data, set KD.TEACHER.OPTS to {named_teacher.without_data_sets}."
    )
    if reordered:
        raise InputError(message)
    logger.warning("%s", with_keys_of(name, message))


def have_same_classes(cfg: CfgNode) -> bool:
    """Checks whether both networks are known to have the same classes in the same order.

    For a student that segments whole images, this includes the classes of pixels.
    """
    architecture = student_config(cfg).MODEL.META_ARCHITECTURE
    kinds = KINDS_OF_CLASSES.get(architecture, ("thing_classes",))
    return all((names := known_class_names(cfg, kind)) and names == _teacher_names(cfg, kind) for kind in kinds)


def _teacher_names(cfg: CfgNode, kind: str) -> list[str]:
    """Returns the names of the teacher's classes, with the student's for each synonym; [] if they are not known."""
    node, names = cfg.KD.TEACHER, declared_names(teacher_kind(cfg), kind)
    if kind != "thing_classes":
        return names
    return [node.SYNONYMS.get(name, name) for name in node.CLASSES or names]


def check_teacher(cfg: CfgNode) -> None:
    """Evaluates each teacher on its SANITY_CHECK images, if any, and warns if it fails on them.

    The images are spread evenly over DATASETS.TEST[0] (for a detector, over its images with objects) and are read as
    the teacher's own config says. The metrics, box AP, top-1 accuracy or the mean accuracy of the pixels of a semantic
    segmentation, cover only these images. Each process takes a part of them. A teacher of other classes is evaluated on
    the objects and the images of those that the student shares.

    Raises:
        InputError: If the number is negative, or there is no test set with classes that the teacher could know.
    """
    count = cfg.KD.TEACHER.SANITY_CHECK
    if count < 0:
        raise InputError(f"KD.TEACHER.SANITY_CHECK: must be 0 (no check) or a number of images, got {count}.")
    if not (has_teacher(cfg) and cfg.KD.HEADS):
        return
    for name in used_teachers(cfg):
        with select_teacher(cfg, name) as selected:
            if selected.KD.TEACHER.SANITY_CHECK:
                _evaluate_teacher(selected, name)


def _evaluate_teacher(cfg: CfgNode, name: str) -> None:
    """Evaluates the teacher in ``KD.TEACHER``, whose name is `name`; see :func:`check_teacher`."""
    count = cfg.KD.TEACHER.SANITY_CHECK
    if not teacher_kind(cfg).predicts:
        raise InputError(
            f"KD.TEACHER.SANITY_CHECK: got {count}, but {cfg.KD.TEACHER.CONFIG_FILE} teaches by its feature maps and "
            "predicts nothing that could be evaluated; set it to 0."
        )
    if not cfg.DATASETS.TEST:
        raise InputError(f"KD.TEACHER.SANITY_CHECK: got {count}, but DATASETS.TEST names no data set.")
    dataset, teacher = cfg.DATASETS.TEST[0], build_teacher(cfg)
    assert teacher.cfg is not None
    teacher_cfg = teacher.cfg
    known = count_classes(teacher.tap.spec())
    kind = KINDS_OF_CLASSES.get(teacher_cfg.MODEL.META_ARCHITECTURE, ("thing_classes",))[0]
    names = class_names(dataset, kind)
    classes = None
    if names and kind == "thing_classes":
        classes = divide_classes(cfg, len(names), count_object_classes(teacher.tap.spec()))
    if names and known is not None and len(names) != known and not (classes and classes.shared):
        raise InputError(
            f"KD.TEACHER.SANITY_CHECK: got {count}, but the teacher knows {known} classes and {dataset!r} has "
            f"{len(names)}, so it cannot be evaluated there; set it to 0."
        )
    evaluated = MetadataCatalog.get(dataset).get("evaluator_type", None)
    allowed = allowed_kinds(teacher_cfg)
    if evaluated == "coco_panoptic_seg" and evaluated not in allowed:
        evaluated = "coco"  # A detector is evaluated on the objects alone.
    if evaluated not in allowed:
        raise InputError(
            f"KD.TEACHER.SANITY_CHECK: got {count}, but the evaluator_type of {dataset!r} is {evaluated!r}, and the "
            f"teacher, {teacher_cfg.MODEL.META_ARCHITECTURE}, can be evaluated on {', '.join(allowed)}; set it to 0."
        )
    teacher_cfg.DATALOADER.NUM_WORKERS = cfg.DATALOADER.NUM_WORKERS
    if classes:
        teacher_cfg.MODEL.CLASSIFIER.NUM_CLASSES = len(classes.student)  # The labels of the images are the student's.
        if evaluated == "pascal_voc":
            evaluated = "coco"  # VOC's evaluator would read all objects from the annotation files.
    with tempfile.TemporaryDirectory() as folder, subset(dataset, count, folder, evaluated, classes) as images:
        teacher_cfg.OUTPUT_DIR = folder
        logger.info("Checking %s on %d images of %s.", title_of(name), images, dataset)
        evaluator = build_evaluator(teacher_cfg, SUBSET, tasks=("bbox", "sem_seg"))
        model = Translated(teacher.model, classes) if classes else teacher.model
        results = inference_on_dataset(model, build_test_loader(teacher_cfg, SUBSET), evaluator)
    if "classification" in results:
        assert known is not None
        possible = len(classes.shared) if classes else known
        report("top-1 accuracy", results["classification"]["top1"], least_accuracy(possible, images), dataset, name)
    if "bbox" in results:
        # NaN means that the detector finds nothing.
        ap = results["bbox"]["AP"]
        report("box AP", 0.0 if math.isnan(ap) else ap, LEAST_AP, dataset, name)
    if "sem_seg" in results:
        metrics = results["sem_seg"]
        report("mean accuracy of pixels", metrics["mACC"], least_pixel_accuracy(metrics), dataset, name)


class Translated(nn.Module):
    """Predicts as a teacher does, with the indices of the student's classes.

    Args:
        model: The teacher's model.
        classes: Division of its classes from the student's.
    """

    def __init__(self, model: nn.Module, classes: ClassPartition):
        super().__init__()
        self.model = model
        self.classes = classes

    def forward(self, batched_inputs: list[dict]) -> list[dict]:
        return self.classes.translate(self.model(batched_inputs))


@contextmanager
def subset(dataset: str, count: int, folder: str, kind: str, classes: ClassPartition | None = None) -> Iterator[int]:
    """Registers a part of a data set as SUBSET inside the block, so that evaluators use only its annotations.

    Args:
        folder: Folder for a list of the images.
        kind: The evaluator_type of the part.
        classes: Leaves out the objects and the images of classes that are not shared; None leaves out none.

    Yields:
        The number of images.
    """
    records = DatasetCatalog.get(dataset)
    chosen = choose_images(shared_records(records, classes) if classes else records, count)
    if classes and not chosen:
        raise InputError(
            f"KD.TEACHER.SANITY_CHECK: got {count}, but {dataset!r} has no image of the classes that student and "
            "teacher share; set it to 0."
        )
    # Without the annotation file, COCOEvaluator takes the annotations of the records.
    metadata = {k: v for k, v in MetadataCatalog.get(dataset).as_dict().items() if k not in ("name", "json_file")}
    metadata["evaluator_type"] = kind
    if kind == "pascal_voc":
        metadata["split"] = str(Path(folder, "images"))  # An absolute path overrides the folder it is joined to.
        Path(folder, "images.txt").write_text("\n".join(record["image_id"] for record in chosen), encoding="utf-8")
    DatasetCatalog.register(SUBSET, lambda: chosen)
    MetadataCatalog.get(SUBSET).set(**metadata)
    try:
        yield len(chosen)
    finally:
        DatasetCatalog.remove(SUBSET)
        MetadataCatalog.remove(SUBSET)


def shared_records(records: list[dict], classes: ClassPartition) -> list[dict]:
    """Leaves out the objects of classes that student and teacher do not share, and images without any others.

    Args:
        records: Detectron2's dicts of a data set with the student's classes.
        classes: Division of the classes.
    """
    indices = {classes.student.index(name) for name in classes.shared}
    kept = []
    for record in records:
        if "label" in record:
            kept += [record] if record["label"] in indices else []
        elif objects := [x for x in record.get("annotations", ()) if x["category_id"] in indices]:
            kept.append(record | {"annotations": objects})
    return kept


def least_accuracy(classes: int, images: int) -> float:
    """Computes a top-1 accuracy in percent that is two standard deviations of guessing above chance."""
    chance = 1 / classes
    return 100 * (chance + 2 * math.sqrt(chance * (1 - chance) / images))


def least_pixel_accuracy(metrics: Mapping[str, float]) -> float:
    """Computes a mean accuracy of pixels in percent that is a tenth of the way from chance to 100.

    A prediction that does not depend on the image reaches 1 over the number of classes at most.

    Args:
        metrics: Metrics of Detectron2's ``SemSegEvaluator``; the accuracy of a class that no image has is NaN.
    """
    present = sum(not math.isnan(value) for name, value in metrics.items() if name.startswith("ACC-"))
    chance = 1 / max(present, 1)
    return 100 * (chance + LEAST_GAIN * (1 - chance))


def title_of(name: str) -> str:
    """Returns what a teacher of this name is called in a sentence."""
    return "the teacher" if name == UNNAMED else f"teacher {name}"


def report(metric: str, value: float, least: float, dataset: str, name: str) -> None:
    """Logs the value that the teacher of a name reaches, and warns if it is too low."""
    title = title_of(name)
    logger.info("%s's %s on these images: %.2f", title[0].upper() + title[1:], metric, value)
    if value < least:
        message = (
            f"KD.TEACHER.SANITY_CHECK: {title} has learned next to nothing about {dataset}: its {metric} is "
            f"{value:.2f}, below {least:.2f}. Likely causes: KD.TEACHER.WEIGHTS belongs to another model or is not "
            "trained; INPUT.FORMAT, MODEL.PIXEL_MEAN or MODEL.PIXEL_STD of its config are not those that it was "
            "trained with (RGB for BGR, 0 to 1 for 0 to 255); its classes are in another order."
        )
        logger.warning("%s", with_keys_of(name, message))
