"""Runs several trainings at a time, each in a process of its own, and shows their progress."""

import json
import os
import sys
import time
from collections import deque
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from subprocess import Popen

from kd_det.commands.calls import Call
from kd_det.engine.processes import INTERRUPTED, Commands

# Seconds between two checks of the trainings, and between two lines of progress in a log file.
CHECK_PERIOD, LINE_PERIOD = 0.5, 300


@dataclass(frozen=True)
class Training:
    """Describes a training, which is resumed if it was interrupted.

    Attributes:
        configs: The config files, which are merged in order.
        output: The output folder.
        options: Overrides of the config.
    """

    configs: tuple[str, ...]
    output: Path
    options: tuple[str, ...]

    def is_finished(self) -> bool:
        from kd_det.checkpoint_folder import finished_iterations

        return finished_iterations(self.output) > 0

    def call(self, plugins: list[str], *, log: bool, threads: int | None) -> Call:
        files = "--config-file", *self.configs
        arguments = (*files, *plugins, "--resume", "OUTPUT_DIR", str(self.output), *self.options)
        return Call("train", arguments, self.output / "output.txt" if log else None, threads)

    def progress(self) -> str:
        """Describes the iteration and the remaining time that the training last wrote to ``metrics.json``."""
        written = sorted(self.output.rglob("metrics.json"), key=lambda path: path.stat().st_mtime)
        for path in written[-1:]:
            part = path.parent.relative_to(self.output).as_posix().removeprefix(".")
            name = "/".join(filter(None, (self.output.name, part)))
            metrics = last_metrics(path)
            if "iteration" in metrics and metrics.get("eta_seconds") is not None:
                return f"{name} {metrics['iteration']} ({timedelta(seconds=int(metrics['eta_seconds']))})"
        return f"{self.output.name} begins"


def last_metrics(path: Path) -> dict[str, float]:
    """Reads the last complete line of a ``metrics.json``; returns {} if there is none."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 100_000))
        lines = file.read().decode(errors="replace").split("\n")[:-1]
    try:
        return dict(json.loads(lines[-1]))
    except (IndexError, ValueError, TypeError):
        return {}


class Progress:
    """Shows one line of progress: rewritten on a terminal, repeated every few minutes in a log file."""

    def __init__(self):
        self._live = sys.stdout.isatty()
        self._shown = ""
        self._shown_at = time.monotonic()

    def show(self, text: str) -> None:
        if text == self._shown or not (self._live or time.monotonic() - self._shown_at > LINE_PERIOD):
            return
        width = os.get_terminal_size().columns - 1 if self._live else len(text)
        print(f"\r\033[K{text[:width]}" if self._live else text, end="" if self._live else "\n", flush=True)
        self._shown, self._shown_at = text, time.monotonic()

    def clear(self) -> None:
        """Removes the line from the terminal, so that another one can be printed."""
        if self._live and self._shown:
            print("\r\033[K", end="", flush=True)
        self._shown = ""


def train(trainings: list[Training], commands: Commands, plugins: list[str], *, jobs: int) -> None:
    """Runs trainings, several at a time; those that are already finished are left as they are.

    Once one of them fails or is interrupted, no further one is started, and those that are running are completed.

    Args:
        trainings: The trainings.
        commands: Starts the processes.
        plugins: Arguments that name plugins.
        jobs: Number of trainings to run at a time.

    Raises:
        CallError: If a training fails.
    """
    threads = max(1, (os.cpu_count() or 1) // jobs) if jobs > 1 else None
    waiting, progress = deque(trainings), Progress()
    running: dict[Training, tuple[Call, Popen]] = {}
    failed: list[tuple[Call, int]] = []
    while running or (waiting and not failed and not commands.interrupted):
        while waiting and len(running) < jobs and not failed and not commands.interrupted:
            training = waiting.popleft()
            progress.clear()
            if training.is_finished():
                print(f"{training.output}: trained already.", flush=True)
                continue
            call = training.call(plugins, log=jobs > 1, threads=threads)
            running[training] = call, call.start(commands)
        time.sleep(CHECK_PERIOD)
        commands.poll()
        for training, (call, process) in list(running.items()):
            if process.returncode is not None:
                del running[training]
                failed += [(call, process.returncode)] * bool(process.returncode)
        if jobs > 1 and running:
            done = len(trainings) - len(waiting) - len(running)
            shown = ", ".join(training.progress() for training in running)
            progress.show(f"{done} of {len(trainings)} trained; {shown}")
    progress.clear()
    stop_if_interrupted(commands)
    for call, status in failed:
        call.check(status)


def stop_if_interrupted(commands: Commands) -> None:
    """Exits with the status of an interruption, if there was one."""
    if commands.interrupted:
        print("Interrupted; the same command goes on.", file=sys.stderr)
        sys.exit(INTERRUPTED)
