"""Tests atomic writing, locks of folders, and the messages of file-system errors."""

import errno
import fcntl
import multiprocessing
import os
import signal
import socket
import threading
from pathlib import Path

import pytest
from children import FORKS, end

from kd_det import InputError, files
from kd_det.files import Lock, explain, naming, remove_unfinished, write_whole


# ---- Writing ----
def test_two_writers_of_one_file_do_not_mix(tmp_path):
    path = str(tmp_path / "file")
    contents = [bytes([number]) * 100_000 for number in range(4)]
    barrier = threading.Barrier(len(contents))

    def write(content):
        def half_and_half(file):
            file.write(content[:50_000])
            file.flush()
            barrier.wait()
            file.write(content[50_000:])

        write_whole(path, half_and_half)

    writers = [threading.Thread(target=write, args=(content,)) for content in contents]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert (tmp_path / "file").read_bytes() in contents
    assert [x.name for x in tmp_path.iterdir()] == ["file"]


def write_and_die(path):
    write_whole(path, lambda file: os.kill(os.getpid(), signal.SIGKILL))


def test_unfinished_files_of_killed_processes_are_removed(tmp_path):
    (tmp_path / "file").write_text("before")
    (tmp_path / "unfinished.partial").touch()  # As earlier versions named it.
    process = FORKS.Process(target=write_and_die, args=(str(tmp_path / "file"),))
    process.start()
    assert end(process) == [-signal.SIGKILL]
    assert len(list(tmp_path.iterdir())) == 3
    remove_unfinished(tmp_path)
    assert [x.read_text() for x in tmp_path.iterdir()] == ["before"]


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.ENOSPC, "No space left on device; make room on the disk"),
        (errno.EROFS, "Read-only file system; choose a place that can be written to"),
        (errno.EIO, "Input/output error; check the disk or the file server"),
    ],
)
def test_a_failed_write_says_why_and_what_to_do(tmp_path, monkeypatch, number, reason):
    def fail(handle):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.os, "fsync", fail)
    (tmp_path / "file").write_text("before")
    with pytest.raises(InputError) as error:
        write_whole(str(tmp_path / "file"), lambda file: file.write(b"after"))
    assert str(error.value) == f"{tmp_path}/file: cannot be written: {reason}. What was saved before is still there."
    assert [x.read_text() for x in tmp_path.iterdir()] == ["before"]


def test_an_error_without_a_file_gets_one(tmp_path):
    full = pytest.raises(OSError, match=r"No space left on device: '/dev/full'")
    with full as error, naming("/dev/full"), open("/dev/full", "w") as file:
        file.write("x")
    assert explain(error.value) == "No space left on device; make room on the disk"
    with pytest.raises(FileNotFoundError, match="no/such"), naming(tmp_path):
        Path("no/such").read_bytes()
    with pytest.raises(OSError, match=r"^not of a file system$"), naming(tmp_path):
        raise OSError("not of a file system")


# ---- One writer ----
def test_a_folder_has_one_writer(tmp_path):
    lock = Lock(tmp_path)
    with pytest.raises(BlockingIOError, match=f"process {os.getpid()} on {socket.gethostname()}$"):
        Lock(tmp_path)
    lock.release()
    Lock(tmp_path).release()


def lock_and_sleep(folder, ready):
    Lock(folder)
    ready.set()
    signal.pause()


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    ready = FORKS.Event()
    process = FORKS.Process(target=lock_and_sleep, args=(tmp_path, ready))
    process.start()
    assert ready.wait(20)
    with pytest.raises(BlockingIOError, match=f"process {process.pid} on "):
        Lock(tmp_path)
    process.kill()
    process.join()
    assert (tmp_path / ".lock").read_text().startswith(f"process {process.pid} ")
    Lock(tmp_path).release()


def begin_and_sleep(begin):
    begin.send("begun")
    signal.pause()


def test_forked_workers_do_not_hold_the_lock(tmp_path):
    """They may outlive a run that is killed."""
    lock = Lock(tmp_path)
    begun, begin = multiprocessing.Pipe(duplex=False)
    worker = multiprocessing.get_context("fork").Process(target=begin_and_sleep, args=(begin,))
    worker.start()
    try:
        lock.release()
        assert begun.recv() == "begun"
        Lock(tmp_path).release()
    finally:
        worker.kill()
        worker.join()


def test_a_file_system_may_lack_locks(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", fail)
    lock = Lock(tmp_path)
    assert lock.doubt == "No locks available"
    lock.release()
