"""Files that a reader sees whole, or not at all."""

import os
from collections.abc import Callable
from contextlib import suppress
from typing import BinaryIO

from kd_det.errors import InputError


def write_whole(path: str, write: Callable[[BinaryIO], object]) -> None:
    """Write a file beside its place, flush it to the disk, and rename it.

    Whenever the process or the machine dies, the path holds all of the file, or what it held before. What was written
    till then is ``unfinished.partial`` in the same folder, which the next file overwrites.

    Args:
        path: Path of the file.
        write: Writes its content.

    Raises:
        InputError: If the disk is full or the file cannot be written; the path still holds what it held before.
    """
    folder = os.path.dirname(path)
    partial = os.path.join(folder, "unfinished.partial")
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        with suppress(OSError):
            os.remove(partial)
        # torch.save may hide it behind an error of its own.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise InputError(
            f"{path}: cannot be written: {cause.strerror or cause}; what was saved before is still there."
        ) from error
    with suppress(OSError):  # Some file systems cannot flush a folder.
        handle = os.open(folder or ".", os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
