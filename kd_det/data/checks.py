"""Checks of the data sets that a config names, before a model is built."""

import logging

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager

from kd_det.config import look_up, student_config
from kd_det.data.builtin import BUILTIN
from kd_det.data.datasets import class_names
from kd_det.data.paths import data_root
from kd_det.errors import InputError

NUM_CLASSES = {
    "GeneralizedRCNN": "MODEL.ROI_HEADS.NUM_CLASSES",
    "ImageClassifier": "MODEL.CLASSIFIER.NUM_CLASSES",
    "PanopticFPN": "MODEL.ROI_HEADS.NUM_CLASSES",
    "RetinaNet": "MODEL.RETINANET.NUM_CLASSES",
}
# What the metadata of Detectron2's own detection data sets names on the disk.
PATHS = ("json_file", "image_root", "dirname")


def check_files(cfg: CfgNode, *, train: bool = True) -> None:
    """Check that the data sets of DATASETS.TEST and, if `train`, of DATASETS.TRAIN are known and on the disk.

    Reads the annotations of DATASETS.VOC_FORMAT, too; those of COCO_FORMAT are read by :func:`check_num_classes`.

    Raises:
        InputError: If a data set is unknown, or a file or folder of it is missing.
    """
    for key, name in _used(cfg, train):
        if name not in DatasetCatalog:
            own = [*cfg.DATASETS.COCO_FORMAT, *cfg.DATASETS.VOC_FORMAT, *cfg.DATASETS.IMAGE_FOLDER]
            raise InputError(
                f"{key}: unknown data set {name!r}; besides Detectron2's own and {', '.join(BUILTIN)}, this config "
                f"defines {', '.join(own) or 'none'}. Define more in DATASETS.COCO_FORMAT, VOC_FORMAT or IMAGE_FOLDER."
            )
        dataset = DatasetCatalog[name]
        if hasattr(dataset, "check_files"):
            dataset.check_files()
            continue
        metadata = MetadataCatalog.get(name)
        for path in (getattr(metadata, attribute) for attribute in PATHS if attribute in metadata.as_dict()):
            if not PathManager.exists(path):
                raise InputError(
                    f"{path}: not found, but {key} names {name!r}. DETECTRON2_DATASETS is {data_root()!r}; "
                    "datasets/README.md shows what belongs there."
                )


def check_num_classes(cfg: CfgNode, *, train: bool = True) -> None:
    """Compare the classes of the data sets with each other and with the number that the config gives the model.

    Reads and validates the annotation files of DATASETS.COCO_FORMAT; call :func:`check_files` first.

    Raises:
        InputError: If a data set has more classes than the model, or orders them otherwise than another data set, or
            if it is one for detection and the model an image classifier, or the other way round.
    """
    architecture = student_config(cfg).MODEL.META_ARCHITECTURE
    key = NUM_CLASSES.get(architecture)
    if key is None:
        return
    for place, name in _used(cfg, train):
        kind = MetadataCatalog.get(name).get("evaluator_type", None)
        if kind and (kind == "classification") != (architecture == "ImageClassifier"):
            raise InputError(
                f"{place}: the evaluator_type of {name!r} is {kind!r}, which does not fit the model, {architecture}; "
                f"{'classification' if architecture == 'ImageClassifier' else 'a data set for detection'} is needed."
            )
    model_classes = look_up(cfg, key)
    classes = {name: class_names(name) for _, name in _used(cfg, train)}
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


def _used(cfg: CfgNode, train: bool) -> list[tuple[str, str]]:
    keys = ["TRAIN", "TEST"] if train else ["TEST"]
    return [(f"DATASETS.{key}", name) for key in keys for name in cfg.DATASETS[key]]


def _shorten(names: list[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
