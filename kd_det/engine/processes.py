"""Ties processes together: forwards termination signals to children, and ends a child with its parent."""

import multiprocessing
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO

INTERRUPTED = 75  # This is EX_TEMPFAIL of sysexits.h, which means "try again".
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# This environment variable names the parent process that a child ends with.
PARENT = "KD_DET_PARENT"


@contextmanager
def handling_signals(handler: Callable[[int, object], None]) -> Iterator[None]:
    """Handles the termination signals inside the block with a function."""
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)


@contextmanager
def forwarding_signals() -> Iterator[None]:
    """Forwards the signals inside the block to the :mod:`multiprocessing` children, instead of ending this process."""

    def forward(number: int, frame: object) -> None:
        for child in multiprocessing.active_children():
            if child.pid is not None:
                os.kill(child.pid, number)

    with handling_signals(forward):
        yield


@contextmanager
def running_commands() -> Iterator["Commands"]:
    """Forwards the signals to running commands instead of ending this process; no command outlives the block."""
    commands = Commands()
    with handling_signals(lambda number, frame: commands._received.append(number)):
        try:
            yield commands
        finally:
            commands._stop()


class Commands:
    """Runs the commands of a tool, see :func:`running_commands`; they also end when the tool is killed.

    Attributes:
        interrupted: Whether a signal has arrived, or has interrupted a command.
    """

    def __init__(self) -> None:
        self.interrupted = False
        self._running: list[subprocess.Popen] = []
        self._received: list[int] = []

    def start(
        self, command: Sequence[str], *, output: IO | None = None, environment: dict[str, str] | None = None, **options
    ) -> subprocess.Popen:
        """Starts a command in its own session, so that a terminal's Ctrl-C reaches it only through this process.

        Args:
            command: The program and its arguments.
            output: File for its output; by default it shares the output of this process.
            environment: Variables in addition to those of this process.
            options: Options of ``subprocess.Popen``.
        """
        process = subprocess.Popen(
            command,
            env=os.environ | (environment or {}) | {PARENT: str(os.getpid())},
            stdout=output,
            stderr=output and subprocess.STDOUT,
            start_new_session=True,
            **options,
        )
        self._running.append(process)
        return process

    def poll(self) -> None:
        """Forwards the signals that have arrived, and checks which commands have ended."""
        while self._received:
            number = self._received.pop(0)
            self.interrupted = True
            for process in self._running:
                process.send_signal(number)
        for process in self._running[:]:
            if process.poll() is not None:
                self._running.remove(process)
                self.interrupted |= process.returncode == INTERRUPTED

    def _stop(self) -> None:
        for process in self._running:
            process.terminate()
        for process in self._running:
            process.wait()

    def wait(self, process: subprocess.Popen) -> int:
        """Waits for a command; returns its exit status."""
        while process.returncode is None:
            time.sleep(0.1)
            self.poll()
        return process.returncode


def end_with_parent(parent: int) -> None:
    """Arranges for this process to receive SIGTERM once its parent process has ended, however it ended.

    Args:
        parent: Process id of the parent. If another process is the parent by now, that one has already ended.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def end_with_tool() -> None:
    """Arranges for this process to end with the tool whose :class:`Commands` started it, if one did."""
    parent = os.environ.pop(PARENT, None)
    if parent:
        end_with_parent(int(parent))
