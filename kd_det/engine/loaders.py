"""Builds mappers and data loaders for detectors and for image classifiers."""

from collections.abc import Callable

from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader, get_detection_dataset_dicts

from kd_det.classification import (
    ImageClassifier,
    build_classification_test_loader,
    build_classification_train_loader,
)
from kd_det.classification.image_mapper import ClassificationMapper
from kd_det.config import student_config
from kd_det.data import DetectionMapper
from kd_det.data.loader import build_detection_training_loader
from kd_det.data.proposals import proposal_files
from kd_det.data.workers import ignore_signals


def is_classifier(cfg: CfgNode) -> bool:
    """Checks whether a config's student is an image classifier."""
    return ImageClassifier.__name__ == student_config(cfg).MODEL.META_ARCHITECTURE


def build_test_mapper(cfg: CfgNode) -> Callable[[dict], dict]:
    """Builds the mapper that reads a record's image as the evaluation of the student does."""
    return (ClassificationMapper if is_classifier(cfg) else DetectionMapper)(cfg, is_train=False)


def build_train_loader(cfg: CfgNode):
    """Builds the loader of a run's training images."""
    if is_classifier(cfg):
        return build_classification_train_loader(cfg)
    return build_detection_training_loader(cfg)


def build_test_loader(cfg: CfgNode, dataset_name: str):
    """Builds the loader of a test set's images, whose workers ignore the signals that end a run."""
    if is_classifier(cfg):
        return build_classification_test_loader(cfg, dataset_name)
    with proposal_files(cfg, "TEST", [dataset_name]) as files:
        records = get_detection_dataset_dicts([dataset_name], filter_empty=False, proposal_files=files)
    mapper, workers = DetectionMapper(cfg, is_train=False), cfg.DATALOADER.NUM_WORKERS
    loader = build_detection_test_loader(records, mapper=mapper, num_workers=workers)
    loader.worker_init_fn = ignore_signals
    return loader
