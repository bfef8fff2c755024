"""Writes files atomically, locks folders for one writer, and explains file-system errors in plain words."""

import errno
import fcntl
import os
import socket
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, ClassVar, TypeGuard

from kd_det.errors import InputError

# Maps error numbers of file systems to remedies. Other error numbers concern sockets, processes and the like.
REMEDIES = {
    errno.ENOSPC: "make room on the disk",
    errno.EDQUOT: "make room: the quota is used up",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f)",
    errno.EROFS: "choose a place that can be written to",
    errno.EACCES: "change the permissions, or choose another place",
    errno.EPERM: "change the permissions, or choose another place",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path: a part of it is a file, not a folder",
    errno.EISDIR: "check the path: it is a folder",
    errno.EEXIST: "choose another place, or remove what is there",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.ELOOP: "check the path: its symbolic links form a circle",
    errno.ENODEV: "choose another place",
    errno.ENXIO: "choose another place",
    errno.EIO: "check the disk or the file server",
    errno.ESTALE: "check the file server",
    errno.ENFILE: "close other programs: the machine has too many files open",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}
LOCK = ".lock"
# Error numbers of `flock` on a file system that does not support locks.
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


# ---- Writing ----
def write_whole(path: str, write: Callable[[BinaryIO], object]) -> None:
    """Writes a file under a temporary name in the same folder, flushes it to the disk, and renames it.

    Whenever the process or the machine dies, the path holds either the whole file or its previous content. The
    unfinished file stays in the folder under its temporary name; see :func:`remove_unfinished`.

    Args:
        path: Path of the file.
        write: Function that writes the content.

    Raises:
        InputError: If the disk is full or the file cannot be written; the path then still has its previous content.
    """
    folder = os.path.dirname(path)
    partial = os.path.join(folder, f"unfinished-{uuid.uuid4().hex}.partial")
    try:
        with open(partial, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        with suppress(OSError):
            os.remove(partial)
        cause = find_file_error(error)
        if cause is None:
            raise
        raise InputError(
            f"{path}: cannot be written: {explain(cause)}. What was saved before is still there."
        ) from error
    with suppress(OSError):  # Some file systems cannot flush a folder.
        handle = os.open(folder or ".", os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file atomically."""
    write_whole(str(path), lambda file: file.write(text.encode()))


def remove_unfinished(folder: str | Path) -> None:
    """Removes the unfinished files that killed processes left; no process may be in :func:`write_whole` there."""
    for path in Path(folder).glob("unfinished*.partial"):
        path.unlink(missing_ok=True)


# ---- Errors ----
def is_file_error(error: BaseException | None) -> TypeGuard[OSError]:
    """Returns whether an error comes from a file system: it names a file or has a number of ``REMEDIES``."""
    return isinstance(error, OSError) and (error.filename is not None or error.errno in REMEDIES)


def find_file_error(error: BaseException) -> OSError | None:
    """Returns the file-system error that an error is, or that torch.save hides behind its own, else None."""
    cause = error.__context__ if isinstance(error, RuntimeError) else error
    return cause if is_file_error(cause) else None


def explain(error: OSError) -> str:
    """Explains a file-system error and what to do about it."""
    return "; ".join(filter(None, (error.strerror or str(error), REMEDIES.get(error.errno or 0))))


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Adds this path to file-system errors in the body that name no file, such as that of a full disk."""
    try:
        yield
    except Exception as error:
        cause = find_file_error(error)
        if cause is None or cause.filename is not None:
            raise
        raise OSError(cause.errno, cause.strerror, str(path)) from error


# ---- One writer ----
class Lock:
    """Reserves a folder for one process, among the processes of all machines that share it, until it is released.

    The kernel releases the lock when the process ends, however it ends; the file that it leaves behind locks nothing.
    Processes that are forked meanwhile do not hold the lock.

    Args:
        folder: The folder, which must exist.

    Attributes:
        doubt: Reason why the file system may let other processes write there, too; empty if it does not.

    Raises:
        BlockingIOError: If another process holds the lock; the message names the process and its host.
        OSError: If the folder cannot be written to.
    """

    _held: ClassVar[set["Lock"]] = set()

    def __init__(self, folder: str | Path):
        self._file = os.open(os.path.join(folder, LOCK), os.O_RDWR | os.O_CREAT, 0o666)
        try:
            self.doubt = self._acquire()
        except OSError:
            os.close(self._file)
            raise
        self._held.add(self)

    def _acquire(self) -> str:
        doubt = ""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(self._file, 1000).decode(errors="replace").strip()
            raise BlockingIOError(error.errno, holder or "another process") from error
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            doubt = error.strerror or str(error)
        os.ftruncate(self._file, 0)
        os.write(self._file, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        return doubt

    def release(self) -> None:
        self._held.remove(self)
        os.close(self._file)

    @classmethod
    def _forget(cls) -> None:
        for lock in tuple(cls._held):
            lock.release()


os.register_at_fork(after_in_child=Lock._forget)
