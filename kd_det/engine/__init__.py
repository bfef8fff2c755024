"""What runs a training: the trainer with its hooks and stages, set-up, evaluation, and the processes of a run."""

from kd_det.engine.cli import add_distillation_arguments, import_plugin, run_tool
from kd_det.engine.loaders import build_test_mapper, is_classifier
from kd_det.engine.setup import check_run, setup
from kd_det.engine.trainer import Trainer

__all__ = [
    "Trainer",
    "add_distillation_arguments",
    "build_test_mapper",
    "check_run",
    "import_plugin",
    "is_classifier",
    "run_tool",
    "setup",
]
