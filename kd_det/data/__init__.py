"""Data sets named in the config, reading of images, and synthetic scenes."""

from kd_det.data.checks import check_files, check_num_classes
from kd_det.data.datasets import (
    choose_images,
    class_names,
    count_training_images,
    known_class_names,
    register_datasets,
)
from kd_det.data.mapper import DetectionMapper

__all__ = [
    "DetectionMapper",
    "check_files",
    "check_num_classes",
    "choose_images",
    "class_names",
    "count_training_images",
    "known_class_names",
    "register_datasets",
]
