"""The log of a run: everything in a file, and in the terminal what a user wants to see."""

import io
import logging
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from logging.handlers import MemoryHandler

from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

# Maps loggers of Detectron2 whose messages the terminal shows to what these look like; all others are details.
SHOWN = {
    "detectron2.utils.events": re.compile(""),  # Losses, time and learning rate.
    "detectron2.engine.train_loop": re.compile(""),
    "detectron2.engine.hooks": re.compile(""),
    "detectron2.evaluation.evaluator": re.compile(r"Inference done .* ETA=(?!0:00:)"),  # A minute or more is left.
    "fvcore.common.checkpoint": re.compile("Saving checkpoint"),
}


def start_logging(folder: str) -> None:
    """Log everything to ``log.txt`` in a folder, and to the terminal what a user wants to see.

    Args:
        folder: OUTPUT_DIR. Each process but the main one has a file of its own, and no terminal.
    """
    rank = comm.get_rank()
    # As Detectron2's default_setup calls it, which then finds these handlers and adds none.
    loggers = setup_logger(folder, distributed_rank=rank, name="fvcore"), setup_logger(folder, distributed_rank=rank)
    for logger in (*loggers, setup_logger(folder, distributed_rank=rank, name="kd_det")):
        for handler in logger.handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stdout:
                handler.addFilter(is_for_terminal)


def is_for_terminal(record: logging.LogRecord) -> bool:
    """Tell warnings, messages of this package and those of ``SHOWN`` from what only the log file needs."""
    if record.levelno >= logging.WARNING:
        return True
    if record.name.startswith("kd_det"):
        return record.levelno >= logging.INFO
    return record.name in SHOWN and bool(SHOWN[record.name].match(record.getMessage()))


@contextmanager
def kept_back() -> Iterator[list[logging.LogRecord]]:
    """Collect what is logged inside, before the log is started, instead of showing it; pass it to :func:`log_again`."""
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
    """Log what was kept back."""
    for record in records:
        logging.getLogger(record.name).handle(record)


@contextmanager
def printed_to_log(logger: logging.Logger) -> Iterator[None]:
    """Log what is printed inside, as pycocotools does, instead of showing it in the terminal."""
    text = io.StringIO()
    try:
        with redirect_stdout(text):
            yield
    finally:
        if text.getvalue():
            logger.debug("Printed:\n%s", text.getvalue().rstrip())
