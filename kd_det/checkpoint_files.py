"""Read checkpoint files: safely, only if their checksums are right, and where that is enough, their header alone."""

import logging
import os
import textwrap
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kd_det.errors import UnreadableError

logger = logging.getLogger(__name__)


class Header(NamedTuple):
    """What a checkpoint says about itself.

    Attributes:
        run: Id of the run that wrote it; None in a file that was not written by a trainer.
        iteration: The iteration after which it was written; -1 in a file that does not say it.
    """

    run: str | None
    iteration: int


def load_safely(path: str, *, mmap: bool = False) -> Any:
    """Load a file of ``torch.save`` without running code from it."""
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)  # Before torch 2.6 False is the default.


def check_damage(path: str | Path) -> None:
    """Compare a file with its checksums; a file in a format that has none passes, and the log says so.

    Raises:
        UnreadableError: If the file is damaged or cannot be read.
    """
    with readable(path):
        with open(path, "rb") as file:
            zipped = file.read(2) == b"PK"
        if not zipped:
            logger.info("%s has no checksums: damage to its numbers would not be noticed.", path)
            return
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise zipfile.BadZipFile(f"the file is damaged: the checksum of {damaged} is wrong")


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of this package, its tensors only when they are used.

    Raises:
        UnreadableError: If it is damaged or cannot be loaded safely.
    """
    check_damage(path)
    with readable(path):
        return dict(load_safely(path, mmap=True))


def read_header(path: str | Path) -> Header:
    """Read who wrote a checkpoint and when, without reading its tensors.

    Raises:
        UnreadableError: If that part of the file is damaged or missing.
    """
    with readable(path):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith("/data.pkl"):
                    archive.read(name)  # Compares it with its checksum.
        data = load_safely(path, mmap=True)
        return Header(data.get("trainer", {}).get("run"), int(data.get("iteration", -1)))


@contextmanager
def readable(path: str | Path) -> Iterator[None]:
    """Turn whatever a broken or hostile file provokes into an UnreadableError."""
    try:
        yield
    except Exception as error:
        raise UnreadableError(
            f"{os.fspath(path)}: not a checkpoint that can be loaded safely: {type(error).__name__}: {reason(error)}"
        ) from error


def reason(error: Exception) -> str:
    """Pick the line of an error's message that says most, cut where it is long."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    # Of a state that does not fit, the first line only says so; the others have its keys.
    first = lines[1] if lines[0].endswith(":") and len(lines) > 1 else lines[0]
    return textwrap.shorten(next((line for line in lines if "unsupported" in line.lower()), first), 300)
