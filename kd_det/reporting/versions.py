"""Names the versions of the software that a report comes from."""

import platform

import detectron2
import torch
import torchvision

import kd_det


def describe_versions() -> str:
    """Returns the versions of kd_det and of what it stands on, one per line."""
    versions = {
        "kd_det": kd_det.__version__,
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "detectron2": detectron2.__version__,
        "platform": platform.platform(),
    }
    return "\n".join(f"{name:12} {version}" for name, version in versions.items())
