"""Keep the terminal free of what a user cannot act on: warnings of third parties about each other's code."""

import logging
import os
import sys
import warnings

# Category and beginning of the message of warnings about the insides of installed packages.
SILENCED = (
    (FutureWarning, ""),
    (DeprecationWarning, ""),
    (UserWarning, "pkg_resources is deprecated as an API"),
    (UserWarning, "torch.meshgrid"),
)
# Loggers that warn of what a machine without a GPU lacks, and of a function that Detectron2 calls.
SILENCED_LOGGERS = ("torch.utils.cpp_extension", "torch.fx._symbolic_trace")


def silence_third_parties() -> None:
    """Ignore such warnings in this process and in those that it starts, unless Python was told what to do (``-W``)."""
    for name in SILENCED_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    if sys.warnoptions:
        return
    for category, message in SILENCED:
        warnings.filterwarnings("ignore", message, category)
    os.environ["PYTHONWARNINGS"] = ",".join(f"ignore:{message}:{category.__name__}" for category, message in SILENCED)
