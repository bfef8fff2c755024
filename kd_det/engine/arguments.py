"""Declares the arguments of the command-line tools; imports nothing slow."""

import argparse
import os


def training_parser(description: str) -> argparse.ArgumentParser:
    """Makes the parser for training, with the arguments of Detectron2's ``default_argument_parser`` and those below.

    Args:
        description: Text for ``--help``.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", default="", metavar="FILE", help="config: a file, or a name of the model zoo")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in OUTPUT_DIR")
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
    group.add_argument("--teacher", metavar="CONFIG", help="the teacher's config: a file, or a name of the model zoo")
    group.add_argument(
        "--teacher-weights", metavar="FILE", help="the teacher's checkpoint, if its config names another"
    )
    group.add_argument(
        "--kd-heads", metavar="HEAD,...", help="distillation heads, for example ReviewKDHead,SoftTargetHead"
    )
    add_plugin_argument(group)


def add_plugin_argument(parser: argparse._ActionsContainer) -> None:
    """Adds ``--plugin``, whose files :func:`kd_det.engine.import_plugin` imports."""
    parser.add_argument(
        "--plugin",
        action="append",
        default=[],
        metavar="FILE",
        help="Python file whose code is run first, with all your rights: it registers heads, backbones or the like; "
        "repeat it for several",
    )
