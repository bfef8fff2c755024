"""Claims the output folder of a run: checks that it is writable and keeps other runs out of it."""

import functools
import logging
import os
from collections.abc import Callable
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.utils import comm

from kd_det.errors import InputError
from kd_det.files import Lock, explain, naming, remove_unfinished

logger = logging.getLogger(__name__)
# A claim covers these folders: the run's own and some below it. A generation claims its own folder.
PARTS = ("", "pretrain", "peer_*")
_claims: dict[str, Lock] = {}


def claim(folder: str) -> None:
    """Makes the output folder and keeps other runs out of it, until :func:`release` or the end of this process.

    All processes call it, and the main process acts for all of them. A folder that this process has already claimed
    stays claimed. Unfinished files of an earlier run that was killed are removed.

    Raises:
        InputError: In all processes, if the folder cannot be written to, or another run writes there.
    """
    try:
        problem = "" if not comm.is_main_process() else _claim(folder)
    except (OSError, ValueError) as error:  # Python raises ValueError for a path with a null byte.
        reason = explain(error) if isinstance(error, OSError) else str(error)
        problem = f"{folder}: cannot be written to: {reason}."
    problems = [message for message in comm.all_gather(problem) if message]
    if problems:
        raise InputError(f"OUTPUT_DIR: {problems[0]}")


def _claim(folder: str) -> str:
    """Claims the folder in this process; returns the reason if another run writes there, and "" otherwise."""
    os.makedirs(folder, exist_ok=True)
    key = os.path.realpath(folder)
    if key in _claims:
        return ""
    try:
        _claims[key] = Lock(folder)
    except BlockingIOError as error:
        return (
            f"{folder}: another run is writing there, {error.strerror}; wait until it ends, end it, or choose "
            "another folder."
        )
    if _claims[key].doubt:
        logger.warning(
            "OUTPUT_DIR: the file system of %s cannot lock files (%s); make sure that no other run writes there.",
            folder,
            _claims[key].doubt,
        )
    for part in PARTS:
        for path in Path(folder).glob(part) if part else [folder]:
            remove_unfinished(path)
    return ""


def release(folder: str) -> None:
    """Allows other runs to write into a folder again."""
    lock = _claims.pop(os.path.realpath(folder), None)
    if lock:
        lock.release()


def claiming(train: Callable[..., None]) -> Callable[..., None]:
    """Decorates a training function: it claims the output folder of its config while it runs."""

    @functools.wraps(train)
    def run(cfg: CfgNode, **options) -> None:
        claim(cfg.OUTPUT_DIR)
        try:
            with naming(cfg.OUTPUT_DIR):
                train(cfg, **options)
        finally:
            release(cfg.OUTPUT_DIR)

    return run
