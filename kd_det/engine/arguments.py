"""Declares the arguments of the command-line tools; imports nothing slow."""

import argparse
import os
import sys
from collections.abc import Collection, Iterable
from typing import Any

YAML = (".yaml", ".yml")


class ConfigFilesParser(argparse.ArgumentParser):
    """Parses options that take several config files: all arguments after them that end in .yaml or .yml.

    Overrides may follow, which an option with ``nargs="+"`` would take for files.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._file_options: set[str] = set()

    def add_files_argument(self, option: str, **kwargs: Any) -> None:
        """Adds an option whose values are lists of files."""
        self._file_options.add(option)
        self.add_argument(option, type=str.splitlines, **kwargs)

    def parse_known_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> Any:
        arguments = sys.argv[1:] if args is None else args
        return super().parse_known_args(_join_files(arguments, self._file_options), namespace)


def _join_files(arguments: Iterable[str], options: Collection[str]) -> list[str]:
    """Joins the files after each of the options by line breaks, so that they are one argument."""
    joined: list[str] = []
    in_files = False
    for argument in arguments:
        is_first = bool(joined) and joined[-1] in options
        if in_files and not is_first and argument.endswith(YAML):
            joined[-1] += f"\n{argument}"
        else:
            in_files = (in_files and is_first) or argument.partition("=")[0] in options
            joined.append(argument)
    return joined


def make_parser(description: str | None, prog: str | None = None) -> ConfigFilesParser:
    """Makes the parser of a command, without its arguments.

    Args:
        description: Text for ``--help``, shown with its line breaks.
        prog: Name of the program; by default, the name of the file that Python was started with.
    """
    formatter = argparse.RawDescriptionHelpFormatter
    return ConfigFilesParser(prog=prog, description=description, formatter_class=formatter)


def training_parser(description: str | None, prog: str | None = None) -> ConfigFilesParser:
    """Makes the parser for training, with the arguments of Detectron2's ``default_argument_parser`` and those below.

    Args:
        description: See :func:`make_parser`.
        prog: See :func:`make_parser`.
    """
    parser = make_parser(description, prog)
    parser.add_files_argument(
        "--config-file",
        action="extend",
        default=[],
        metavar="FILE",
        help="config: a file, or a name of the model zoo or of kd_det; further ones after it, such as "
        "recipes/reviewkd.yaml, are merged in order",
    )
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint in OUTPUT_DIR")
    parser.add_argument(
        "--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS on DATASETS.TEST, train nothing"
    )
    parser.add_argument("--num-gpus", type=int, default=1, metavar="N", help="GPUs of this machine (%(default)s)")
    parser.add_argument("--num-machines", type=int, default=1, metavar="N", help="machines of the run (%(default)s)")
    parser.add_argument("--machine-rank", type=int, default=0, metavar="I", help="number of this machine, from 0")
    # As in Detectron2, each user gets a fixed port, so that a process left over from an earlier run is noticed.
    port = 2**15 + 2**14 + hash(os.getuid()) % 2**14
    parser.add_argument(
        "--dist-url", default=f"tcp://127.0.0.1:{port}", metavar="URL", help="where processes meet (%(default)s)"
    )
    add_distillation_arguments(parser)
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="overrides of the config, at the end"
    )
    return parser


def add_distillation_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that turn any Detectron2 config into a distillation run."""
    group = parser.add_argument_group("distillation")
    group.add_argument("--teacher", metavar="CONFIG", help="the teacher's config: a file or a name, as above")
    group.add_argument(
        "--teacher-weights", metavar="FILE", help="the teacher's checkpoint, if its config names another"
    )
    group.add_argument(
        "--kd-heads",
        metavar="HEAD,...",
        help="distillation heads, for example ReviewKDHead,SoftTargetHead; recommended is recipes/recommended.yaml",
    )
    add_plugin_argument(group)


def add_plugin_argument(parser: argparse._ActionsContainer) -> None:
    """Adds ``--plugin``, whose files :func:`kd_det.engine.import_plugin` imports."""
    parser.add_argument(
        "--plugin",
        action="append",
        default=[],
        metavar="FILE",
        help="Python file whose code is run first, with all your rights, so that it can register heads, backbones and "
        "the like; repeat the option for several files",
    )
