"""Where data sets lie: the folder that DETECTRON2_DATASETS names."""

import os


def data_root() -> str:
    """The folder below which relative paths lie, as in Detectron2: $DETECTRON2_DATASETS, or ``datasets``."""
    return os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))


def resolve(path: str) -> str:
    """An absolute path as it is, ``~`` expanded, a relative one below :func:`data_root`."""
    return os.path.join(data_root(), os.path.expanduser(path))
