"""Registers and checks the data sets that a config names, reads images, and draws synthetic scenes."""

from kd_det.data.checks import check_annotations, check_files, check_num_classes
from kd_det.data.coco_evaluator import CocoEvaluator
from kd_det.data.datasets import (
    choose_images,
    class_names,
    count_training_images,
    known_class_names,
    register_datasets,
)
from kd_det.data.mapper import DetectionMapper

__all__ = [
    "CocoEvaluator",
    "DetectionMapper",
    "check_annotations",
    "check_files",
    "check_num_classes",
    "choose_images",
    "class_names",
    "count_training_images",
    "known_class_names",
    "register_datasets",
]
