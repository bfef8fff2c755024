"""Labels folders of images with trained detectors, once, into a COCO file that training reads."""

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.structures import Instances
from tqdm import tqdm

from kd_det.data import check_files, class_names, known_class_names, register_datasets
from kd_det.engine.evaluation import check_evaluator
from kd_det.errors import InputError, shorten
from kd_det.export import read_student_config
from kd_det.labeling.detectors import Detection, check_classes, load_detector
from kd_det.labeling.image_files import Found, find_images, read_ahead
from kd_det.labeling.journal import Journal
from kd_det.labeling.label_file import describe_objects, make_label_file, write_label_file
from kd_det.labeling.label_report import write_label_report
from kd_det.labeling.thresholds import Validation, choose_thresholds, keep, parse_thresholds, validate

logger = logging.getLogger(__name__)
EVALUATED = ("coco", "pascal_voc", "coco_panoptic_seg")


@dataclass(frozen=True)
class LabelOptions:
    """Describes a labelling.

    Attributes:
        teachers: Sources of the detectors: an output folder, "CONFIG:WEIGHTS", or a config alone. The boxes of several
            are fused.
        images: Folders of images.
        output: Path of the COCO file. The report is next to it, with the suffix ``.html``.
        config_file: The config whose data sets define the classes and the validation set; "" is the first detector's.
        dataset: Name of the labelled data set; None is the config's first of DATASETS.TEST.
        exclude: Names of data sets whose images are left out.
        thresholds: Scores, see :func:`kd_det.labeling.thresholds.parse_thresholds`; none chooses each class's score of
            the best F1 on the labelled data set.
        tta: Sizes for test-time augmentation, those of TEST.AUG of the detectors' configs if there are none; None does
            without.
        iou_threshold: Overlap (IoU) above which the fusion takes boxes for the same object.
        least_ap50: AP50 in percent below which nothing is written; None measures it only if thresholds are chosen.
        command: The command that asks for this, for the report.
    """

    teachers: Sequence[str]
    images: Sequence[str]
    output: str
    config_file: str = ""
    dataset: str | None = None
    exclude: Sequence[str] = ()
    thresholds: Sequence[str] = ()
    tta: Sequence[int] | None = None
    iou_threshold: float = 0.55
    least_ap50: float | None = None
    command: str = ""

    @property
    def report(self) -> str:
        """Returns the path of the report."""
        return str(Path(self.output).with_suffix(".html"))

    @property
    def journal(self) -> str:
        """Returns the path of the file that holds the labels of finished images until all are labelled."""
        return f"{self.output}.progress"


@dataclass(frozen=True)
class Labelled:
    """Summarises a labelling.

    Attributes:
        root: The folder to which the names of the images are relative, for IMAGE_ROOT.
        images: Number of labelled images.
        resumed: Number of images that an earlier, interrupted call had finished.
        left_out: Number of images that belong to excluded data sets.
        objects: Number of objects.
        unreadable: Names of images that cannot be read.
        thresholds: Maps the name of each class to its score threshold.
        validation: How well the labels agree with the labelled data set, if that was measured.
    """

    root: str
    images: int
    resumed: int
    left_out: int
    objects: int
    unreadable: list[str]
    thresholds: dict[str, float]
    validation: Validation | None


def label_images(options: LabelOptions) -> Labelled:
    """Labels images and writes a COCO file and a report.

    If it is interrupted, the same call goes on where it was, and writes the same COCO file byte for byte. Images that
    cannot be read are named in the log and left out.

    Raises:
        InputError: If an option, a model, a data set or a folder is wrong, the output exists already, no image can be
            read, or the labels are worse than they may be.
        OSError: If the output cannot be written.
    """
    check_options(options)
    all_images = find_images(options.images)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    detectors = [load_detector(source, device, options.tta) for source in options.teachers]
    cfg = read_student_config(options.config_file) if options.config_file else detectors[0].cfg
    owner = options.config_file or f"--teacher {detectors[0].source}"
    classes = known_class_names(cfg) or ([] if options.config_file else detectors[0].classes)
    if not classes:
        raise InputError(
            f"{owner}: the names of its classes are not known, since none of its data sets is there; --config-file "
            "names a config with data sets of these classes."
        )
    check_classes(detectors, classes, owner)
    given = parse_thresholds(options.thresholds, classes)
    measured = given is None or options.least_ap50 is not None or options.dataset is not None
    dataset = prepare_datasets(cfg, options, classes, owner, measured=measured)
    found = all_images.without(options.exclude)
    if dataset:
        warn_of_leak(found, dataset)
    detection = Detection(detectors, options.iou_threshold)
    workers = detectors[0].cfg.DATALOADER.NUM_WORKERS
    task: dict[str, Any] = {
        "teachers": [[detector.source, detector.fingerprint] for detector in detectors],
        "classes": classes,
        "thresholds": given,
        "dataset": dataset,
        "tta": None if options.tta is None else list(options.tta),
        "iou": options.iou_threshold,
        "images": hash_names(found),
    }
    Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    journal = Journal(options.journal, task)
    resumed = max(len(journal.entries) - 1, 0)
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
            if not journal.entries:
                journal.append(begin(detection, dataset, classes, given, workers))
            thresholds, validation = read_beginning(journal)
            if options.least_ap50 is not None and validation is not None:
                check_quality(validation, options.least_ap50)
            label_rest(detection, found, journal, thresholds, workers)
        images = [entry for entry in journal.entries[1:] if "annotations" in entry]
        unreadable = [entry["file_name"] for entry in journal.entries[1:] if "annotations" not in entry]
        if not images:
            raise InputError(f"--images: none of the images can be read: {shorten(unreadable)}.")
    except InputError:
        if not any("annotations" in entry for entry in journal.entries):
            journal.remove()
        raise
    finally:
        journal.close()
    shown = dict(zip(classes, thresholds, strict=True))
    info = {
        "description": "Labels of trained models, made by kd-det label.",
        "teachers": list(options.teachers),
        "thresholds": shown,
        "validation": validation and validation.as_dict(),
        "unreadable": unreadable,
    }
    data = make_label_file(images, classes, info)
    write_label_report(options.report, data, found, thresholds, validation, options.command)
    write_label_file(options.output, data)
    journal.remove()
    return Labelled(
        root=found.root,
        images=len(images),
        resumed=resumed,
        left_out=len(all_images.names) - len(found.names),
        objects=len(data["annotations"]),
        unreadable=unreadable,
        thresholds=shown,
        validation=validation,
    )


def check_options(options: LabelOptions) -> None:
    """Checks what needs no model.

    Raises:
        InputError: If a value is not allowed, or the output exists already.
    """
    if os.path.exists(options.output):
        raise InputError(f"--output: {options.output} exists already; delete it or choose another name.")
    if options.report == options.output:
        raise InputError(f"--output: must not end in .html, which is the report's suffix, got {options.output}.")
    if not 0 < options.iou_threshold < 1:
        raise InputError(f"--iou: must be above 0 and below 1, got {options.iou_threshold}.")
    if options.least_ap50 is not None and not 0 <= options.least_ap50 <= 100:
        raise InputError(f"--validate: must be an AP50 from 0 to 100, got {options.least_ap50}.")
    if min(options.tta or [1]) < 1:
        raise InputError(f"--tta: sizes must be above 0, got {min(options.tta or [])}.")


def prepare_datasets(
    cfg: CfgNode, options: LabelOptions, classes: Sequence[str], owner: str, *, measured: bool
) -> str | None:
    """Registers the data sets of a config, and checks those that are used.

    Args:
        cfg: The config.
        options: The options, which name data sets.
        classes: Names of the classes.
        owner: Whose classes they are, for messages.
        measured: Whether a labelled data set is needed.

    Returns:
        The name of the labelled data set; None if none is needed.

    Raises:
        InputError: If a data set is missing, or has other classes.
    """
    cfg = cfg.clone()
    cfg.defrost()
    register_datasets(cfg)
    dataset = options.dataset or (cfg.DATASETS.TEST[0] if cfg.DATASETS.TEST else None)
    if measured and dataset is None:
        raise InputError(
            f"--dataset: none is given, and DATASETS.TEST of {owner} is empty; a labelled data set is needed to choose "
            "thresholds (--threshold gives them) and to --validate."
        )
    cfg.DATASETS.TRAIN = tuple(options.exclude)
    cfg.DATASETS.TEST = (dataset,) if measured else ()
    check_files(cfg)
    if not measured:
        return None
    assert dataset is not None
    check_evaluator(dataset, EVALUATED)
    names = class_names(dataset)
    if names != list(classes):
        raise InputError(
            f"--dataset: {dataset} has {len(names)} classes ({shorten(names, 8)}), but {owner} has {len(classes)} "
            f"({shorten(classes, 8)}): the same classes in the same order are needed."
        )
    return dataset


def warn_of_leak(found: Found, dataset: str) -> None:
    """Warns if images of the labelled data set are among those to label."""
    paths = {os.path.realpath(found.path(name)) for name in found.names}
    count = sum(os.path.realpath(record["file_name"]) in paths for record in DatasetCatalog.get(dataset))
    if count:
        logger.warning(
            "%d of the images belong to %s; a model that trains on them cannot be tested there. --exclude %s leaves "
            "them out.",
            count,
            dataset,
            dataset,
        )


def hash_names(found: Found) -> str:
    """Returns a hash of the images to label, by their names."""
    return hashlib.sha256(json.dumps([found.root, found.names]).encode()).hexdigest()


def begin(
    detection: Detection, dataset: str | None, classes: Sequence[str], given: list[float] | None, workers: int
) -> dict[str, Any]:
    """Chooses the thresholds, and compares the labels with a labelled data set if there is one.

    Args:
        detection: Detects objects.
        dataset: Name of the labelled data set.
        classes: Names of the classes.
        given: Thresholds that the user gives.
        workers: Number of processes that read images.

    Returns:
        An entry of the journal.
    """
    if dataset is None:
        return {"thresholds": given, "validation": None}
    images = list(detect_in_dataset(detection, dataset, workers))
    thresholds = choose_thresholds(images, classes) if given is None else given
    return {"thresholds": thresholds, "validation": validate(images, dataset, classes, thresholds).as_dict()}


def read_beginning(journal: Journal) -> tuple[list[float], Validation | None]:
    """Returns the thresholds, and how well the labels agree with a labelled data set."""
    entry = journal.entries[0]
    return entry["thresholds"], entry["validation"] and Validation.from_dict(entry["validation"])


def detect_in_dataset(detection: Detection, dataset: str, workers: int) -> Iterator[tuple[dict[str, Any], Instances]]:
    """Yields Detectron2's dict of each image of a data set and the objects that are detected in it, without masks.

    Raises:
        InputError: If an image cannot be read.
    """
    records = DatasetCatalog.get(dataset)
    views = read_ahead(records, detection.mappers, workers)
    for record, view in zip(records, tqdm(views, dataset, len(records), unit="image", disable=None), strict=True):
        if isinstance(view, str):
            raise InputError(view)
        instances = detection(view)
        fields = {key: instances.get(key) for key in ("pred_boxes", "scores", "pred_classes")}
        yield record, Instances(instances.image_size, **fields)


def check_quality(validation: Validation, least: float) -> None:
    """Checks that the labels are good enough.

    Raises:
        InputError: If they are not.
    """
    if validation.ap50 < least:
        raise InputError(
            f"--validate: the labels have an AP50 of {validation.ap50:.2f} on {validation.dataset}, which is below "
            f"{least:g}; nothing is written."
        )


def label_rest(detection: Detection, found: Found, journal: Journal, thresholds: Sequence[float], workers: int) -> None:
    """Labels the images that the journal does not have yet."""
    done = len(journal.entries) - 1
    names = found.names[done:]
    records = [{"file_name": found.path(name), "image_id": i} for i, name in enumerate(names)]
    progress = tqdm(
        read_ahead(records, detection.mappers, workers),
        desc="labels",
        initial=done,
        total=len(found.names),
        unit="image",
        disable=None,
    )
    for name, views in zip(names, progress, strict=True):
        if isinstance(views, str):
            logger.warning("%s", views)
            journal.append({"file_name": name, "unreadable": views})
            continue
        instances = keep(detection(views), thresholds)
        height, width = instances.image_size
        journal.append(
            {"file_name": name, "width": width, "height": height, "annotations": describe_objects(instances)}
        )
