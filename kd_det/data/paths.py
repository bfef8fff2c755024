"""Resolves the paths of data sets relative to the folder that DETECTRON2_DATASETS names."""

import os


def data_root() -> str:
    """Returns the folder that relative paths start from, as in Detectron2: $DETECTRON2_DATASETS, or ``datasets``."""
    return os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))


def resolve(path: str) -> str:
    """Expands ``~`` in a path, and puts a relative path below :func:`data_root`."""
    return os.path.join(data_root(), os.path.expanduser(path))
