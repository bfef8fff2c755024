"""Tests how a tool ends: in one line that names the file and a remedy, or with a defect's traceback."""

import errno
import logging
import os
import signal
import threading

import pytest
from children import FORKS, end
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter

from kd_det import InputError
from kd_det.engine import run_tool
from kd_det.engine.cli import describe_error, find_message

READ_ONLY = OSError(errno.EROFS, "Read-only file system", "/mnt/x")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (READ_ONLY, "/mnt/x: Read-only file system; choose a place that can be written to."),
        (FileNotFoundError(2, "No such file or directory", "no/x"), "no/x: No such file or directory; check the path."),
        (OSError(28, "No space left on device"), "No space left on device; make room on the disk."),
        (OSError(errno.ENOTTY, "Inappropriate ioctl for device", "x"), "x: Inappropriate ioctl for device."),
        (InputError("KD.X: got 1;\n allowed is 2."), "KD.X: got 1; allowed is 2."),
        (FloatingPointError("iteration 3: loss_cls is nan"), "iteration 3: loss_cls is nan"),
        (OSError("a defect"), None),
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), None),
        (RuntimeError("a defect"), None),
    ],
)
def test_user_errors_are_described_in_one_line(error, line):
    assert describe_error(error) == line


def test_file_error_that_torch_hides_is_found(tmp_path):
    error = RuntimeError("unexpected pos 64 vs 0")
    error.__context__ = OSError(errno.ENOSPC, "No space left on device", "x")
    assert describe_error(error) == "x: No space left on device; make room on the disk."


class Broken:
    def __init__(self, error):
        self.error = error

    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise self.error


@pytest.mark.parametrize("error", [READ_ONLY, FileNotFoundError(2, "No such file or directory", "a.png")])
def test_worker_error_is_described_like_one_in_the_run(error):
    with pytest.raises(OSError, match="Caught") as raised:
        next(iter(DataLoader(Broken(error), num_workers=1)))
    assert describe_error(raised.value) == describe_error(error)


def test_message_is_found_in_the_traceback_of_another_process():
    traceback = 'Traceback (most recent call last):\n  File "x.py", line 1\n'
    assert find_message(f"{traceback}kd_det.errors.InputError: KD.X: wrong\n") == "KD.X: wrong"
    read_only = find_message(f"{traceback}OSError: [Errno 30] Read-only file system: '/mnt/x'\n")
    assert read_only == describe_error(READ_ONLY)
    assert find_message(f"{traceback}KeyError: 'a defect'\n") is None


# ---- Logs ----
@pytest.fixture
def full_log(tmp_path):
    """A logger with a file on a full disk."""
    log = logging.getLogger("on_a_full_disk")
    log.propagate = False
    handler = logging.StreamHandler(open("/dev/full", "a"))  # noqa: SIM115
    log.addHandler(handler)
    yield log
    log.removeHandler(handler)
    handler.stream.close()


def test_unwritable_log_ends_the_run_in_one_line(full_log, capfd):
    with pytest.raises(SystemExit, match=r"^error: /dev/full: No space left on device; make room on the disk\.$"):
        run_tool(lambda: full_log.error("lost"))
    assert capfd.readouterr().err == ""


def log_to_lost_terminal(printed, done):
    os.dup2(os.open(printed, os.O_WRONLY | os.O_CREAT), 2)
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    log = logging.getLogger("lost")
    log.addHandler(logging.StreamHandler(os.fdopen(1, "w")))
    run_tool(lambda: (log.error("lost"), log.error("lost"), done.touch()))


def test_closed_terminal_does_not_end_the_run(tmp_path):
    process = FORKS.Process(target=log_to_lost_terminal, args=(tmp_path / "printed", tmp_path / "done"))
    process.start()
    assert end(process) == [0]
    assert (tmp_path / "done").exists()
    assert "Traceback" not in (tmp_path / "printed").read_text()


def test_defective_log_record_is_reported(capfd):
    log = logging.getLogger("defect")
    log.propagate = False
    log.addHandler(logging.StreamHandler())
    run_tool(lambda: log.error("%d", "x"))
    log.handlers.clear()
    assert "TypeError" in capfd.readouterr().err


def test_full_disk_in_tensorboards_thread_is_left_to_the_run(tmp_path, monkeypatch, capfd):
    writer = SummaryWriter(str(tmp_path), max_queue=1)

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    thread = writer.file_writer.event_writer._async_writer._worker
    monkeypatch.setattr(thread._record_writer, "write", fail)

    def write():
        for i in range(5):
            writer.add_scalar("x", i, i)
            thread.join(5)

    with pytest.raises(SystemExit, match=r"^error: No space left on device; make room on the disk\.$"):
        run_tool(write)
    assert "Traceback" not in capfd.readouterr().err


def test_errors_of_other_threads_are_reported(capfd):
    def fail():
        raise FileNotFoundError(2, "No such file or directory", "x")

    def main():
        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()

    run_tool(main)
    assert "FileNotFoundError" in capfd.readouterr().err


def interrupt_tool():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # A shell starts commands in the background deaf to it.

    def main():
        os.kill(os.getpid(), signal.SIGINT)
        signal.pause()

    run_tool(main)


def test_ctrl_c_ends_a_tool_without_a_traceback(tmp_path):
    process = FORKS.Process(target=interrupt_tool)
    process.start()
    assert end(process) == [-signal.SIGINT]


# ---- How a tool ends ----
@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(
    ("error", "line"),
    [
        (InputError("KD.X: got 1; allowed is 2."), "error: KD.X: got 1; allowed is 2."),
        # A data-loader worker passes an error on like this.
        (
            InputError("Caught InputError in worker 0.\nTraceback:\nkd_det.errors.InputError: a.png: broken"),
            "error: a.png: broken",
        ),
        # Detectron2 reports the loss of a plain detector like this.
        (
            FloatingPointError("NaN at iteration=3!\nloss_dict = {'a': nan}"),
            "error: NaN at iteration=3! loss_dict = {'a': nan}",
        ),
    ],
)
def test_user_error_ends_a_tool_with_one_line(error, line):
    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        run_tool(main)
    assert end.value.code == line


@pytest.mark.usefixtures("in_process")
def test_defect_keeps_its_traceback():
    def main():
        raise ValueError("a defect")

    with pytest.raises(ValueError, match="a defect"):
        run_tool(main)
