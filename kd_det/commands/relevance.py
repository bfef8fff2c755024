"""Show which pixels trained models look at: relevance maps (LRP) of teacher and students, with figures.

    kd-det relevance --teacher output/teacher --run plain=output/plain --run KD=output/soft_target
    kd-det relevance --teacher output/teacher --feature res4 --run IE=output/inherit_explore

Layer-wise relevance propagation distributes a class logit over the pixels. For a detector, the largest object of each
image is explained: its labelled class in its labelled box. A SOURCE is the output folder of a training, or
CONFIG:WEIGHTS. Runs with the same name share a row: mean and standard deviation. The columns:

    in box, in mask      share of the positive relevance that lies in the object
    rank correlation     Spearman's correlation with the teacher's map

With --feature, rows for the inheriting and the exploring half of its channels are added (KD.INHERIT_EXPLORE).
"""

import argparse
from collections.abc import Sequence

from kd_det.engine.arguments import add_plugin_argument, make_parser
from kd_det.engine.cli import import_plugin
from kd_det.files import naming


def parse_args(arguments: Sequence[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, prog)
    parser.add_argument("--teacher", required=True, metavar="SOURCE")
    parser.add_argument("--run", action="append", required=True, metavar="NAME=SOURCE", help="a student; repeat it")
    parser.add_argument("--feature", metavar="NAME", help="a map of the students' backbones, for example res4 or p4")
    parser.add_argument(
        "--composite",
        default="layered",
        metavar="RULES",
        help="layered, zero, epsilon, gamma or z_plus (%(default)s)",
    )
    parser.add_argument("--dataset", metavar="NAME", help="the test set (default: DATASETS.TEST of the teacher)")
    parser.add_argument("--images", type=int, default=20, help="number of its images to use (%(default)s)")
    parser.add_argument(
        "--output", default="relevance", metavar="FOLDER", help="folder for JSON, table and PNG (%(default)s)"
    )
    add_plugin_argument(parser)
    return parser.parse_args(arguments)


def main(args: argparse.Namespace) -> None:
    from kd_det.analysis import split_run
    from kd_det.analysis.compare_relevance import compare_relevance

    for path in args.plugin:
        import_plugin(path)
    runs = [split_run(run) for run in args.run]
    with naming(args.output):
        results = compare_relevance(
            args.teacher,
            runs,
            args.output,
            dataset=args.dataset,
            images=args.images,
            composite=args.composite,
            feature=args.feature,
        )
    print(results["table"])
    print(f"\n{args.output}: relevance.json, relevance.md, relevance.png")
