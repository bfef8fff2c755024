#!/usr/bin/env python
"""Train a teacher, then plain and distilled students over several seeds, and compare them: mean and spread.

    tools/repeat.py --teacher configs/BCCD/teacher.yaml --student plain=configs/BCCD/student.yaml \\
        --student ReviewKD=configs/BCCD/reviewkd.yaml --seeds 1 2 3 --output output/bccd --jobs 2

Each run is a call of tools/train_net.py in a folder of its own, OUTPUT/teacher and OUTPUT/NAME_seedK. Run again after
an interruption, it goes on where it was: finished runs are kept, others resume from their last checkpoint.
"""

import argparse
import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from detectron2.config import get_cfg
from tqdm import tqdm

from kd_det import TeacherStudent, add_kd_config
from kd_det.config import find_config, merge_file, merge_list
from kd_det.engine import check_run, import_plugin
from kd_det.engine.arguments import add_plugin_argument
from kd_det.errors import InputError
from kd_det.fetching import find_file

TOOLS = Path(__file__).resolve().parent


class CallError(Exception):
    """A command that failed."""


def call(tool: str, *arguments: str, log: Path | None = None, threads: int | None = None) -> None:
    """Print a command and run it; its output goes on, or into a file.

    Raises:
        CallError: If it fails.
    """
    told = f"python {TOOLS / tool} {shlex.join(arguments)}"
    tqdm.write(f"$ {told}" + (f" > {log}" if log else ""))
    sys.stdout.flush()
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    with ExitStack() as stack:
        file = None
        if log:
            log.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(log.open("a"))
        command = [sys.executable, "-W", "ignore", str(TOOLS / tool), *arguments]
        status = subprocess.run(command, env=environment, stdout=file, stderr=file and subprocess.STDOUT).returncode
    if status:
        raise CallError(f"status {status} of: {told}" + (f"; the reason is at the end of {log}" if log else ""))


def train(config: str, output: Path, options: list[str], *, plugins: list[str], log: bool, threads: int | None) -> None:
    """Train a run to its end, unless it has ended already."""
    if (output / "model_final.pth").is_file():
        tqdm.write(f"{output}: trained already.")
        return
    arguments = ["--config-file", config, *plugins, "--resume", "OUTPUT_DIR", str(output), *options]
    call("train_net.py", *arguments, log=output / "output.txt" if log else None, threads=threads)


def has_teacher(config: str, options: list[str], key: str) -> bool:
    """Whether a config is that of a student with a teacher; plain students and those of mutual learning have none.

    Args:
        options: Overrides.
        key: What names the config, for messages.

    Raises:
        InputError: If there is no such config, or a key or value is wrong in it or in the overrides.
    """
    cfg = get_cfg()
    add_kd_config(cfg)
    merge_file(cfg, find_config(config, key))
    merge_list(cfg, options, "command line")
    check_run(cfg, config)
    return TeacherStudent.__name__ == cfg.MODEL.META_ARCHITECTURE


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, metavar="CONFIG")
    parser.add_argument("--teacher-weights", metavar="FILE", help="a trained teacher: none is trained then")
    parser.add_argument("--student", required=True, action="append", metavar="NAME=CONFIG", help="plain or distilled")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=1, help="students trained at a time; the cores are shared out")
    add_plugin_argument(parser)
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="overrides for every run")
    args = parser.parse_args()
    for student in args.student:
        if not all(student.partition("=")):
            parser.error(f"--student {student}: not of the form NAME=CONFIG")
    names = [student.partition("=")[0] for student in args.student]
    for option, values in (("--student", names), ("--seeds", args.seeds)):
        twice = [value for i, value in enumerate(values) if value in values[:i]]
        if twice:
            parser.error(f"{option}: {twice[0]} is given twice, and its runs would share a folder")
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs}: must be at least 1")
    if args.teacher_weights:
        find_file(args.teacher_weights, "--teacher-weights")
    return args


def main() -> None:
    args = parse_args()
    begin = time.monotonic()
    plugins = [part for path in args.plugin for part in ("--plugin", path)]
    for path in args.plugin:
        import_plugin(path)
    # All that can be found wrong without building a model is found before the first run.
    has_teacher(args.teacher, args.opts, "--teacher")
    students = [student.split("=", 1) for student in args.student]
    taught = {name: has_teacher(config, args.opts, f"--student {name}") for name, config in students}
    teacher, weights = str(args.output / "teacher"), args.teacher_weights
    if weights:
        teacher = f"{args.teacher}:{weights}"
    else:
        train(args.teacher, Path(teacher), ["SEED", "0", *args.opts], plugins=plugins, log=False, threads=None)
        weights = f"{teacher}/model_final.pth"
    options = ["KD.TEACHER.CONFIG_FILE", args.teacher, "KD.TEACHER.WEIGHTS", weights]
    runs = [
        (
            name,
            config,
            args.output / f"{name}_seed{seed}",
            ["SEED", str(seed), *(options if taught[name] else []), *args.opts],
        )
        for seed in args.seeds
        for name, config in students
    ]
    threads = max(1, os.cpu_count() // args.jobs) if args.jobs > 1 else None
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = [pool.submit(train, *run[1:], plugins=plugins, log=args.jobs > 1, threads=threads) for run in runs]
        try:
            for job in tqdm(jobs, desc="students", disable=args.jobs == 1):
                job.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    names = [("teacher", teacher), *((name, output) for name, _, output, _ in runs)]
    call(
        "compare.py",
        *(x for name, path in names for x in ("--run", f"{name}={path}")),
        *plugins,
        "--output",
        str(args.output / "comparison"),
    )
    print(f"Done in {(time.monotonic() - begin) / 60:.1f} minutes.")


if __name__ == "__main__":
    try:
        main()
    except (CallError, InputError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("error: interrupted; the same command goes on.")
