"""Reads checkpoint files safely and verifies their checksums; can also read only the header."""

import logging
import os
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

from kd_det.errors import UnreadableError, reason

logger = logging.getLogger(__name__)
# Keys under which files store their weights; these may be nested.
CONTAINERS = ("model", "state_dict", "model_state_dict")
# A zip file that unpacks to more than this many times its own size is refused.
LARGEST_RATIO = 10


class Header(NamedTuple):
    """Describes the origin of a checkpoint.

    Attributes:
        run: Id of the run that wrote it; None in a file that was not written by a trainer.
        iteration: The iteration after which it was written; -1 in a file that does not record it.
    """

    run: str | None
    iteration: int


def load_safely(path: str | Path, *, mmap: bool = False) -> Any:
    """Loads a file of ``torch.save``, or ``.safetensors``, without running code in it."""
    if os.fspath(path).endswith(".safetensors"):  # Not every torch reads these itself.
        return load_file(path)
    # Before torch 2.6, weights_only is False by default.
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def check_damage(path: str | Path) -> None:
    """Checks a file against its checksums; a file without checksums passes, which is logged.

    Raises:
        UnreadableError: If the file is damaged or cannot be read.
    """
    with readable(path):
        with open(path, "rb") as file:
            begin = file.read(2)
        if not begin:
            raise EOFError("the file is empty")
        if begin != b"PK":
            logger.info("%s has no checksums: damage to its numbers would not be noticed.", path)
            return
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
            if size > LARGEST_RATIO * os.path.getsize(path):
                raise zipfile.BadZipFile(f"it would unpack to {size} bytes, more than {LARGEST_RATIO} times its size")
            damaged = archive.testzip()
        if damaged:
            raise zipfile.BadZipFile(f"the file is damaged: the checksum of {damaged} is wrong")


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint of this package; its tensors are read when they are used.

    Raises:
        UnreadableError: If it is damaged or cannot be loaded safely.
    """
    check_damage(path)
    with readable(path):
        return dict(load_safely(path, mmap=True))


def read_header(path: str | Path) -> Header:
    """Reads which run wrote a checkpoint and after which iteration, without reading its tensors.

    Raises:
        UnreadableError: If that part of the file is damaged or missing.
    """
    with readable(path):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith("/data.pkl"):
                    archive.read(name)  # This checks its checksum.
        data = load_safely(path, mmap=True)
        return Header(data.get("trainer", {}).get("run"), int(data.get("iteration", -1)))


@contextmanager
def readable(path: str | Path) -> Iterator[None]:
    """Turns any error that a broken or malicious file causes into an UnreadableError."""
    try:
        yield
    except Exception as error:
        path = os.fspath(path)
        raise UnreadableError(f"{path}: not a checkpoint that can be loaded safely: {explain(path, error)}") from error


def explain(path: str, error: Exception) -> str:
    """Explains why a file cannot be read, and if it holds objects, how to extract its weights."""
    unsafe = re.search(r"GLOBAL ([\w.]+)", str(error))
    if not unsafe:
        return f"{type(error).__name__}: {reason(error)}"
    command = conversion(path, "torch.save(d, 'weights.pth')", safe=False)
    return f"it holds {unsafe[1]}, which could run code. If you trust its author, take the weights out once: {command}"


def conversion(path: str, rest: str, *, safe: bool) -> str:
    """Returns a shell command that reads the weights of a file as ``d`` and then runs `rest`."""
    return (
        f"python -c \"import torch; d = torch.load({path!r}, map_location='cpu', weights_only={safe}); "
        f'd = next((d[k] for k in {CONTAINERS} if k in d), d); {rest}"'
    )
