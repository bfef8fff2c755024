"""The output folder of a run: it can be written to, and no other run writes there meanwhile."""

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
# The folders that a run writes into without a claim on them: its own, and some below it. A generation claims its own.
PARTS = ("", "pretrain", "peer_*")
_claims: dict[str, Lock] = {}


def claim(folder: str) -> None:
    """Make the output folder and keep other runs out of it, until :func:`release` or the end of this process.

    The main process does so for all, and all call it. A folder that this process has claimed stays claimed. What an
    earlier run left unfinished there when it was killed is removed.

    Raises:
        InputError: In all processes, if the folder cannot be written to, or another run writes there.
    """
    try:
        problem = "" if not comm.is_main_process() else _claim(folder)
    except (OSError, ValueError) as error:  # Python's for a path with a null byte.
        reason = explain(error) if isinstance(error, OSError) else str(error)
        problem = f"{folder}: cannot be written to: {reason}."
    problems = [found for found in comm.all_gather(problem) if found]
    if problems:
        raise InputError(f"OUTPUT_DIR: {problems[0]}")


def _claim(folder: str) -> str:
    """Claim the folder in this process; returns why not, if another run writes there."""
    os.makedirs(folder, exist_ok=True)
    key = os.path.realpath(folder)
    if key in _claims:
        return ""
    try:
        _claims[key] = Lock(folder)
    except BlockingIOError as error:
        return (
            f"{folder}: another run writes there, {error.strerror}; wait for its end, or end it, or choose another "
            "folder."
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
    """Let other runs write into a folder again."""
    lock = _claims.pop(os.path.realpath(folder), None)
    if lock:
        lock.release()


def claiming(train: Callable[..., None]) -> Callable[..., None]:
    """Let a function that trains what a config describes claim the output folder as long as it runs."""

    @functools.wraps(train)
    def run(cfg: CfgNode, **options) -> None:
        claim(cfg.OUTPUT_DIR)
        try:
            with naming(cfg.OUTPUT_DIR):
                train(cfg, **options)
        finally:
            release(cfg.OUTPUT_DIR)

    return run
