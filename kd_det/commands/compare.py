"""Compare trained models on one test set: accuracy (also per class), size, operations, speed, and pictures.

    kd-det compare --run teacher=output/teacher --run plain=output/plain --run distilled=output/distilled

A run is NAME=FOLDER, the output folder of a training, or NAME=CONFIG:WEIGHTS. It can also be a file of kd-det export,
which runs on the CPU: NAME=EXPORTED/student.onnx or student.ts; with CONFIG:FILE its test set can be one that only
this config defines. Runs with the same name, for example with different seeds, share a column: mean and standard
deviation. All runs must be detectors, or all image classifiers. For the output folder of KD.GENERATIONS, each
generation and their ensemble are compared. For each detector, the picture shows hits, false detections and missed
objects at the score threshold of its best F1.

With --baseline, runs of the same SEED are paired: a second table has the mean difference of each metric, its 95 %
confidence interval and, from three seeds on, a verdict: helps, hurts or no evidence.

With --html, all of it is also in one file, OUTPUT/report.html, with learning curves and more test images, and with
what kd-det relevance and kd-det noise have written to OUTPUT.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence

from kd_det.engine.arguments import add_plugin_argument, make_parser
from kd_det.engine.cli import import_plugin
from kd_det.files import naming


def parse_args(arguments: Sequence[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, prog)
    parser.add_argument("--run", action="append", required=True, metavar="NAME=SOURCE", help="a model; repeat it")
    parser.add_argument(
        "--output", default="comparison", metavar="FOLDER", help="folder for JSON, table and PNG (%(default)s)"
    )
    parser.add_argument("--dataset", metavar="NAME", help="the test set (default: DATASETS.TEST of the first run)")
    parser.add_argument(
        "--images", type=int, help="images in the picture, which also measure speed (4), and in the report (24)"
    )
    parser.add_argument(
        "--threshold",
        type=float,
        metavar="SCORE",
        help="lowest score of the boxes in the picture (default: that of each detector's best F1 on the test set)",
    )
    parser.add_argument(
        "--baseline",
        action="append",
        default=[],
        metavar="NAME",
        help="the runs that all others are compared with, by seed; or STUDENT=NAME, for one student; repeat it",
    )
    parser.add_argument("--html", action="store_true", help="write OUTPUT/report.html, a page for a browser, too")
    add_plugin_argument(parser)
    args = parser.parse_args(arguments)
    args.command = shlex.join(["kd-det", "compare", *(sys.argv[1:] if arguments is None else arguments)])
    return args


def main(args: argparse.Namespace) -> None:
    from kd_det.analysis import compare, split_run
    from kd_det.analysis.report import tables

    for path in args.plugin:
        import_plugin(path)
    runs = [split_run(run) for run in args.run]
    baselines = [(student, name) for student, _, name in (text.rpartition("=") for text in args.baseline)]
    with naming(args.output):
        results = compare(
            runs,
            args.output,
            dataset=args.dataset,
            images=args.images,
            threshold=args.threshold,
            baselines=baselines,
            html=args.html,
            command=args.command,
        )
    print(tables(results))
    print(f"\n{args.output}: comparison.json, comparison.md, comparison.png" + ", report.html" * args.html)
