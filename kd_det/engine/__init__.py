"""Runs a training: contains the trainer with its hooks and stages, set-up, evaluation and process handling."""

from typing import TYPE_CHECKING

from kd_det.lazy import lazy_names

if TYPE_CHECKING:
    from kd_det.engine.arguments import add_distillation_arguments
    from kd_det.engine.cli import import_plugin, run_tool
    from kd_det.engine.loaders import build_test_mapper, is_classifier
    from kd_det.engine.run_config import check_run, setup
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

__getattr__, __dir__ = lazy_names(__name__, ("arguments", "cli", "loaders", "run_config", "trainer"))
