"""Keeps the labels of each finished image in a file, so that an interrupted labelling goes on where it was."""

import fcntl
import json
import os
from typing import Any, BinaryIO

from kd_det.errors import InputError

Entry = dict[str, Any]


class Journal:
    """Appends entries to a file, which survive if the process is killed.

    Its first line describes the task. An entry that was not written to its end is dropped when the file is opened
    again.

    Args:
        path: Path of the file.
        task: What is being done; entries of another task are not taken up.

    Attributes:
        entries: The entries, those of an earlier process first.

    Raises:
        InputError: If the file holds entries of another task, or another process writes to it.
        OSError: If the file cannot be written.
    """

    def __init__(self, path: str, task: Entry):
        self.path = path
        self.entries: list[Entry] = []
        self._file = open(path, "ab+")  # noqa: SIM115  # It stays open.
        try:
            self._lock()
            self._read(task)
        except BaseException:
            self._file.close()
            raise

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"{self.path}: another process is writing to it; wait until it ends.") from error
        except OSError:  # The file system has no locks.
            pass

    def _read(self, task: Entry) -> None:
        self._file.seek(0)
        lines, end = read_whole_lines(self._file)
        self._file.truncate(end)
        if not lines:
            self._write(task)
            return
        begun, *self.entries = lines
        differing = [key for key in task if begun.get(key) != task[key]]
        if differing:
            raise InputError(
                f"{self.path}: is of an interrupted run with other {', '.join(differing)}; delete it to begin anew, or "
                "choose another --output."
            )

    def append(self, entry: Entry) -> None:
        """Appends an entry and hands it to the operating system."""
        self._write(entry)
        self.entries.append(entry)

    def _write(self, entry: Entry) -> None:
        self._file.write(json.dumps(entry).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file, which stays there for a later run."""
        self._file.close()

    def remove(self) -> None:
        """Removes the file."""
        os.remove(self.path)
        self.close()


def read_whole_lines(file: BinaryIO) -> tuple[list[Entry], int]:
    """Reads JSON objects, one per line, up to the first line that is not whole; returns them and its position."""
    lines, end = [], file.tell()
    for line in file:
        try:
            entry = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            entry = None
        if not isinstance(entry, dict):
            break
        lines.append(entry)
        end += len(line)
    return lines, end
