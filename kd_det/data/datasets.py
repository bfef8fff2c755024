"""Registers the data sets that a config defines, and returns their classes and images."""

import logging
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from detectron2.data.build import filter_images_with_only_crowd_annotations

from kd_det.config import yacs_message
from kd_det.data.builtin import BUILTIN
from kd_det.data.coco_format import CocoFormat
from kd_det.data.image_folder import ImageFolder
from kd_det.data.mapper import check_masks
from kd_det.data.paths import resolve
from kd_det.data.voc_format import VocFormat
from kd_det.errors import InputError, check_choice

logger = logging.getLogger(__name__)
# What the scores of annotations are for.
SCORES = ("weight", "ignore")


def register_datasets(cfg: CfgNode) -> None:
    """Registers every data set of DATASETS.COCO_FORMAT, VOC_FORMAT and IMAGE_FOLDER; reads no file.

    Registering the same definitions again changes nothing.

    Raises:
        InputError: If an entry lacks a key or has an unknown one or a wrong value, or if its name is taken.
    """
    for key, dataset in define_datasets(cfg):
        _register(key, dataset)


def define_datasets(cfg: CfgNode) -> Iterator[tuple[str, CocoFormat | VocFormat | ImageFolder]]:
    """Yields the key and the definition of every data set of DATASETS.COCO_FORMAT, VOC_FORMAT and IMAGE_FOLDER.

    Raises:
        InputError: If an entry lacks a key or has an unknown one or a wrong value.
    """
    for name, entry in cfg.DATASETS.COCO_FORMAT.items():
        key = f"DATASETS.COCO_FORMAT.{name}"
        required: dict[str, Any] = {"JSON": str, "IMAGE_ROOT": str}
        values = _read_entry(key, entry, required, {"FLIP_PAIRS": None}, for_scores={"SCORES": "ignore"})
        json_file, image_root, pairs, scores = values
        flip_pairs = None if pairs is None else _read_pairs(f"{key}.FLIP_PAIRS", pairs)
        check_choice(f"{key}.SCORES", scores, SCORES)
        yield key, CocoFormat(name, resolve(json_file), resolve(image_root), flip_pairs, scores)
    for name, entry in cfg.DATASETS.VOC_FORMAT.items():
        key = f"DATASETS.VOC_FORMAT.{name}"
        required = {"ROOT": str, "SPLIT": str, "CLASSES": (list, tuple)}
        root, split, classes, year = _read_entry(key, entry, required, {"YEAR": 2012})
        if not classes or not all(isinstance(c, str) for c in classes) or len(set(classes)) < len(classes):
            raise InputError(f"{key}.CLASSES: {list(classes)} found; a list of different names is needed.")
        if year not in (2007, 2012):
            raise InputError(
                f"{key}.YEAR: {year!r} found; 2007 (11-point AP) or 2012 (area under the curve) is allowed."
            )
        yield key, VocFormat(name, resolve(root), split, tuple(classes), year)
    for name, entry in cfg.DATASETS.IMAGE_FOLDER.items():
        key = f"DATASETS.IMAGE_FOLDER.{name}"
        (root,) = _read_entry(key, entry, {"ROOT": str})
        yield key, ImageFolder(name, root)


def class_names(name: str, kind: str = "thing_classes") -> list[str]:
    """Returns the class names of a data set, in the order of their indices; [] if it does not name them.

    Args:
        kind: The metadata that has the names: "thing_classes" for objects and images, "stuff_classes" for semantic
            segmentation, or "keypoint_names".
    """
    known = _own_names(DatasetCatalog[name], kind)
    return list(MetadataCatalog.get(name).get(kind, [])) if known is None else known


def known_class_names(cfg: CfgNode, kind: str = "thing_classes") -> list[str]:
    """Returns the class names of a config's data sets, registered or not; [] if they cannot be read.

    Args:
        kind: Which names, see :func:`class_names`.
    """
    names = (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN)
    with suppress(InputError, KeyError, OSError):
        defined = {dataset.name: dataset for _, dataset in define_datasets(cfg)}
        known = [name for name in names if name in defined or name in DatasetCatalog]
        if known:
            name, dataset = known[0], defined.get(known[0])
            if dataset is None or (name in DatasetCatalog and DatasetCatalog[name] == dataset):
                return class_names(name, kind)
            known_names = _own_names(dataset, kind)
            return list(dataset.metadata().get(kind, [])) if known_names is None else known_names
    return []


def choose_images(records: list[dict], count: int) -> list[dict]:
    """Chooses at most `count` images, evenly spread over those with objects (or over all if none has any).

    The choice is the same each time.
    """
    worth = [record for record in records if record.get("annotations", True)] or records
    count = min(count, len(worth))
    return [worth[i * len(worth) // count] for i in range(count)]


def load_training_images(cfg: CfgNode, **options: Any) -> list[dict[str, Any]]:
    """Returns Detectron2's dicts of all images of DATASETS.TRAIN that are trained on.

    Args:
        options: Further arguments of Detectron2's ``get_detection_dataset_dicts``.

    Raises:
        InputError: If DATASETS.TRAIN is empty, no image is left, a file is wrong or masks are missing.
    """
    if not cfg.DATASETS.TRAIN:
        raise InputError("DATASETS.TRAIN: no data set is named.")
    keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0
    filter_empty = cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    try:
        records = get_detection_dataset_dicts(
            cfg.DATASETS.TRAIN, filter_empty=filter_empty, min_keypoints=keypoints, **options
        )
        records = _leave_out_maskless(records, filter_empty) if cfg.MODEL.MASK_ON else records
        return draw_share(cfg, records)
    except AssertionError as error:
        reasons = [
            filter_empty and "DATALOADER.FILTER_EMPTY_ANNOTATIONS leaves out images without objects.",
            keypoints
            and f"MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE leaves out those with fewer than {keypoints}.",
        ]
        raise InputError(" ".join([f"DATASETS.TRAIN: {yacs_message(error)}", *filter(None, reasons)])) from error


def _leave_out_maskless(records: list[dict[str, Any]], filter_empty: bool) -> list[dict[str, Any]]:
    """Leaves out objects whose polygons are all too small to be masks, and images that then have no objects."""
    maskless = 0
    for record in records:
        check_masks(record)
        annotations = record.get("annotations", [])
        masked = [annotation for annotation in annotations if annotation.get("segmentation") != []]
        if len(masked) < len(annotations):
            maskless += len(annotations) - len(masked)
            record["annotations"] = masked
    if not maskless:
        return records
    logger.warning("MODEL.MASK_ON: %d objects without a polygon of three points are not trained on.", maskless)
    records = filter_images_with_only_crowd_annotations(records) if filter_empty else records
    assert records, "No object has a mask."
    return records


def draw_share(cfg: CfgNode, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Draws the share DATASETS.TRAIN_SHARE of the images, at least one, in their order.

    The draw depends on DATASETS.TRAIN_SHARE_SEED and the number of images alone.
    """
    share = cfg.DATASETS.TRAIN_SHARE
    if share == 1:
        return records
    generator = torch.Generator().manual_seed(cfg.DATASETS.TRAIN_SHARE_SEED)
    drawn = torch.randperm(len(records), generator=generator)[: max(round(share * len(records)), 1)]
    return [records[i] for i in sorted(drawn.tolist())]


def count_training_images(cfg: CfgNode) -> int:
    """Counts the images of an epoch: those of all data sets of DATASETS.TRAIN that the training loader does not drop.

    Raises:
        InputError: For the reasons of :func:`load_training_images`.
    """
    return len(load_training_images(cfg, check_consistency=False))


def _own_names(dataset: Any, kind: str) -> list[str] | None:
    """Returns the names that a data set reads from its own files; None if it has none of that kind."""
    if kind == "thing_classes":
        known = getattr(dataset, "classes", None)
        return None if known is None else list(known)
    if kind == "keypoint_names" and isinstance(dataset, CocoFormat):
        # Categories with different keypoints have no names in common.
        return dataset.contents.keypoints[0] if len(dataset.contents.keypoints) == 1 else []
    return None


def _read_entry(
    key: str,
    entry: Any,
    required: dict[str, Any],
    optional: dict[str, Any] | None = None,
    *,
    for_scores: dict[str, Any] | None = None,
) -> list[Any]:
    """Returns the values of an entry: those of the required keys, the optional keys, and the keys for scores."""
    optional, for_scores = optional or {}, for_scores or {}
    allowed = ", ".join([*required, *optional])
    also = f" A file with scores may have {', '.join(for_scores)}, too." if for_scores else ""
    if not isinstance(entry, dict):
        raise InputError(f"{key}: {entry!r} found; a mapping with the keys {allowed} is needed.{also}")
    optional = {**optional, **for_scores}
    for unknown in sorted(set(entry) - set(required) - set(optional)):
        raise InputError(f"{key}.{unknown}: unknown key; allowed are {allowed}.{also}")
    for name, kind in required.items():
        if not isinstance(entry.get(name), kind) or entry[name] == "":
            found = f"{entry[name]!r} found" if name in entry else "missing"
            raise InputError(f"{key}.{name}: {found}; {'text' if kind is str else 'a list'} is needed.")
    return [entry[name] for name in required] + [entry.get(name, default) for name, default in optional.items()]


def _read_pairs(key: str, pairs: Any) -> tuple[tuple[str, str], ...]:
    """Returns pairs of keypoint names as tuples, after a check."""
    names = [name for pair in pairs for name in pair] if _is_list(pairs) and all(map(_is_list, pairs)) else [None]
    if not all(isinstance(name, str) for name in names) or any(len(pair) != 2 for pair in pairs):
        raise InputError(f"{key}: {pairs!r} found; a list of pairs of keypoint names, [[left, right], ...], is needed.")
    return tuple(map(tuple, pairs))


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _register(key: str, dataset: CocoFormat | VocFormat | ImageFolder) -> None:
    if dataset.name not in DatasetCatalog:
        DatasetCatalog.register(dataset.name, dataset)
        MetadataCatalog.get(dataset.name).set(**dataset.metadata())
        return
    known = DatasetCatalog[dataset.name]
    if known == dataset:
        return
    if isinstance(known, (CocoFormat, VocFormat, ImageFolder)) and dataset.name not in BUILTIN:
        raise InputError(f"{key}: defined differently before, as {known}; choose another name or start a new process.")
    raise InputError(
        f"{key}: the name is taken, kd_det, Detectron2 or other code has registered it; choose another name."
    )
