"""Runs ``kd-det`` and its commands; imports nothing slow before a command has parsed its arguments."""

import argparse
from collections.abc import Sequence
from importlib import import_module

import kd_det
from kd_det.engine.arguments import make_parser
from kd_det.engine.cli import run_tool
from kd_det.errors import check_choice

# Maps each command to its summary. Its module has the same name, with underscores.
COMMANDS = {
    "train": "train, resume or evaluate a detector: plain, or distilled from a teacher",
    "repeat": "train a teacher and students over several seeds, and compare them",
    "compare": "compare trained models on one test set: accuracy, size, speed, a picture",
    "export": "export the student of a run: for Detectron2 alone, as TorchScript, as ONNX",
    "label": "label folders of images with a trained detector, for training on them",
    "benchmark": "measure what distillation costs in a training step",
    "gpu-check": "check kd_det on a GPU, and print a table for an issue",
    "concepts": "count the visual concepts of trained models",
    "similarity": "measure the similarity of students' halves to the teacher (CKA)",
    "relevance": "show which pixels trained models look at",
    "noise": "measure how much trained models suffer from noise in a feature",
    "quickstart": "go from nothing to a distilled student, on synthetic scenes",
    "prepare-shapes": "write the synthetic scenes of the quickstart",
}


def main() -> None:
    """Runs the command that the command line of ``kd-det`` names."""
    args = parse_args()
    run_command(args.command, args.arguments, f"kd-det {args.command}")


def parse_args() -> argparse.Namespace:
    width = max(map(len, COMMANDS))
    lines = [f"    {name:{width}}  {summary}" for name, summary in COMMANDS.items()]
    description = "\n".join(["Distil detectors with Detectron2. The commands:", "", *lines])
    parser = make_parser(description, "kd-det")
    parser.add_argument("--version", action="version", version=f"kd_det {kd_det.__version__}")
    parser.add_argument(
        "command", metavar="COMMAND", help="one of the above; kd-det COMMAND --help shows its arguments"
    )
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="arguments of the command")
    return parser.parse_args()


def run_command(name: str, arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Runs a command as a program: a user's mistake ends it in one line.

    Args:
        name: A key of COMMANDS.
        arguments: Its arguments; by default, those of this process.
        prog: The name of the program in its messages; by default, that of the file that Python was started with.
    """

    def run() -> None:
        check_choice("kd-det", name, COMMANDS)
        command = import_module(f"kd_det.commands.{name.replace('-', '_')}")
        command.main(command.parse_args(arguments, prog))

    run_tool(run)
