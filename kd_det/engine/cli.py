"""Share what the command-line tools have in common: plugins, errors in one line."""

import errno
import importlib.util
import logging
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from kd_det.engine.quiet import silence_third_parties
from kd_det.errors import InputError

# How an error that is no defect begins in the traceback of another process.
TOLD = re.compile(
    r"^(?:kd_det\.errors\.\w+|FloatingPointError|(?:FileExists|IsADirectory|NotADirectory|Permission)Error"
    r"|OSError(?=: \[Errno (?:28|122)\])): ",
    re.MULTILINE,
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
    silence_third_parties()
    sys.stdout.reconfigure(errors="backslashreplace")  # Its encoding may lack a letter of what is printed.
    logging.getLogger("detectron2.engine.train_loop").addFilter(is_defect)
    try:
        main()
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
    if isinstance(error, InputError | FloatingPointError):
        return True
    from torch.multiprocessing import ProcessRaisedException

    return isinstance(error, ProcessRaisedException) and bool(TOLD.search(str(error)))


def is_defect(record: logging.LogRecord) -> bool:
    """Whether a log record tells of anything but what :func:`run_tool` tells itself."""
    return not (record.exc_info and is_told(record.exc_info[1]))
