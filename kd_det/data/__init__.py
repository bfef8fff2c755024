"""Data sets named in the config, reading of images, and synthetic scenes."""

from kd_det.data.datasets import check_files, check_num_classes, register_datasets
from kd_det.data.mapper import DetectionMapper

__all__ = ["DetectionMapper", "check_files", "check_num_classes", "register_datasets"]
