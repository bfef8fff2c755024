"""Checks the data sets that a config names, before a model is built."""

import logging
from collections.abc import Iterator

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager

from kd_det.config import look_up, student_config
from kd_det.data.builtin import BUILTIN
from kd_det.data.coco_format import CocoFormat
from kd_det.data.datasets import class_names
from kd_det.data.paths import data_root
from kd_det.data.voc_format import voc_dataset
from kd_det.errors import InputError, shorten

logger = logging.getLogger(__name__)
NUM_CLASSES = {
    "GeneralizedRCNN": "MODEL.ROI_HEADS.NUM_CLASSES",
    "ImageClassifier": "MODEL.CLASSIFIER.NUM_CLASSES",
    "PanopticFPN": "MODEL.ROI_HEADS.NUM_CLASSES",
    "RetinaNet": "MODEL.RETINANET.NUM_CLASSES",
}
# Metadata of Detectron2's own detection data sets that names files and folders.
PATHS = ("json_file", "image_root", "dirname", "sem_seg_root")
SEGMENTING = ("PanopticFPN", "SemanticSegmentor")
# Number of keypoints of a person in COCO; COCOeval has default scales for them.
COCO_KEYPOINTS = 17


def check_files(cfg: CfgNode, *, train: bool = True) -> None:
    """Checks that the data sets of DATASETS.TEST and, if `train`, of DATASETS.TRAIN are known and on the disk.

    This also reads the annotations of DATASETS.VOC_FORMAT; :func:`check_num_classes` reads those of COCO_FORMAT.

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
    """Compares the classes of the data sets with each other and with the model's number of classes.

    Reads and validates the annotation files of DATASETS.COCO_FORMAT and of Detectron2's own VOC data sets; call
    :func:`check_files` first.

    Raises:
        InputError: If a data set has more classes than the model, orders them differently from another data set, or is
            made for detection while the model is an image classifier, or the reverse; if the classes of pixels of a
            semantic segmentation are not as many as the model's.
    """
    architecture = student_config(cfg).MODEL.META_ARCHITECTURE
    if architecture in SEGMENTING:
        _check_stuff(cfg, train)
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
        if kind == "pascal_voc" and not hasattr(DatasetCatalog[name], "check_files"):
            voc_dataset(name).check_files()
    model_classes = look_up(cfg, key)
    classes = {name: class_names(name) for _, name in _used(cfg, train)}
    classes = {name: names for name, names in classes.items() if names}
    for name, names in classes.items():
        text = f"data set {name!r} has {len(names)} classes ({shorten(names, 8)})"
        if len(names) > model_classes:
            raise InputError(f"{key}: {model_classes} found, but {text}; set {key} to {len(names)}.")
        if len(names) < model_classes:
            logger.warning("%s is %d, but %s; no evaluation counts the others.", key, model_classes, text)
        first, expected = next(iter(classes.items()))
        if any(a != b for a, b in zip(names, expected, strict=False)):
            raise InputError(
                f"DATASETS: {text}, but {first!r} has {shorten(expected, 8)}: a class must have the same index in both."
            )


def _check_stuff(cfg: CfgNode, train: bool) -> None:
    """Compares the classes of the pixels of all data sets with each other and with the model's number of them."""
    key, count = "MODEL.SEM_SEG_HEAD.NUM_CLASSES", cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    expected: list[str] = []
    for place, name in _used(cfg, train):
        names = class_names(name, "stuff_classes")
        if names and len(names) != count:
            raise InputError(
                f"{key}: {count} found, but data set {name!r} has {len(names)} classes of pixels "
                f"({shorten(names, 8)}); set {key} to {len(names)}."
            )
        expected = expected or names or []
        if names and names != expected:
            raise InputError(
                f"{place}: the classes of pixels of {name!r} are {shorten(names, 8)}, those of another data set "
                f"{shorten(expected, 8)}: all need the same ones in the same order."
            )


def check_annotations(cfg: CfgNode, *, train: bool = True) -> None:
    """Checks that the data sets have the annotations that the training and the evaluation of the model need.

    If `train`, this reads all annotations of DATASETS.TEST, which a training run would otherwise read only at its end.

    Raises:
        InputError: If masks or keypoints are missing or do not fit the config, or an annotation file is wrong.
    """
    for place, dataset in _used_coco(cfg, train):
        _check_objects(cfg, place, dataset)
        if cfg.MODEL.MASK_ON:
            _check_masks(cfg, place, dataset)
    if cfg.MODEL.KEYPOINT_ON:
        _check_keypoints(cfg, train)
    for name in cfg.DATASETS.TEST if train else ():
        _check_test_images(name)


def _check_test_images(name: str) -> None:
    """Checks a registered test set for faults that Detectron2 would only report after the training."""
    records, classes = DatasetCatalog.get(name), class_names(name)
    if not records:
        raise InputError(f"DATASETS.TEST: {name!r} has no images.")
    if MetadataCatalog.get(name).get("evaluator_type", None) in ("sem_seg", "coco_panoptic_seg"):
        without = [record["file_name"] for record in records if "sem_seg_file_name" not in record]
        if without:
            raise InputError(
                f"DATASETS.TEST: {without[0]} in {name!r} has no sem_seg_file_name, the image of its labels."
            )
    for record in records if classes else ():
        for annotation in record.get("annotations", ()):
            if not 0 <= annotation["category_id"] < len(classes):
                raise InputError(
                    f"DATASETS.TEST: {name!r} has an object of category_id {annotation['category_id']} in "
                    f"{record['file_name']}; its {len(classes)} classes are counted from 0."
                )


def _check_objects(cfg: CfgNode, place: str, dataset: CocoFormat) -> None:
    contents = dataset.contents
    if contents.objects:
        return
    crowds = contents.annotations and f": all {contents.annotations} annotations have iscrowd 1 or unknown images"
    message = f"{place}: {dataset.name!r} has no objects{crowds or ''} ({dataset.json_file})"
    if place == "DATASETS.TRAIN" and cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
        raise InputError(f"{message}; DATALOADER.FILTER_EMPTY_ANNOTATIONS leaves out images without objects.")
    logger.warning("%s: %s.", message, "nothing to learn from" if place == "DATASETS.TRAIN" else "its AP will be nan")


def _check_masks(cfg: CfgNode, place: str, dataset: CocoFormat) -> None:
    without, rle = dataset.contents.without_mask, dataset.contents.with_rle
    if without:
        raise InputError(
            f"{dataset.json_file}: {len(without)} of {dataset.contents.objects} objects have no segmentation, the "
            f"first is annotations[{without[0]}], but MODEL.MASK_ON asks for masks."
        )
    if rle and place == "DATASETS.TRAIN" and cfg.INPUT.MASK_FORMAT == "polygon":
        raise InputError(
            f"INPUT.MASK_FORMAT: 'polygon' found, but {len(rle)} of {dataset.contents.objects} objects of "
            f"{dataset.json_file} have RLE masks, the first is annotations[{rle[0]}]; set INPUT.MASK_FORMAT to bitmask."
        )


def _check_keypoints(cfg: CfgNode, train: bool) -> None:
    """Compares the keypoints of all data sets with each other, with the model and with the evaluation's scales."""
    count, expected = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS, None
    for place, name in _used(cfg, train):
        names = _keypoint_names(place, name)
        if len(names) != count:
            raise InputError(
                f"MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS: {count} found, but data set {name!r} has {len(names)} "
                f"keypoints ({shorten(names, 8)})."
            )
        if names != (expected := expected or names):
            raise InputError(
                f"{place}: data set {name!r} has the keypoints {shorten(names, 8)}, another one "
                f"{shorten(expected, 8)}: all need the same ones in the same order."
            )
        if train and not _keypoint_pairs(name) and cfg.INPUT.RANDOM_FLIP == "horizontal":
            logger.warning("%s: %r has no FLIP_PAIRS; its keypoints keep their names in mirrored images.", place, name)
    sigmas = cfg.TEST.KEYPOINT_OKS_SIGMAS
    if cfg.DATASETS.TEST and (len(sigmas) or COCO_KEYPOINTS) != count:
        raise InputError(
            f"TEST.KEYPOINT_OKS_SIGMAS: {len(sigmas)} values found; the evaluation needs one for each of the {count} "
            f"keypoints (none where they are the {COCO_KEYPOINTS} of COCO's persons)."
        )
    for place, dataset in _used_coco(cfg, train=False):
        if not dataset.contents.annotations:
            raise InputError(f"{place}: {dataset.name!r} has no annotations; the evaluation of keypoints needs some.")


def _keypoint_names(place: str, name: str) -> list[str]:
    dataset = DatasetCatalog[name]
    known = dataset.contents.keypoints if isinstance(dataset, CocoFormat) else [_metadata(name, "keypoint_names")]
    if len(known) > 1:
        first, second, *_ = known
        raise InputError(
            f"{dataset.json_file}: its categories have different keypoints ({shorten(first, 8)}; "
            f"{shorten(second, 8)}); MODEL.KEYPOINT_ON needs the same ones."
        )
    if not any(known):
        raise InputError(
            f"{place}: data set {name!r} names no keypoints, which MODEL.KEYPOINT_ON needs; a COCO file has them as "
            "keypoints of its categories."
        )
    return list(known[0])


def _keypoint_pairs(name: str) -> list[tuple[str, str]]:
    dataset = DatasetCatalog[name]
    return dataset.keypoint_pairs if isinstance(dataset, CocoFormat) else _metadata(name, "keypoint_flip_map")


def _metadata(name: str, key: str) -> list:
    return MetadataCatalog.get(name).get(key, [])


def _used_coco(cfg: CfgNode, train: bool) -> Iterator[tuple[str, CocoFormat]]:
    for place, name in _used(cfg, train):
        if isinstance(DatasetCatalog[name], CocoFormat):
            yield place, DatasetCatalog[name]


def _used(cfg: CfgNode, train: bool) -> list[tuple[str, str]]:
    keys = ["TRAIN", "TEST"] if train else ["TEST"]
    return [(f"DATASETS.{key}", name) for key in keys for name in cfg.DATASETS[key]]
