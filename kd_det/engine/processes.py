"""Processes that belong together: they pass on the signals that ask them to end, and a child ends with its parent."""

import multiprocessing
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO

INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: try again.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# The environment variable that tells a child process which parent it ends with.
PARENT = "KD_DET_PARENT"


@contextmanager
def handling_signals(handler: Callable[[int, object], None]) -> Iterator[None]:
    """Let a function handle the signals inside."""
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)


@contextmanager
def forwarding_signals() -> Iterator[None]:
    """Pass the signals on to the children of :mod:`multiprocessing` inside, instead of ending this process."""

    def pass_on(number: int, frame: object) -> None:
        for child in multiprocessing.active_children():
            os.kill(child.pid, number)

    with handling_signals(pass_on):
        yield


@contextmanager
def running_commands() -> Iterator["Commands"]:
    """Pass the signals on to the commands that are running, instead of ending this process; none outlives the block."""
    commands = Commands()
    with handling_signals(lambda number, frame: commands._received.append(number)):
        try:
            yield commands
        finally:
            commands._stop()


class Commands:
    """Commands that a tool runs; see :func:`running_commands`. They end when the tool is killed, too.

    Attributes:
        interrupted: Whether a signal came, or a command was interrupted by one.
    """

    def __init__(self):
        self.interrupted = False
        self._running: list[subprocess.Popen] = []
        self._received: list[int] = []

    def start(
        self, command: Sequence[str], *, output: IO | None = None, environment: dict[str, str] | None = None, **options
    ) -> subprocess.Popen:
        """Start a command, in a session of its own: a terminal's Ctrl-C reaches it by this process alone.

        Args:
            command: The program and its arguments.
            output: Where it prints; by default, where this process does.
            environment: Variables besides those of this process.
            options: For ``subprocess.Popen``.
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
        """Pass on the signals that came, and look which commands have ended."""
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
        """Wait for a command; returns its exit status."""
        while process.returncode is None:
            time.sleep(0.1)
            self.poll()
        return process.returncode


def end_with_parent(parent: int) -> None:
    """Ask this process to end, as by SIGTERM, once its parent process has ended, however that ended.

    Args:
        parent: The parent's number. Where another process is the parent now, it has ended already.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def end_with_tool() -> None:
    """End with the tool whose :class:`Commands` started this process, if one did."""
    parent = os.environ.pop(PARENT, None)
    if parent:
        end_with_parent(int(parent))
