"""Imports plugins for the command-line tools and reports errors in one line."""

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

from kd_det.engine.processes import end_with_tool
from kd_det.engine.quiet import silence_third_parties
from kd_det.errors import InputError, one_line
from kd_det.files import REMEDIES, explain, find_file_error

# Matches the start of a user error in another process's traceback, up to its message.
USER_ERROR = re.compile(
    r"^(?:kd_det\.errors\.\w+|FloatingPointError"
    rf"|\w+(?=: \[Errno (?:{'|'.join(map(str, REMEDIES))})\] )|\w+(?=: \[Errno \d+\] .*: '.*'$)): ",
    re.MULTILINE,
)
TERMINAL = (1, 2)  # These are the descriptors of stdout and stderr.
# Matches the message of a file-system error, with or without the file name.
FILE_ERROR = re.compile(r"\[Errno (\d+)\] (.*?)(?:: '(.*)')?")


def import_plugin(path: str) -> None:
    """Imports a Python file, so that it can register its heads, backbones and the like.

    Raises:
        InputError: If there is no such file, or its name does not end in ``.py``.
    """
    if not os.path.isfile(path):
        raise InputError(f"--plugin: there is no file {path}.")
    name = f"kd_det_plugin_{Path(path).stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise InputError(f"--plugin: {path} is not a Python file; its name must end in .py.")
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])


def run_tool(main: Callable[[], None]) -> None:
    """Runs a tool; an error that is not a defect ends it with one line and status 1, without a traceback.

    Such errors are a user's mistake, a file-system error such as a full disk, and a diverged loss. For interruptions
    see :mod:`kd_det.engine.interruption`.
    """
    silence_third_parties()
    if isinstance(sys.stdout, io.TextIOWrapper):  # A notebook's stdout is not one.
        sys.stdout.reconfigure(errors="backslashreplace")  # The encoding may not cover all printed text.
    end_with_tool()
    try:
        with plain_errors():
            main()
    except KeyboardInterrupt:  # End as if Python did not handle the signal.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except Exception as error:
        message = describe_error(error)
        if message is None:
            raise
        sys.exit(f"error: {message}")


def describe_error(error: BaseException) -> str | None:
    """Returns the message of an error in one line, or None for a defect, which should show its traceback."""
    cause = find_file_error(error)
    if cause is not None:
        return describe_file_error(cause)
    if isinstance(error, InputError | FloatingPointError):
        return find_message(str(error)) or one_line(str(error))
    # A data-loader worker's error arrives with its original type and its traceback as the message.
    return find_message(str(error)) if isinstance(error, OSError) else None


def find_message(traceback: str) -> str | None:
    """Returns the message of the user error at the end of another process's traceback, or None if there is none."""
    message = USER_ERROR.split(traceback)[-1].strip()
    if message == traceback.strip():
        return None
    match = FILE_ERROR.fullmatch(message)
    return describe_file_error(OSError(int(match[1]), match[2], match[3])) if match else one_line(message)


def describe_file_error(error: OSError) -> str:
    """Describes a file-system error: the file, the reason and what to do."""
    return ": ".join(filter(None, (os.fspath(error.filename or ""), f"{explain(error)}.")))


def is_defect(record: logging.LogRecord) -> bool:
    """Filters log records: drops errors that :func:`run_tool` already reports in one line."""
    error = record.exc_info[1] if record.exc_info else None
    return error is None or describe_error(error) is None


@contextmanager
def plain_errors() -> Iterator[None]:
    """Keeps the tracebacks of errors that are not defects out of the log and off the terminal."""
    logging.getLogger("detectron2.engine.train_loop").addFilter(is_defect)
    with (
        replaced_attribute(logging.Handler, "handleError", handle_log_error),
        replaced_attribute(threading, "excepthook", handle_thread_error),
    ):
        yield


@contextmanager
def replaced_attribute(owner: object, name: str, value: object) -> Iterator[None]:
    """Replaces an attribute of a class or module inside the block."""
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def handle_log_error(
    handler: logging.Handler,
    record: logging.LogRecord,
    report: Callable[[logging.Handler, logging.LogRecord], None] = logging.Handler.handleError,
) -> None:
    """Ends the run if its log file cannot be written; ignores a terminal that fails, since the file has its text.

    Args:
        handler: The handler that failed to write.
        record: The record that it failed to write.
        report: Function that reports other errors, which are defects.

    Raises:
        OSError: If a file cannot be written.
    """
    error, stream = sys.exc_info()[1], getattr(handler, "stream", None)
    if not isinstance(error, OSError) or stream is None:
        report(handler, record)
        return
    # Text left in the buffer would fail again at every flush.
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())
    if stream.fileno() not in TERMINAL:
        raise OSError(error.errno, error.strerror, stream.name) from error


def handle_thread_error(
    error: threading.ExceptHookArgs, report: Callable[[threading.ExceptHookArgs], object] = threading.excepthook
) -> None:
    """Ignores file-system errors in TensorBoard's thread: TensorBoard raises them again at the next write."""
    is_file_error = error.exc_value is not None and find_file_error(error.exc_value) is not None
    if not (is_file_error and type(error.thread).__module__.startswith("tensorboard.")):
        report(error)
