"""Knowledge distillation of object detectors and instance segmenters for Detectron2.

The first use of a name below registers all meta-architectures, distillation heads, taps and backbones of this package.
Importing the package alone is quick and registers nothing.
"""

from typing import TYPE_CHECKING

from kd_det.lazy import lazy_names

if TYPE_CHECKING:
    from kd_det.class_partition import ClassPartition
    from kd_det.classification import ImageClassifier
    from kd_det.config import add_kd_config
    from kd_det.errors import InputError
    from kd_det.heads import build_kd_heads
    from kd_det.meta_arch import TeacherStudent
    from kd_det.mutual import MutualStudents
    from kd_det.registry import KD_HEAD_REGISTRY, TAP_REGISTRY, WRAPPER_REGISTRY
    from kd_det.signals import Batch, Signals
    from kd_det.teacher import Teacher, build_teacher
    from kd_det.wrapper import StudentWrapper

__version__ = "0.1.0"

__all__ = [
    "KD_HEAD_REGISTRY",
    "TAP_REGISTRY",
    "WRAPPER_REGISTRY",
    "Batch",
    "ClassPartition",
    "ImageClassifier",
    "InputError",
    "MutualStudents",
    "Signals",
    "StudentWrapper",
    "Teacher",
    "TeacherStudent",
    "add_kd_config",
    "build_kd_heads",
    "build_teacher",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    (
        "backbones",
        "class_partition",
        "classification",
        "config",
        "errors",
        "heads",
        "meta_arch",
        "mutual",
        "registry",
        "signals",
        "teacher",
        "wrapper",
    ),
)
