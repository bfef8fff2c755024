"""Trainings in child processes, to which something happens. They fork from a server that has imported all they need."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.multiprocessing
from helpers import train_net
from torch.optim.optimizer import register_optimizer_step_pre_hook

from kd_det.checkpoint import KDCheckpointer
from kd_det.engine import Trainer, stages

TIME_LIMIT = 60
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["kd_det.engine.stages", "torch.utils.tensorboard", "sklearn.datasets"])


# ---- What happens ----
@dataclass(frozen=True)
class Event:
    """Signals that a training sends itself.

    Attributes:
        trainer: Name of its class: the stage's, or the main run's.
        iteration: In which iteration.
        phase: When: "before" it; after the "backward" pass; after the "update" of the weights; half-way through the
            "write" of its checkpoint; before the "tag" that names this the last one; or "anytime".
        signals: Which, in this order.
        delay: For "anytime": after so many seconds of the iteration.
        group: Whether they go to its whole process group, as a terminal's do.
        folder: Name of the output folder, where trainers of several have the same class.
    """

    trainer: str
    iteration: int
    phase: str = "before"
    signals: tuple[int, ...] = (signal.SIGKILL,)
    delay: float = 0.0
    group: bool = False
    folder: str = ""

    def __call__(self) -> None:
        """Arrange it in this process."""
        step, save, tag = Trainer.run_step, torch.save, KDCheckpointer.tag_last_checkpoint
        now = threading.Event()

        def run_step(trainer):
            now.clear()
            own = type(trainer).__name__ == self.trainer and trainer.cfg.OUTPUT_DIR.endswith(self.folder)
            if not own or trainer.iter != self.iteration:
                step(trainer)
                return
            now.set()
            self.strike_in("before")
            if self.phase == "anytime":
                threading.Timer(self.delay, self.strike).start()
            step(trainer)
            self.strike_in("update")
            if self.phase == "anytime":
                time.sleep(TIME_LIMIT)

        def strike_before_update(*_):
            if now.is_set():
                self.strike_in("backward")

        def save_half(data, file, **options):
            save(data, file, **options)
            if now.is_set() and self.phase == "write":
                file.truncate(file.tell() // 2)
                self.strike()

        def strike_before_tag(checkpointer, name):
            if now.is_set():
                self.strike_in("tag")
            tag(checkpointer, name)

        Trainer.run_step, torch.save, KDCheckpointer.tag_last_checkpoint = run_step, save_half, strike_before_tag
        register_optimizer_step_pre_hook(strike_before_update)

    def strike_in(self, phase: str) -> None:
        if phase == self.phase:
            self.strike()

    def strike(self) -> None:
        for number in self.signals:
            if self.group:
                # By another process, as workers of a data loader obey this one.
                code = f"import os; os.killpg({os.getpgid(0)}, {int(number)})"
                subprocess.run([sys.executable, "-S", "-c", code], start_new_session=True, check=True)
            else:
                os.kill(os.getpid(), number)


@dataclass(frozen=True)
class Rank:
    """Makes a training one of two processes, as ``torchrun`` does."""

    rank: int
    port: int

    def __call__(self) -> None:
        os.environ |= {"TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.port)}
        os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": str(self.rank), "LOCAL_RANK": str(self.rank)}


def two_ranks() -> tuple[Rank, Rank]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return Rank(0, port), Rank(1, port)


def run_processes(function: Callable, *arguments, number: int = 2) -> None:
    """Run ``function(index, *arguments)`` in processes; an error in one is raised, as launchers do.

    Those that outlast a time limit are killed: ranks that are out of step wait for each other.
    """
    limit = time.monotonic() + TIME_LIMIT
    context = torch.multiprocessing.start_processes(
        _run_on_one_thread, (function, arguments), nprocs=number, join=False, start_method="forkserver"
    )
    while not context.join(timeout=1):
        if time.monotonic() > limit:
            for process in context.processes:
                process.kill()
            raise AssertionError("hangs")


def _run_on_one_thread(index: int, function: Callable, arguments: tuple) -> None:
    torch.set_num_threads(1)
    function(index, *arguments)


# ---- Trainings ----
@dataclass
class Task:
    """A training whose config lies in a file.

    Attributes:
        config: The file.
        folder: For what trainings write and print.
    """

    config: str
    folder: Path

    def start(self, name: str, *options, prepare=(), resume: bool = False, log: str = "") -> multiprocessing.Process:
        """Start ``tools/train_net.py`` with the output folder of a name; what it prints is in ``LOG.txt``, or NAME's.

        Args:
            name: Of the folder.
            options: Overrides of the config.
            prepare: Functions to call in the process before.
            resume: Whether to resume what is in the folder.
            log: See above.
        """
        arguments = ["--config-file", self.config, *(["--resume"] if resume else [])]
        arguments += ["OUTPUT_DIR", self.folder / name, *options]
        printed = self.folder / f"{log or name}.txt"
        process = FORKS.Process(target=_run, args=(printed, tuple(map(str, arguments)), prepare))
        process.start()
        return process

    def run(self, name: str, *options, prepare=(), resume: bool = False) -> int:
        """Its exit status."""
        return end(self.start(name, *options, prepare=prepare, resume=resume))[0]

    def error(self, log: str) -> str:
        """What a training told last, if that is the only error that it told, and without a traceback."""
        text = (self.folder / f"{log}.txt").read_text()
        errors = [line for line in text.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, text
        assert text.splitlines()[-1] == errors[0]
        assert "Traceback" not in text
        return errors[0].removeprefix("error: ")


def _run(printed: Path, arguments: tuple[str, ...], prepare: tuple[Callable[[], None], ...]) -> None:
    os.setsid()
    sys.stdout = sys.stderr = printed.open("w", buffering=1)
    os.dup2(sys.stderr.fileno(), 2)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # Of data loaders, as in a training that nobody forked.
    stages.log_summary = lambda *_, **__: None  # It takes a third of such a training's time.
    for function in prepare:
        function()
    train_net(*arguments)


def end(*processes: multiprocessing.Process) -> list[int]:
    """Exit statuses, negative where a signal ended a process; those that outlast a time limit are killed."""
    limit = time.monotonic() + TIME_LIMIT
    for process in processes:
        process.join(max(0.0, limit - time.monotonic()))
    hanging = [process for process in processes if process.is_alive()]
    for process in hanging:
        process.kill()
        process.join()
    assert not hanging, "hangs"
    return [process.exitcode for process in processes]


# ---- What is left ----
def final_state(folder: Path) -> dict:
    """All that a run ended with, but for what tells the run itself from others."""
    data = torch.load(folder / "model_final.pth", weights_only=True)
    data.get("trainer", {}).pop("run", None)  # A peer's file has no trainer.
    data.get("kd_teacher", {}).pop("source", None)  # A path, below the run's own folder in a chain of generations.
    return data


def same(a, b) -> bool:
    """Whether two nested states are equal, bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b
