"""Calls commands of kd_det in processes of their own."""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen

from kd_det.engine.processes import Commands
from kd_det.errors import InputError

# Starts a command of kd_det in a process of its own.
KD_DET = (sys.executable, "-W", "ignore", "-m", "kd_det")


class CallError(InputError):
    """Reports a command that failed, after it has printed why."""


@dataclass(frozen=True)
class Call:
    """Describes a call of a command of kd_det.

    Attributes:
        command: Name of the command.
        arguments: Its arguments.
        log: File that its output is appended to; None shares the output of this process.
        threads: Number of threads for its computations; None leaves the number to the command.
    """

    command: str
    arguments: tuple[str, ...]
    log: Path | None = None
    threads: int | None = None

    def start(self, commands: Commands) -> Popen:
        """Prints the command and starts it."""
        print(f"$ {self}" + (f" > {self.log}" if self.log else ""), flush=True)
        command = [*KD_DET, self.command, *self.arguments]
        environment = {"OMP_NUM_THREADS": str(self.threads)} if self.threads else {}
        if not self.log:
            return commands.start(command, environment=environment)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("a") as output:
            return commands.start(command, environment=environment, output=output)

    def check(self, status: int) -> None:
        """Checks the exit status of the command.

        Raises:
            CallError: If the command failed.
        """
        if status:
            reason = f"; the reason is at the end of {self.log}" if self.log else ""
            raise CallError(f"status {status} of: {self}{reason}")

    def __str__(self) -> str:
        return f"kd-det {self.command} {shlex.join(self.arguments)}"
