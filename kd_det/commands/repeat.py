"""Train a teacher, then plain and distilled students with several seeds, and compare them: mean and deviation.

    kd-det repeat --teacher BCCD/teacher.yaml --student plain=BCCD/student.yaml \\
        --student ReviewKD=BCCD/student.yaml recipes/reviewkd.yaml --seeds 1 2 3 --output output/bccd --jobs 2

A student may have several config files, which are merged in order: --student NAME=STUDENT.yaml RECIPE.yaml.

Each run is a call of `kd-det train` with its own folder, OUTPUT/teacher or OUTPUT/NAME_seedK. If it is interrupted, run
it again: finished runs are kept, the others resume from their last checkpoint.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from kd_det.commands.calls import Call
from kd_det.commands.trainings import Training, stop_if_interrupted, train
from kd_det.engine.arguments import add_plugin_argument, make_parser, training_parser
from kd_det.engine.cli import import_plugin
from kd_det.engine.processes import running_commands


def has_teacher(configs: Sequence[str], options: Sequence[str], key: str) -> bool:
    """Returns whether configs describe a student with a teacher; plain students and mutual ones have none.

    Args:
        configs: The config files, which are merged in order.
        options: Overrides of the config.
        key: The argument that names the configs, for messages.

    Raises:
        InputError: If there is no such config, or a key or value is wrong in it or in the overrides.
    """
    from kd_det.config import has_teacher
    from kd_det.config_files import find_config
    from kd_det.engine import check_run
    from kd_det.engine.run_config import make_config

    files = [find_config(config, key) for config in configs]
    cfg = make_config(training_parser(None).parse_args(["--config-file", *files, *options]))
    check_run(cfg, " with ".join(configs))
    return has_teacher(cfg)


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
    begin = time.monotonic()
    for path in args.plugin:
        import_plugin(path)
    plugins = [part for path in args.plugin for part in ("--plugin", path)]
    source, teachers, students = plan(args)
    with running_commands() as commands:
        train(teachers, commands, plugins, jobs=1)
        train(list(students), commands, plugins, jobs=args.jobs)
        names = [("teacher", source), *((name, training.output) for training, name in students.items())]
        runs = (x for name, path in names for x in ("--run", f"{name}={path}"))
        call = Call("compare", (*runs, *plugins, "--output", str(args.output / "comparison")))
        status = commands.wait(call.start(commands))
        stop_if_interrupted(commands)
        call.check(status)
    print(f"Done in {(time.monotonic() - begin) / 60:.1f} minutes.")


def plan(args: argparse.Namespace) -> tuple[str, list[Training], dict[Training, str]]:
    """Plans the trainings, after all checks that need no model.

    Returns:
        The source of the teacher for a comparison, the training of the teacher unless it is trained already, and the
        trainings of the students with their names.

    Raises:
        InputError: If a file or a config is wrong.
    """
    from kd_det.fetching import find_file

    if args.teacher_weights:
        find_file(args.teacher_weights, "--teacher-weights")
    has_teacher([args.teacher], args.opts, "--teacher")
    named = ("KD.TEACHER.CONFIG_FILE", args.teacher)
    taught = {name: has_teacher(configs, [*named, *args.opts], f"--student {name}") for name, configs in args.student}
    folder = args.output / "teacher"
    if args.teacher_weights:
        weights, source, teachers = args.teacher_weights, f"{args.teacher}:{args.teacher_weights}", []
    else:
        weights, source = f"{folder}/model_final.pth", str(folder)
        teachers = [Training((args.teacher,), folder, ("SEED", "0", *args.opts))]
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
    return source, teachers, students
