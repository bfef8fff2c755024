"""Write the synthetic data set "shapes" of the quickstart: a few seconds, no download.

The folder is in both COCO and Pascal VOC layout.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from kd_det.engine.arguments import make_parser


def parse_args(arguments: Sequence[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, prog)
    parser.add_argument("--output", type=Path, default=Path("datasets/shapes"), help="folder to write (%(default)s)")
    parser.add_argument("--train", type=int, default=1000, help="images to train on (%(default)s)")
    parser.add_argument("--test", type=int, default=200, help="images to test on (%(default)s)")
    parser.add_argument("--size", type=int, default=128, help="side of the images in pixels (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other images (%(default)s)")
    return parser.parse_args(arguments)


def main(args: argparse.Namespace) -> None:
    from kd_det.data.shapes_folder import write_shapes

    written = write_shapes(args.output, train=args.train, test=args.test, size=args.size, seed=args.seed)
    print(f"{args.output}: {'written' if written else 'already there, with these parameters'}.")
