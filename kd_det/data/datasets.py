"""Data sets that are named in the config: registered, and checked before a model is built."""

import logging
import os
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager

from kd_det.config import student_config
from kd_det.data.coco_format import CocoFormat
from kd_det.data.voc_format import VocFormat
from kd_det.errors import InputError

NUM_CLASSES = {
    "GeneralizedRCNN": "MODEL.ROI_HEADS.NUM_CLASSES",
    "PanopticFPN": "MODEL.ROI_HEADS.NUM_CLASSES",
    "RetinaNet": "MODEL.RETINANET.NUM_CLASSES",
}
# What the metadata of Detectron2's own detection data sets names on the disk.
PATHS = ("json_file", "image_root", "dirname")


def register_datasets(cfg: CfgNode) -> None:
    """Register every data set of DATASETS.COCO_FORMAT and DATASETS.VOC_FORMAT; reads no file.

    Doing so again with the same definitions changes nothing.

    Raises:
        InputError: If an entry lacks a key or has an unknown one or a wrong value, or if its name is taken.
    """
    for name, entry in cfg.DATASETS.COCO_FORMAT.items():
        key = f"DATASETS.COCO_FORMAT.{name}"
        json_file, image_root = _read_entry(key, entry, {"JSON": str, "IMAGE_ROOT": str})
        _register(key, CocoFormat(name, _resolve(json_file), _resolve(image_root)))
    for name, entry in cfg.DATASETS.VOC_FORMAT.items():
        key = f"DATASETS.VOC_FORMAT.{name}"
        expected = {"ROOT": str, "SPLIT": str, "CLASSES": (list, tuple)}
        root, split, classes, year = _read_entry(key, entry, expected, {"YEAR": 2012})
        if not classes or not all(isinstance(c, str) for c in classes) or len(set(classes)) < len(classes):
            raise InputError(f"{key}.CLASSES: {list(classes)} found; a list of different names is needed.")
        if year not in (2007, 2012):
            raise InputError(
                f"{key}.YEAR: {year!r} found; 2007 (11-point AP) or 2012 (area under the curve) is allowed."
            )
        _register(key, VocFormat(name, _resolve(root), split, tuple(classes), year))


def check_files(cfg: CfgNode, *, train: bool = True) -> None:
    """Check that the data sets of DATASETS.TEST and, if `train`, of DATASETS.TRAIN are known and on the disk.

    Looks at annotation files and folders only: what is in them is checked when they are loaded.

    Raises:
        InputError: If a data set is unknown, or a file or folder of it is missing.
    """
    for key, name in _used(cfg, train):
        if name not in DatasetCatalog:
            own = [*cfg.DATASETS.COCO_FORMAT, *cfg.DATASETS.VOC_FORMAT]
            raise InputError(
                f"{key}: unknown data set {name!r}; besides Detectron2's own, this config defines "
                f"{', '.join(own) or 'none'}. Define more in DATASETS.COCO_FORMAT or DATASETS.VOC_FORMAT."
            )
        dataset = DatasetCatalog[name]
        if isinstance(dataset, (CocoFormat, VocFormat)):
            dataset.check_files()
            continue
        metadata = MetadataCatalog.get(name)
        for path in (getattr(metadata, attribute) for attribute in PATHS if attribute in metadata.as_dict()):
            if not PathManager.exists(path):
                raise InputError(
                    f"{path}: not found, but {key} names {name!r}. DETECTRON2_DATASETS is {_root()!r}; "
                    "datasets/README.md shows what belongs there."
                )


def check_num_classes(cfg: CfgNode, *, train: bool = True) -> None:
    """Compare the classes of the data sets with each other and with the number that the config gives the model.

    Reads and validates the annotation files of DATASETS.COCO_FORMAT; call :func:`check_files` first.

    Raises:
        InputError: If a data set has more classes than the model, or orders them otherwise than another data set.
    """
    key = NUM_CLASSES.get(student_config(cfg).MODEL.META_ARCHITECTURE)
    if key is None:
        return
    model_classes = _look_up(cfg, key)
    classes = {name: _classes(name) for _, name in _used(cfg, train)}
    classes = {name: names for name, names in classes.items() if names}
    for name, names in classes.items():
        told = f"data set {name!r} has {len(names)} classes ({_shorten(names)})"
        if len(names) > model_classes:
            raise InputError(f"{key}: {model_classes} found, but {told}; set {key} to {len(names)}.")
        if len(names) < model_classes:
            logging.getLogger(__name__).warning("%s is %d, but %s.", key, model_classes, told)
        first, expected = next(iter(classes.items()))
        if any(a != b for a, b in zip(names, expected, strict=False)):
            raise InputError(
                f"DATASETS: {told}, but {first!r} has {_shorten(expected)}: a class must have the same index in both."
            )


def _read_entry(key: str, entry: Any, required: dict[str, Any], optional: dict[str, Any] | None = None) -> list[Any]:
    """The values of an entry, those of the required keys first."""
    optional = optional or {}
    allowed = ", ".join([*required, *optional])
    if not isinstance(entry, dict):
        raise InputError(f"{key}: {entry!r} found; a mapping with the keys {allowed} is needed.")
    for unknown in sorted(set(entry) - set(required) - set(optional)):
        raise InputError(f"{key}.{unknown}: unknown key; allowed are {allowed}.")
    for name, kind in required.items():
        if not isinstance(entry.get(name), kind) or entry[name] == "":
            found = f"{entry[name]!r} found" if name in entry else "missing"
            raise InputError(f"{key}.{name}: {found}; {'text' if kind is str else 'a list'} is needed.")
    return [entry[name] for name in required] + [entry.get(name, default) for name, default in optional.items()]


def _register(key: str, dataset: CocoFormat | VocFormat) -> None:
    if dataset.name not in DatasetCatalog:
        DatasetCatalog.register(dataset.name, dataset)
        MetadataCatalog.get(dataset.name).set(**dataset.metadata())
        return
    known = DatasetCatalog[dataset.name]
    if known == dataset:
        return
    if isinstance(known, (CocoFormat, VocFormat)):
        raise InputError(f"{key}: defined differently before, as {known}; choose another name or start a new process.")
    raise InputError(f"{key}: the name is taken, Detectron2 or other code has registered it; choose another name.")


def _used(cfg: CfgNode, train: bool) -> list[tuple[str, str]]:
    keys = ["TRAIN", "TEST"] if train else ["TEST"]
    return [(f"DATASETS.{key}", name) for key in keys for name in cfg.DATASETS[key]]


def _classes(name: str) -> list[str]:
    dataset = DatasetCatalog[name]
    return dataset.classes if isinstance(dataset, CocoFormat) else MetadataCatalog.get(name).get("thing_classes", [])


def _look_up(cfg: CfgNode, key: str) -> Any:
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def _shorten(names: list[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")


def _root() -> str:
    return os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))


def _resolve(path: str) -> str:
    return os.path.join(_root(), os.path.expanduser(path))
