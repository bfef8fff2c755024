"""Sets up the log of a run: everything goes to a file, and the terminal shows what a user wants to see."""

import io
import logging
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from logging.handlers import MemoryHandler

from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

# Maps Detectron2's loggers to the messages that the terminal shows; all other messages are details.
SHOWN = {
    "detectron2.utils.events": re.compile(""),  # Show losses, times and learning rates.
    "detectron2.engine.train_loop": re.compile(""),
    "detectron2.engine.hooks": re.compile(""),
    # Show the progress of an evaluation while at least a minute is left.
    "detectron2.evaluation.evaluator": re.compile(r"Inference done .* ETA=(?!0:00:)"),
    "fvcore.common.checkpoint": re.compile("Saving checkpoint"),
}


def start_logging(folder: str) -> None:
    """Logs everything to ``log.txt`` in a folder, and what a user wants to see to the terminal.

    Args:
        folder: OUTPUT_DIR. Every process except the main one logs to its own file and not to the terminal.
    """
    rank = comm.get_rank()
    # The arguments equal those in Detectron2's default_setup, which then finds these handlers and adds none.
    loggers = setup_logger(folder, distributed_rank=rank, name="fvcore"), setup_logger(folder, distributed_rank=rank)
    for logger in (*loggers, setup_logger(folder, distributed_rank=rank, name="kd_det")):
        for handler in logger.handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stdout:
                handler.addFilter(is_for_terminal)


def is_for_terminal(record: logging.LogRecord) -> bool:
    """Filters log records: keeps warnings, messages of this package and those in ``SHOWN``."""
    if record.levelno >= logging.WARNING:
        return True
    if record.name.startswith("kd_det"):
        return record.levelno >= logging.INFO
    return record.name in SHOWN and bool(SHOWN[record.name].match(record.getMessage()))


@contextmanager
def deferring_log() -> Iterator[list[logging.LogRecord]]:
    """Collects messages instead of showing them until the log is started; :func:`log_again` then logs them."""
    handler = MemoryHandler(capacity=sys.maxsize, flushLevel=sys.maxsize)
    loggers = [logging.getLogger(name) for name in ("detectron2", "kd_det")]
    before = [logger.propagate for logger in loggers]
    for logger in loggers:
        logger.propagate = False
        logger.addHandler(handler)
    try:
        yield handler.buffer
    finally:
        for logger, propagate in zip(loggers, before, strict=True):
            logger.propagate = propagate
            logger.removeHandler(handler)


def log_again(records: Iterable[logging.LogRecord]) -> None:
    """Logs the messages that :func:`deferring_log` has collected."""
    for record in records:
        logging.getLogger(record.name).handle(record)


@contextmanager
def printed_to_log(logger: logging.Logger) -> Iterator[None]:
    """Redirects text printed inside the block, as pycocotools prints it, from the terminal to the log."""
    text = io.StringIO()
    try:
        with redirect_stdout(text):
            yield
    finally:
        if text.getvalue():
            logger.debug("Printed:\n%s", text.getvalue().rstrip())
