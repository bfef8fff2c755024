"""Tests that only one run writes into an output folder, and that an unwritable folder is named."""

import ctypes
import os
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from children import FORKS, Event, Task, end
from classification.models import classifier_cfg
from helpers import distilled_cfg, parse, with_data, write_yaml

from kd_det import InputError
from kd_det.engine import setup
from kd_det.engine.output_folder import claim, release

pytestmark = pytest.mark.usefixtures("in_process")
RUN = "Trainer"


@pytest.fixture
def task(teacher, coco_folder, tmp_path):
    cfg = with_data(distilled_cfg(teacher, ["HintHead"], {"SOLVER.CHECKPOINT_PERIOD": 1}), coco_folder, tmp_path)
    cfg.DATASETS.TEST = ()
    return Task(write_yaml(tmp_path / "config.yaml", cfg), tmp_path)


# ---- One writer ----
def test_second_run_in_the_folder_ends_and_the_first_continues(task, tmp_path):
    log = tmp_path / "run" / "log.txt"
    first = task.start("run", prepare=(Event(RUN, 1, signals=(signal.SIGSTOP,)),))
    try:
        while not (tmp_path / "run" / "model_0000000.pth").exists():
            assert first.is_alive()
            time.sleep(0.05)
        logged = log.read_text()
        assert end(task.start("run", log="second")) == [1]
        holder = f"process {first.pid} on {os.uname().nodename}"
        told = (
            f"OUTPUT_DIR: {tmp_path}/run: another run is writing there, {holder}; wait until it ends, end it, or choose"
        )
        assert task.error("second").startswith(told)
        assert log.read_text() == logged
        os.kill(first.pid, signal.SIGCONT)
        assert end(first) == [0]
    finally:
        first.kill()
    assert task.run("run", resume=True) == 0


def test_unfinished_files_of_killed_runs_are_removed(tmp_path):
    """But for a generation, where another run may write now: the chain claims it when its turn comes."""
    folders = [tmp_path, *(tmp_path / name for name in ("pretrain", "peer_2"))]
    generation, other = tmp_path / "gen_1", tmp_path / "another_run"
    for folder in (*folders, generation, generation / "pretrain", other):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "unfinished-1.partial").touch()
    claim(str(tmp_path))
    release(str(tmp_path))
    left = {path.parent for path in tmp_path.rglob("*.partial")}
    assert left == {generation, generation / "pretrain", other}
    claim(str(generation))
    release(str(generation))
    assert list(tmp_path.rglob("*.partial")) == [other / "unfinished-1.partial"]


def test_folder_without_locks_causes_a_warning(tmp_path, monkeypatch, caplog):
    def fail(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", fail)
    claim(str(tmp_path))
    release(str(tmp_path))
    assert f"OUTPUT_DIR: the file system of {tmp_path} cannot lock files (Function not implemented)" in caplog.text


# ---- Folders that cannot be ----
@pytest.mark.parametrize(
    ("folder", "reason"),
    [
        ("", "OUTPUT_DIR: must name a folder, got ''."),
        (" ", "OUTPUT_DIR: must name a folder, got ' '."),
        ("/proc/x", "OUTPUT_DIR: /proc/x: cannot be written to: No such file or directory; check the path."),
        ("{tmp}/file/x", "OUTPUT_DIR: {tmp}/file/x: cannot be written to: Not a directory; check the path: a part of"),
        ("{tmp}/file", "OUTPUT_DIR: {tmp}/file: cannot be written to: File exists; choose another place, or remove"),
        ("x" * 300, f"OUTPUT_DIR: {'x' * 300}: cannot be written to: File name too long; choose a shorter path."),
    ],
)
def test_folders_that_cannot_be_created_are_refused(folder, reason, tmp_path):
    (tmp_path / "file").touch()
    cfg = classifier_cfg(options={"OUTPUT_DIR": folder.format(tmp=tmp_path), "MODEL.CLASSIFIER.NUM_CLASSES": 10})
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("digits_train",), ()
    with pytest.raises(InputError) as error:
        setup(parse("--config-file", write_yaml(tmp_path / "c.yaml", cfg)))
    assert str(error.value).startswith(reason.format(tmp=tmp_path))


# ---- File systems ----
@dataclass(frozen=True)
class Mounted:
    """Mounts a file system for this process alone, and its children.

    Attributes:
        folder: Where.
        commands: Arguments of ``mount``, in this order.
    """

    folder: Path
    commands: tuple[str, ...]

    def __call__(self):
        new_namespace = 0x00020000  # CLONE_NEWNS
        assert ctypes.CDLL(None).unshare(new_namespace) == 0
        for command in ("--make-rprivate /", *self.commands):
            subprocess.run(["mount", *command.format(self.folder).split()], check=True)


def can_mount():
    process = FORKS.Process(target=Mounted(Path("/mnt"), ("-t tmpfs none {}",)))
    process.start()
    return end(process) == [0]


@pytest.fixture(scope="module")
def mounts():
    if not shutil.which("mount") or os.getuid():
        pytest.skip("only root can mount a file system")
    if not can_mount():
        pytest.skip("this container cannot mount a file system")


@pytest.mark.usefixtures("mounts")
@pytest.mark.parametrize(("name", "resume"), [("disk/new", False), ("disk/run", True)])
def test_read_only_file_system_is_reported(task, tmp_path, name, resume):
    (tmp_path / "disk" / "run").mkdir(parents=True)
    read_only = Mounted(tmp_path / "disk", ("--bind {0} {0}", "-o remount,bind,ro {}"))
    assert end(task.start(name, prepare=(read_only,), resume=resume, log="log")) == [1]
    reason = "cannot be written to: Read-only file system; choose a place that can be written to."
    assert task.error("log") == f"OUTPUT_DIR: {tmp_path}/{name}: {reason}"


@pytest.mark.usefixtures("mounts")
@pytest.mark.parametrize("size", ["16k", "1m"])
def test_full_file_system_is_reported(task, tmp_path, size):
    """The log file cannot be written; or a picture for TensorBoard, or a checkpoint."""
    (tmp_path / "disk").mkdir()
    disk = Mounted(tmp_path / "disk", (f"-t tmpfs -o size={size} none {{}}",))
    assert end(task.start("disk/run", "VIS_PERIOD", 1, prepare=(disk,), log="log")) == [1]
    told = task.error("log")
    assert told.startswith(f"{tmp_path}/disk/run/")
    assert "No space left on device; make room on the disk." in told
