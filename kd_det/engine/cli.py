"""Share what the command-line tools have in common: arguments, plugins, errors in one line."""

import argparse
import errno
import importlib.util
import logging
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from kd_det.engine.interruption import INTERRUPTED
from kd_det.errors import InputError

# How an error that is no defect begins in the traceback of another process.
TOLD = re.compile(
    r"^(?:kd_det\.errors\.\w+|FloatingPointError|(?:FileExists|IsADirectory|NotADirectory|Permission)Error"
    r"|OSError(?=: \[Errno (?:28|122)\])): ",
    re.MULTILINE,
)


def add_distillation_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that turn any Detectron2 config into a distillation run."""
    group = parser.add_argument_group("distillation")
    group.add_argument("--teacher", metavar="CONFIG", help="the teacher's config: a file, or a name of the model zoo")
    group.add_argument(
        "--teacher-weights", metavar="FILE", help="the teacher's checkpoint, if its config names another"
    )
    group.add_argument(
        "--kd-heads", metavar="HEAD,...", help="distillation heads, for example ReviewKDHead,SoftTargetHead"
    )
    group.add_argument(
        "--plugin",
        action="append",
        default=[],
        metavar="FILE",
        help="Python file to import first: registers heads of yours",
    )


def import_plugin(path: str) -> None:
    """Import a Python file for what it registers.

    Raises:
        InputError: If there is no such file, or its name does not end in ``.py``.
    """
    if not os.path.isfile(path):
        raise InputError(f"--plugin: there is no file {path}.")
    name = f"kd_det_plugin_{Path(path).stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None:
        raise InputError(f"--plugin: {path} is no Python file; its name must end in .py.")
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])


def run_tool(main: Callable[[], None]) -> None:
    """Run a tool; what is no defect ends it with one line and status 1, without a traceback.

    That is a user's mistake, a path that cannot be what it is used for, a diverged loss or a full disk. For an
    interruption see :mod:`kd_det.engine.interruption`.
    """
    logging.getLogger("detectron2.engine.train_loop").addFilter(is_defect)
    try:
        main()
    except ProcessExitedException as error:
        if error.exit_code != INTERRUPTED:
            raise
        sys.exit(INTERRUPTED)
    except Exception as error:
        if not is_told(error):
            raise
        sys.exit(f"error: {tell(str(error))}")


def tell(message: str) -> str:
    """The message of an error in one line; from another process it comes behind that one's traceback."""
    return " ".join(TOLD.split(message)[-1].split())


def is_told(error: BaseException) -> bool:
    """Whether :func:`run_tool` tells an error in one line."""
    if isinstance(error, OSError):
        wrong_place = FileExistsError | IsADirectoryError | NotADirectoryError | PermissionError
        return isinstance(error, wrong_place) or error.errno in (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, ProcessRaisedException):
        return bool(TOLD.search(str(error)))
    return isinstance(error, InputError | FloatingPointError)


def is_defect(record: logging.LogRecord) -> bool:
    """Whether a log record tells of anything but what :func:`run_tool` tells itself."""
    return not (record.exc_info and is_told(record.exc_info[1]))
