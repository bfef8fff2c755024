"""Train a teacher, then plain and distilled students over several seeds, and compare them: mean and spread.

    kd-det repeat --teacher BCCD/teacher.yaml --student plain=BCCD/student.yaml \\
        --student ReviewKD=BCCD/reviewkd.yaml --seeds 1 2 3 --output output/bccd --jobs 2

A student may have several config files, which are merged in order: --student NAME=STUDENT.yaml RECIPE.yaml.

Each run is a call of `kd-det train` in a folder of its own, OUTPUT/teacher and OUTPUT/NAME_seedK. Run again after
an interruption, it goes on where it was: finished runs are kept, others resume from their last checkpoint.
"""

import argparse
import json
import os
import shlex
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from subprocess import Popen

from kd_det.engine.arguments import add_plugin_argument, make_parser, training_parser
from kd_det.engine.cli import import_plugin
from kd_det.engine.processes import INTERRUPTED, Commands, running_commands
from kd_det.errors import InputError

# Starts a command of kd_det in a process of its own.
KD_DET = (sys.executable, "-W", "ignore", "-m", "kd_det")
# Seconds between two looks at the trainings, and between two lines about them in a log file.
LOOK, TELL = 0.5, 300


class CallError(InputError):
    """A command that failed; it has said why."""


@dataclass(frozen=True)
class Call:
    """A call of a command of kd_det, in a process of its own.

    Attributes:
        command: Its name.
        arguments: Its arguments.
        log: File for what it prints, which is appended to; None: it prints where this process does.
        threads: Threads of its computations; None: as many as it takes.
    """

    command: str
    arguments: tuple[str, ...]
    log: Path | None = None
    threads: int | None = None

    def start(self, commands: Commands) -> Popen:
        """Print the command and start it."""
        print(f"$ {self}" + (f" > {self.log}" if self.log else ""), flush=True)
        command = [*KD_DET, self.command, *self.arguments]
        environment = {"OMP_NUM_THREADS": str(self.threads)} if self.threads else {}
        if not self.log:
            return commands.start(command, environment=environment)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("a") as output:
            return commands.start(command, environment=environment, output=output)

    def check(self, status: int) -> None:
        """Check an exit status.

        Raises:
            CallError: If the command failed.
        """
        if status:
            reason = f"; the reason is at the end of {self.log}" if self.log else ""
            raise CallError(f"status {status} of: {self}{reason}")

    def __str__(self) -> str:
        return f"kd-det {self.command} {shlex.join(self.arguments)}"


@dataclass(frozen=True)
class Training:
    """A run of its own, which is begun, or resumed where it was interrupted.

    Attributes:
        configs: Its config files.
        output: Its output folder.
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
        """Where the training is and how long it takes to its end, as it last wrote to ``metrics.json``."""
        written = sorted(self.output.rglob("metrics.json"), key=lambda path: path.stat().st_mtime)
        for path in written[-1:]:
            part = path.parent.relative_to(self.output).as_posix().removeprefix(".")
            name = "/".join(filter(None, (self.output.name, part)))
            found = last_metrics(path)
            if "iteration" in found and found.get("eta_seconds") is not None:
                return f"{name} {found['iteration']} ({timedelta(seconds=int(found['eta_seconds']))})"
        return f"{self.output.name} begins"


def last_metrics(path: Path) -> dict[str, float]:
    """The last whole line of a ``metrics.json``; nothing if there is none."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 100_000))
        lines = file.read().decode(errors="replace").split("\n")[:-1]
    try:
        return dict(json.loads(lines[-1]))
    except (IndexError, ValueError, TypeError):
        return {}


class Progress:
    """One line about the trainings that are running: rewritten on a terminal, now and then in a log file."""

    def __init__(self):
        self._live = sys.stdout.isatty()
        self._shown = ""
        self._told = time.monotonic()

    def show(self, text: str) -> None:
        if text == self._shown or not (self._live or time.monotonic() - self._told > TELL):
            return
        width = os.get_terminal_size().columns - 1 if self._live else len(text)
        print(f"\r\033[K{text[:width]}" if self._live else text, end="" if self._live else "\n", flush=True)
        self._shown, self._told = text, time.monotonic()

    def clear(self) -> None:
        """Make room for another line."""
        if self._live and self._shown:
            print("\r\033[K", end="", flush=True)
        self._shown = ""


def train(trainings: list[Training], commands: Commands, plugins: list[str], *, jobs: int) -> None:
    """Train runs to their ends, several at a time; those that have ended already stay as they are.

    Once one fails or is interrupted, no other is started, and those that are running go on to their ends.

    Raises:
        CallError: If one fails.
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
        time.sleep(LOOK)
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
    """End with the status of an interruption, if there was one."""
    if commands.interrupted:
        print("Interrupted; the same command goes on.", file=sys.stderr)
        sys.exit(INTERRUPTED)


def has_teacher(configs: Sequence[str], options: Sequence[str], key: str) -> bool:
    """Return whether configs describe a student with a teacher; plain students and mutual ones have none.

    Args:
        configs: Their files.
        options: Overrides.
        key: What names the configs, for messages.

    Raises:
        InputError: If there is no such config, or a key or value is wrong in it or in the overrides.
    """
    from kd_det.config_files import find_config
    from kd_det.engine import check_run
    from kd_det.engine.run_config import make_config
    from kd_det.meta_arch import TeacherStudent

    files = [find_config(config, key) for config in configs]
    cfg = make_config(training_parser(None).parse_args(["--config-file", *files, *options]))
    check_run(cfg, " with ".join(configs))
    return TeacherStudent.__name__ == cfg.MODEL.META_ARCHITECTURE


def parse_args(arguments: Sequence[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, prog)
    parser.add_argument("--teacher", required=True, metavar="CONFIG")
    parser.add_argument("--teacher-weights", metavar="FILE", help="a trained teacher: none is trained then")
    parser.add_files_argument(
        "--student", required=True, action="append", metavar="NAME=CONFIG", help="plain or distilled; repeat it"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=1, help="students trained at a time; the cores are shared out")
    add_plugin_argument(parser)
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="overrides for every run")
    args = parser.parse_args(arguments)
    students = []
    for files in args.student:
        name, _, config = "".join(files[:1]).partition("=")
        if not (name and config):
            parser.error(f"--student {' '.join(files)}: not of the form NAME=CONFIG")
        students.append((name, (config, *files[1:])))
    args.student = students
    names = [name for name, _ in students]
    for option, values in (("--student", names), ("--seeds", args.seeds)):
        twice = [value for i, value in enumerate(values) if value in values[:i]]
        if twice:
            parser.error(f"{option}: {twice[0]} is given twice, and its runs would share a folder")
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs}: must be at least 1")
    return args


def main(args: argparse.Namespace) -> None:
    from kd_det.fetching import find_file

    begin = time.monotonic()
    plugins = [part for path in args.plugin for part in ("--plugin", path)]
    for path in args.plugin:
        import_plugin(path)
    # All that can be found wrong without building a model is found before the first run.
    if args.teacher_weights:
        find_file(args.teacher_weights, "--teacher-weights")
    has_teacher([args.teacher], args.opts, "--teacher")
    named = ("KD.TEACHER.CONFIG_FILE", args.teacher)
    taught = {name: has_teacher(configs, [*named, *args.opts], f"--student {name}") for name, configs in args.student}
    teacher, weights = str(args.output / "teacher"), args.teacher_weights
    trainings = []
    if weights:
        teacher = f"{args.teacher}:{weights}"
    else:
        trainings.append(Training((args.teacher,), Path(teacher), ("SEED", "0", *args.opts)))
        weights = f"{teacher}/model_final.pth"
    options = (*named, "KD.TEACHER.WEIGHTS", weights)
    runs = {
        Training(
            configs,
            args.output / f"{name}_seed{seed}",
            ("SEED", str(seed), *(options if taught[name] else ()), *args.opts),
        ): name
        for seed in args.seeds
        for name, configs in args.student
    }
    with running_commands() as commands:
        train(trainings, commands, plugins, jobs=1)
        train(list(runs), commands, plugins, jobs=args.jobs)
        names = [("teacher", teacher), *((name, training.output) for training, name in runs.items())]
        compared = (x for name, path in names for x in ("--run", f"{name}={path}"))
        call = Call("compare", (*compared, *plugins, "--output", str(args.output / "comparison")))
        status = commands.wait(call.start(commands))
        stop_if_interrupted(commands)
        call.check(status)
    print(f"Done in {(time.monotonic() - begin) / 60:.1f} minutes.")
