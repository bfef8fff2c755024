"""Measure the similarity (linear CKA) of the two halves of students' channels to each other and to the teacher.

    kd-det similarity --teacher output/teacher --feature res4 --run plain=output/plain --run IE=output/inherit_explore

A SOURCE is the output folder of a training, or CONFIG:WEIGHTS. Runs with the same name share a row: mean and standard
deviation. The halves are those of KD.INHERIT_EXPLORE.

With --swap, each half goes through its own encoder and through that of the other half, and their factors are compared
with the teacher's: "explore by inherit" is the exploring half in the inheriting half's encoder.
"""

import argparse
from collections.abc import Sequence

from kd_det.engine.arguments import add_plugin_argument, make_parser
from kd_det.engine.cli import import_plugin


def parse_args(arguments: Sequence[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, prog)
    parser.add_argument("--teacher", required=True, metavar="SOURCE")
    parser.add_argument("--run", action="append", required=True, metavar="NAME=SOURCE", help="a student; repeat it")
    parser.add_argument("--feature", required=True, metavar="NAME", help="for example res4, p4 or roi_features")
    parser.add_argument("--dataset", metavar="NAME", help="the test set (default: DATASETS.TEST of the teacher)")
    parser.add_argument("--swap", action="store_true", help="compare factors, also with the encoders swapped (IE-KD)")
    add_plugin_argument(parser)
    return parser.parse_args(arguments)


def main(args: argparse.Namespace) -> None:
    from kd_det.analysis import split_run
    from kd_det.analysis.compare_halves import compare_halves
    from kd_det.analysis.table import make_rows

    for path in args.plugin:
        import_plugin(path)
    runs = [split_run(run) for run in args.run]
    summary = compare_halves(args.teacher, runs, args.feature, dataset=args.dataset, swap=args.swap)
    print(make_rows(summary, "CKA", runs))
