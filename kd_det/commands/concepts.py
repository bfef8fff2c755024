"""Count the visual concepts of trained models, and measure how fast and how directly they were learned.

    kd-det concepts --feature res4 --run plain=output/plain --run KD=output/soft_target
    kd-det concepts --feature pooled --images 50 --run plain=output/plain

A visual concept is a cell of an image that a feature depends on more than on the background (Cheng et al., CVPR 2020,
https://arxiv.org/abs/2003.03622). A run is NAME=FOLDER, the output folder of a training, or NAME=CONFIG:WEIGHTS. Runs
with the same name share a row: mean and standard deviation. The columns:

    N_fg, N_bg      concepts on objects and on the background
    lambda          share of the concepts that lie on objects
    D_mean, D_std   mean and variance of the distance that the weights moved until an image had the most concepts
    rho             share of all concepts ever learned that the last checkpoint still has

The last three need several checkpoints in the folder (SOLVER.CHECKPOINT_PERIOD). Each image and checkpoint takes
STEPS x COPIES forward and backward passes.
"""

import argparse
from collections.abc import Sequence

from kd_det.engine.arguments import add_plugin_argument, make_parser
from kd_det.engine.cli import import_plugin
from kd_det.errors import InputError


def parse_args(arguments: Sequence[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, prog)
    parser.add_argument("--run", action="append", required=True, metavar="NAME=SOURCE", help="a model; repeat it")
    parser.add_argument("--feature", required=True, metavar="NAME", help="for example res4, pooled or roi_box_features")
    parser.add_argument("--dataset", metavar="NAME", help="the test set (default: DATASETS.TEST of the first run)")
    parser.add_argument("--images", type=int, default=20, help="number of its images to use (%(default)s)")
    parser.add_argument("--grid", type=int, default=16, help="cells along each side of an image (%(default)s)")
    parser.add_argument("--steps", type=int, default=80, help="steps of the search for the noise (%(default)s)")
    parser.add_argument("--copies", type=int, default=96, help="noisy copies of an image per step (%(default)s)")
    parser.add_argument("--batch", type=int, default=96, help="copies to compute at a time (%(default)s)")
    parser.add_argument("--weight", type=float, default=6.0, help="weight of the noise's entropy (%(default)s)")
    parser.add_argument("--threshold", type=float, default=0.2, help="threshold of a concept in nats (%(default)s)")
    parser.add_argument(
        "--bound",
        type=float,
        metavar="TAU",
        help="compare images at this change of the feature, relative to that under the initial noise, as the paper "
        "defines it (default: at the same mean entropy, as in the published code)",
    )
    parser.add_argument(
        "--foreground",
        default="masks",
        metavar="KIND",
        help="masks of the objects, where there are any, or boxes (%(default)s)",
    )
    add_plugin_argument(parser)
    return parser.parse_args(arguments)


def main(args: argparse.Namespace) -> None:
    search = {name: getattr(args, name) for name in ("grid", "steps", "copies", "batch", "weight")}
    search["bound"] = args.bound
    for name, value in {"images": args.images, **search}.items():
        if value is not None and not value > 0:
            raise InputError(f"--{name}: must be above 0, got {value}.")
    from kd_det.analysis import split_run
    from kd_det.analysis.compare_concepts import compare_concepts
    from kd_det.analysis.table import make_rows

    for path in args.plugin:
        import_plugin(path)
    runs = [split_run(run) for run in args.run]
    summary = compare_concepts(
        runs,
        args.feature,
        dataset=args.dataset,
        images=args.images,
        threshold=args.threshold,
        foreground=args.foreground,
        **search,
    )
    print(make_rows(summary, "concepts", runs))
