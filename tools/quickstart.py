#!/usr/bin/env python
"""From nothing to a distilled student, on synthetic scenes, on a CPU.

    tools/quickstart.py                   one seed, about eleven minutes on two cores
    tools/quickstart.py --seeds 1 2 3     mean and spread over three students of each kind

Run again after an interruption, it goes on where it was. Every step is a command that is printed before it runs.
"""

import argparse
import os
import shlex
import sys
from pathlib import Path

from kd_det.engine.cli import run_tool
from kd_det.engine.processes import INTERRUPTED, running_commands

ROOT = Path(__file__).resolve().parents[1]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", default=["1"], help="one student of each kind per seed (1)")
    parser.add_argument("--jobs", default="2", help="students trained at a time (%(default)s)")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    os.environ.setdefault("DETECTRON2_DATASETS", "datasets")
    shapes = Path(os.environ["DETECTRON2_DATASETS"], "shapes")
    configs = {
        name: f"configs/quickstart/{file}.yaml"
        for name, file in {"teacher": "teacher", "plain": "student", "distilled": "distilled"}.items()
    }
    students = [x for name in ("plain", "distilled") for x in ("--student", f"{name}={configs[name]}")]
    with running_commands() as commands:
        for command in (
            ["datasets/prepare_shapes.py", "--output", str(shapes)],
            [
                *("tools/repeat.py", "--output", "output/quickstart", "--jobs", args.jobs, "--seeds", *args.seeds),
                *("--teacher", configs["teacher"], *students),
            ],
        ):
            print(f"$ python {shlex.join(command)}", flush=True)
            status = commands.wait(commands.start([sys.executable, "-W", "ignore", *command], cwd=ROOT))
            if commands.interrupted:
                sys.exit(INTERRUPTED)
            if status:
                sys.exit(status)
    print("The same images, seen by all: output/quickstart/comparison/")


if __name__ == "__main__":
    run_tool(main)
