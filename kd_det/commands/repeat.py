"""Train a teacher, then plain and distilled students with several seeds, and compare them seed by seed.

    kd-det repeat --teacher BCCD/teacher.yaml --student plain=BCCD/student.yaml \\
        --student ReviewKD=BCCD/student.yaml recipes/reviewkd.yaml --seeds 1 2 3 --output output/bccd --jobs 2

A student may have several config files, which are merged in order: --student NAME=STUDENT.yaml RECIPE.yaml.

Each run is a call of `kd-det train` with its own folder, OUTPUT/teacher or OUTPUT/NAME_seedK. If it is interrupted, run
it again: finished runs are kept, the others resume from their last checkpoint. OUTPUT/comparison/report.html, for a
browser, shows everything at the end.

Each distilled student is compared with the plain one that shares most of its config files, or else with the first plain
one: mean difference by seed, 95 % confidence interval and, from three seeds on, a verdict. --equal-compute also trains
the plain student for as long as the distilled one took, and compares the distilled one with both.
OUTPUT/equal_compute.json records how long that is.
"""

import argparse
import json
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

import kd_det
from kd_det.commands.calls import Call
from kd_det.commands.trainings import Training, stop_if_interrupted, train
from kd_det.engine.arguments import add_plugin_argument, make_parser, training_parser
from kd_det.engine.cli import import_plugin
from kd_det.engine.processes import running_commands
from kd_det.errors import InputError
from kd_det.files import write_whole

if TYPE_CHECKING:
    from detectron2.config import CfgNode


@dataclass
class Plan:
    """Describes what is trained and compared.

    Attributes:
        source: Source of the teacher for the comparison.
        teachers: The training of the teacher, unless it is trained already.
        students: Maps the trainings of the students to their names.
        baselines: Maps the name of each student that is not plain to that of its plain one.
    """

    source: str
    teachers: list[Training]
    students: dict[Training, str]
    baselines: dict[str, str]


def has_teacher(configs: Sequence[str], options: Sequence[str], key: str) -> bool:
    """Returns whether configs describe a student with a teacher; see :func:`read_student` for the arguments."""
    from kd_det.config import has_teacher

    return has_teacher(read_student(configs, options, key))


def is_plain(configs: Sequence[str], options: Sequence[str], key: str) -> bool:
    """Returns whether configs describe a student that learns alone; see :func:`read_student` for the arguments."""
    from kd_det.config import is_wrapped

    return not is_wrapped(read_student(configs, options, key))


def read_student(configs: Sequence[str], options: Sequence[str], key: str) -> "CfgNode":
    """Reads and checks the config of a student.

    Args:
        configs: The config files, which are merged in order.
        options: Overrides of the config.
        key: The argument that names the configs, for messages.

    Raises:
        InputError: If there is no such config, or a key or value is wrong in it or in the overrides.
    """
    from kd_det.config_files import find_config
    from kd_det.engine import check_run
    from kd_det.engine.run_config import make_config

    files = [find_config(config, key) for config in configs]
    cfg = make_config(training_parser(None).parse_args(["--config-file", *files, *options]))
    check_run(cfg, " with ".join(configs))
    return cfg


def parse_args(arguments: Sequence[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, prog)
    parser.add_argument("--teacher", required=True, metavar="CONFIG")
    parser.add_argument("--teacher-weights", metavar="FILE", help="a trained teacher (default: train it first)")
    parser.add_files_argument(
        "--student", required=True, action="append", metavar="NAME=CONFIG", help="plain or distilled; repeat it"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=1, help="students to train at a time, which share the cores")
    parser.add_argument(
        "--equal-compute",
        action="store_true",
        help="also train the plain student for as long as each distilled one took, by measured time",
    )
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
    args.command = shlex.join(["kd-det", "repeat", *(sys.argv[1:] if arguments is None else arguments)])
    names = [name for name, _ in students]
    for option, values in (("--student", names), ("--seeds", args.seeds)):
        twice = [value for i, value in enumerate(values) if value in values[:i]]
        if twice:
            parser.error(f"{option}: {twice[0]} is given twice, and its runs would share a folder")
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs}: must be at least 1")
    if min(args.seeds) < 0:
        parser.error(f"--seeds {min(args.seeds)}: must be at least 0")
    return args


def main(args: argparse.Namespace) -> None:
    begin = time.monotonic()
    for path in args.plugin:
        import_plugin(path)
    plugins = [part for path in args.plugin for part in ("--plugin", path)]
    plan = make_plan(args)
    record_origin(args.output, args.command)
    with running_commands() as commands:
        train(plan.teachers, commands, plugins, jobs=1)
        train(list(plan.students), commands, plugins, jobs=args.jobs)
        baselines = list(plan.baselines.items())
        if args.equal_compute:
            from kd_det.commands.equal_compute import longer_name, plan_longer

            longer = plan_longer(args.output, plan.baselines, args.seeds)
            train(list(longer), commands, plugins, jobs=args.jobs)
            plan.students |= longer
            baselines += [(name, longer_name(name, plain)) for name, plain in plan.baselines.items()]
        names = [("teacher", plan.source), *((name, training.output) for training, name in plan.students.items())]
        runs = (x for name, path in names for x in ("--run", f"{name}={path}"))
        pairs = (x for name, baseline in baselines for x in ("--baseline", f"{name}={baseline}"))
        call = Call("compare", (*runs, *pairs, *plugins, "--html", "--output", str(args.output / "comparison")))
        status = commands.wait(call.start(commands))
        stop_if_interrupted(commands)
        call.check(status)
    print(f"Done in {(time.monotonic() - begin) / 60:.1f} minutes.")


def make_plan(args: argparse.Namespace) -> Plan:
    """Plans the trainings, after all checks that need no model.

    Raises:
        InputError: If a file or a config is wrong.
    """
    from kd_det.fetching import find_file

    if args.teacher_weights:
        find_file(args.teacher_weights, "--teacher-weights")
    read_student([args.teacher], args.opts, "--teacher")
    if "SEED" in args.opts[::2] and len(args.seeds) > 1:
        raise InputError("command line: the override SEED would give all runs the same seed; use --seeds.")
    # A student's file may have overrides for the teacher that it names itself.
    named = ("KD.TEACHER.CONFIG_FILE", args.teacher, "KD.TEACHER.OPTS", "[]")
    cases = {name: (configs, [*named, *args.opts], f"--student {name}") for name, configs in args.student}
    baselines = find_baselines(args.student, [name for name, case in cases.items() if is_plain(*case)])
    if args.equal_compute:
        check_equal_compute(list(cases), baselines)
        for name in sorted(set(baselines.values())):
            patience = read_student(*cases[name]).TEST.PATIENCE
            if patience:
                raise InputError(
                    f"--equal-compute: TEST.PATIENCE must be 0 for {name}, got {patience}: a run that may end early "
                    "has no length to extend."
                )
    folder = args.output / "teacher"
    if args.teacher_weights:
        weights, source, teachers = args.teacher_weights, f"{args.teacher}:{args.teacher_weights}", []
    else:
        weights, source = f"{folder}/model_final.pth", str(folder)
        teachers = [Training((args.teacher,), folder, ("SEED", "0", *args.opts))]
    taught = {name: has_teacher(*case) for name, case in cases.items()}
    options = (*named, "KD.TEACHER.WEIGHTS", weights)
    students = {
        Training(
            configs,
            args.output / f"{name}_seed{seed}",
            ("SEED", str(seed), *(options if taught[name] else ()), *args.opts),
        ): name
        for seed in args.seeds
        for name, configs in args.student
    }
    return Plan(source, teachers, students, baselines)


def find_baselines(students: Sequence[tuple[str, Sequence[str]]], plain: Sequence[str]) -> dict[str, str]:
    """Maps each student that is not plain to the plain one that shares most of its first config files, if there is one.

    Args:
        students: Names and config files of all students.
        plain: Names of the plain ones.
    """
    configs = dict(students)

    def shared_files(name: str, other: str) -> int:
        pairs = zip(configs[name], configs[other], strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    distilled = [name for name in configs if plain and name not in plain]
    return {name: max(plain, key=partial(shared_files, name)) for name in distilled}


def check_equal_compute(names: Sequence[str], baselines: Mapping[str, str]) -> None:
    """Checks that there are distilled students with plain ones, and that the longer trainings have names of their own.

    Args:
        names: Names of all students.
        baselines: See :class:`Plan`.

    Raises:
        InputError: If that is not so.
    """
    from kd_det.commands.equal_compute import longer_name

    if not baselines:
        raise InputError("--equal-compute: needs a distilled --student and a plain one.")
    taken = [name for name in (longer_name(*pair) for pair in baselines.items()) if name in names]
    if taken:
        raise InputError(f"--equal-compute: trains a student {taken[0]}; give the --student of this name another one.")


def record_origin(output: Path, command: str) -> None:
    """Writes ``repeat.json``: the commands of a folder, the commits of their source tree, and the versions.

    Earlier commands and commits stay, since runs that are finished do.

    Args:
        output: The folder.
        command: This command.
    """
    import detectron2
    import torch
    import torchvision

    root, commit = Path(kd_det.__file__).parents[1], ""
    if (root / ".git").exists():
        git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude", "*"]
        with suppress(OSError):
            commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    path, modules = output / "repeat.json", (kd_det, torch, torchvision, detectron2)
    before = json.loads(path.read_bytes()) if path.is_file() else {"commands": [], "commits": []}
    origin = {
        "commands": list(dict.fromkeys([*before["commands"], command])),
        "commits": list(dict.fromkeys([*before["commits"], *filter(None, [commit])])),
        "versions": {"Python": platform.python_version(), **{x.__name__: str(x.__version__) for x in modules}},
    }
    output.mkdir(parents=True, exist_ok=True)
    write_whole(str(path), lambda file: file.write(json.dumps(origin, indent=2).encode() + b"\n"))
