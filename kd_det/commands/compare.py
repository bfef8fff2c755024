"""Compare trained models on one test set: accuracy, per class too, size, operations, speed, and a picture.

    kd-det compare --run teacher=output/teacher --run plain=output/plain --run distilled=output/distilled

A run is NAME=FOLDER, the output folder of a training, or NAME=CONFIG:WEIGHTS. Several runs of one name, for example
with other seeds, become one column: mean and standard deviation. All runs are detectors, or all are image classifiers.
Of the output folder of KD.GENERATIONS each generation is compared, and their ensemble. The picture shows of each
detector the hits, the false detections and the missed objects, with the score threshold of its best F1.
"""

import argparse
from collections.abc import Sequence

from kd_det.engine.arguments import add_plugin_argument, make_parser
from kd_det.engine.cli import import_plugin
from kd_det.files import naming


def parse_args(arguments: Sequence[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, prog)
    parser.add_argument("--run", action="append", required=True, metavar="NAME=SOURCE", help="a model; repeat it")
    parser.add_argument(
        "--output", default="comparison", metavar="FOLDER", help="for JSON, table and PNG (%(default)s)"
    )
    parser.add_argument("--dataset", metavar="NAME", help="the test set (default: DATASETS.TEST of the first run)")
    parser.add_argument("--images", type=int, default=4, help="images in the picture and for the speed (%(default)s)")
    parser.add_argument(
        "--threshold",
        type=float,
        metavar="SCORE",
        help="least score of the boxes in the picture (default: that of each detector's best F1 on the test set)",
    )
    add_plugin_argument(parser)
    return parser.parse_args(arguments)


def main(args: argparse.Namespace) -> None:
    from kd_det.analysis import compare, split_run

    for path in args.plugin:
        import_plugin(path)
    runs = [split_run(run) for run in args.run]
    with naming(args.output):
        results = compare(runs, args.output, dataset=args.dataset, images=args.images, threshold=args.threshold)
    print(results["table"])
    print(f"\n{args.output}: comparison.json, comparison.md, comparison.png")
