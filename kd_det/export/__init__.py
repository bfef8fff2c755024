"""Loads the students of runs and exports them."""

from kd_det.export.exported_model import ExportedModel, is_exported
from kd_det.export.model_card import Origin
from kd_det.export.run_folder import find_run, load_student, read_student_config
from kd_det.export.sample import read_sample
from kd_det.export.student import Exported, export_student, header

__all__ = [
    "Exported",
    "ExportedModel",
    "Origin",
    "export_student",
    "find_run",
    "header",
    "is_exported",
    "load_student",
    "read_sample",
    "read_student_config",
]
