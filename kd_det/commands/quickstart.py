"""Go from nothing to a distilled student, on synthetic scenes, on a CPU.

    kd-det quickstart                   one seed, about eleven minutes on two cores
    kd-det quickstart --seeds 1 2 3     mean and spread over three students of each kind

If it is interrupted, run it again: it continues where it stopped. Every step is a command, printed before it runs.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from kd_det.commands.calls import Call
from kd_det.engine.arguments import make_parser
from kd_det.engine.processes import INTERRUPTED, running_commands


def parse_args(arguments: Sequence[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, prog)
    parser.add_argument("--seeds", nargs="+", default=["1"], help="train one student of each kind per seed (1)")
    parser.add_argument("--jobs", default="2", help="students to train at a time (%(default)s)")
    return parser.parse_args(arguments)


def main(args: argparse.Namespace) -> None:
    os.environ.setdefault("DETECTRON2_DATASETS", "datasets")
    shapes = Path(os.environ["DETECTRON2_DATASETS"], "shapes")
    configs = {
        name: f"quickstart/{file}.yaml"
        for name, file in {"teacher": "teacher", "plain": "student", "distilled": "distilled"}.items()
    }
    students = [x for name in ("plain", "distilled") for x in ("--student", f"{name}={configs[name]}")]
    repeat = ("--output", "output/quickstart", "--jobs", args.jobs, "--seeds", *args.seeds)
    with running_commands() as commands:
        for call in (
            Call("prepare-shapes", ("--output", str(shapes))),
            Call("repeat", (*repeat, "--teacher", configs["teacher"], *students)),
        ):
            status = commands.wait(call.start(commands))
            if commands.interrupted:
                sys.exit(INTERRUPTED)
            if status:  # The command has printed why it failed.
                sys.exit(status)
    print("All models on the same images, for a browser: output/quickstart/comparison/report.html")
