"""Silences warnings that a user cannot act on, which installed packages raise about each other's code."""

import logging
import os
import sys
import warnings

# Each entry is the category and the start of the message of a warning about the internals of installed packages.
SILENCED = (
    (FutureWarning, ""),
    (DeprecationWarning, ""),
    (UserWarning, "pkg_resources is deprecated as an API"),
    (UserWarning, "torch.meshgrid"),
)
# These loggers warn about missing GPUs and about a function that Detectron2 calls.
SILENCED_LOGGERS = ("torch.utils.cpp_extension", "torch.fx._symbolic_trace")


def silence_third_parties() -> None:
    """Ignores such warnings in this process and its children, unless the user gave Python a warning option (``-W``)."""
    for name in SILENCED_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    if sys.warnoptions:
        return
    for category, message in SILENCED:
        warnings.filterwarnings("ignore", message, category)
    os.environ["PYTHONWARNINGS"] = ",".join(f"ignore:{message}:{category.__name__}" for category, message in SILENCED)
