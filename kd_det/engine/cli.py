"""Share what the command-line tools have in common: plugins, errors in one line."""

import importlib.util
import io
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from kd_det.engine.processes import end_with_tool
from kd_det.engine.quiet import silence_third_parties
from kd_det.errors import InputError
from kd_det.files import REMEDIES, explain, find_file_error

# Matches an error that is no defect in the traceback of another process, up to its message.
TOLD = re.compile(
    r"^(?:kd_det\.errors\.\w+|FloatingPointError"
    rf"|\w+(?=: \[Errno (?:{'|'.join(map(str, REMEDIES))})\] )|\w+(?=: \[Errno \d+\] .*: '.*'$)): ",
    re.MULTILINE,
)
TERMINAL = (1, 2)  # Descriptors of the standard streams.
# The message of an error of a file system, with or without the file.
FILE_ERROR = re.compile(r"\[Errno (\d+)\] (.*?)(?:: '(.*)')?")


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

    That is a user's mistake, an error of a file system, such as a full disk, or a diverged loss. For an interruption
    see :mod:`kd_det.engine.interruption`.
    """
    silence_third_parties()
    if isinstance(sys.stdout, io.TextIOWrapper):  # A notebook's is not.
        sys.stdout.reconfigure(errors="backslashreplace")  # Its encoding may lack a letter of what is printed.
    end_with_tool()
    try:
        with plain_errors():
            main()
    except KeyboardInterrupt:  # It ends as if Python did not handle the signal.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except Exception as error:
        message = tell(error)
        if message is None:
            raise
        sys.exit(f"error: {message}")


def tell(error: BaseException) -> str | None:
    """The message of an error in one line; None for a defect, which is to be shown with its traceback."""
    cause = find_file_error(error)
    if cause is not None:
        return tell_file_error(cause)
    if isinstance(error, InputError | FloatingPointError):
        return find_message(str(error)) or one_line(str(error))
    # A data loader's worker hands on the type of its error and the traceback.
    return find_message(str(error)) if isinstance(error, OSError) else None


def find_message(traceback: str) -> str | None:
    """The message of the error at the end of another process's traceback; None if there is none, or it is a defect."""
    message = TOLD.split(traceback)[-1].strip()
    if message == traceback.strip():
        return None
    found = FILE_ERROR.fullmatch(message)
    return tell_file_error(OSError(int(found[1]), found[2], found[3])) if found else one_line(message)


def tell_file_error(error: OSError) -> str:
    """What an error of a file system is about, and what to do."""
    return ": ".join(filter(None, (os.fspath(error.filename or ""), f"{explain(error)}.")))


def one_line(text: str) -> str:
    return " ".join(text.split())


def is_defect(record: logging.LogRecord) -> bool:
    """Whether a log record reports anything but an error that :func:`run_tool` reports itself."""
    return not (record.exc_info and tell(record.exc_info[1]) is not None)


@contextmanager
def plain_errors() -> Iterator[None]:
    """Keep tracebacks of errors that are no defects out of the log and off the terminal."""
    logging.getLogger("detectron2.engine.train_loop").addFilter(is_defect)
    with (
        patch.object(logging.Handler, "handleError", handle_log_error),
        patch.object(threading, "excepthook", handle_thread_error),
    ):
        yield


def handle_log_error(handler: logging.Handler, record: logging.LogRecord, report=logging.Handler.handleError) -> None:
    """End the run if its log file cannot be written. What the terminal cannot show is in that file.

    Args:
        handler: The handler that failed to write.
        record: What it was to write.
        report: Reports other errors, which are defects.

    Raises:
        OSError: If a file cannot be written.
    """
    error, stream = sys.exc_info()[1], getattr(handler, "stream", None)
    if not isinstance(error, OSError) or stream is None:
        report(handler, record)
        return
    # What is left in the buffer would fail again whenever it is flushed.
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())
    if stream.fileno() not in TERMINAL:
        raise OSError(error.errno, error.strerror, stream.name) from error


def handle_thread_error(error: threading.ExceptHookArgs, report=threading.excepthook) -> None:
    """Leave it to TensorBoard, whose thread meets a full disk, to raise the error again when it is next written to."""
    if find_file_error(error.exc_value) is None or not type(error.thread).__module__.startswith("tensorboard."):
        report(error)
