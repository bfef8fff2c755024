"""Measure how much trained models suffer from Gaussian noise in a feature: task loss, and AP or accuracy.

    kd-det noise --feature res4 --run plain=output/plain --run IE=output/inherit_explore

The noise of strength s is s times the standard deviation of each channel over the images, times standard normal
numbers, the same for all runs. A run is NAME=FOLDER, the output folder of a training, or NAME=CONFIG:WEIGHTS. Runs with
the same name, for example with different seeds, share a curve: mean and standard deviation over draws and runs. All
runs must be detectors, or all image classifiers.

The test set is evaluated once without noise, and DRAWS times for each run and strength.
"""

import argparse
from collections.abc import Sequence

from kd_det.engine.arguments import add_plugin_argument, make_parser
from kd_det.engine.cli import import_plugin
from kd_det.files import naming


def parse_args(arguments: Sequence[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, prog)
    parser.add_argument("--run", action="append", required=True, metavar="NAME=SOURCE", help="a model; repeat it")
    parser.add_argument("--feature", required=True, metavar="NAME", help="for example res4, p4 or pooled")
    parser.add_argument(
        "--strengths",
        type=float,
        nargs="+",
        default=[0, 0.25, 0.5, 0.75, 1],
        metavar="S",
        help="strengths of the noise (0 0.25 0.5 0.75 1)",
    )
    parser.add_argument("--draws", type=int, default=3, help="draws of the noise at each strength (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise (%(default)s)")
    parser.add_argument("--dataset", metavar="NAME", help="the test set (default: DATASETS.TEST of the first run)")
    parser.add_argument("--images", type=int, help="number of its images to use (default: all)")
    parser.add_argument(
        "--output", default="noise", metavar="FOLDER", help="folder for JSON, table and PNG (%(default)s)"
    )
    add_plugin_argument(parser)
    return parser.parse_args(arguments)


def main(args: argparse.Namespace) -> None:
    from kd_det.analysis import split_run
    from kd_det.analysis.compare_noise import compare_noise

    for path in args.plugin:
        import_plugin(path)
    runs = [split_run(run) for run in args.run]
    with naming(args.output):
        results = compare_noise(
            runs,
            args.feature,
            args.output,
            strengths=args.strengths,
            draws=args.draws,
            seed=args.seed,
            dataset=args.dataset,
            images=args.images,
        )
    print(results["table"])
    print(f"\n{args.output}: noise.json, noise.md, noise.png")
