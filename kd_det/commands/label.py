"""Label folders of images with a trained detector, once, for a student that trains on these labels.

    kd-det label --teacher output/teacher --images photos --output labels.json

A teacher is the output folder of a training, CONFIG:WEIGHTS, or the name of a config of the model zoo. LABELS.json is a
COCO file with boxes, masks as RLE, classes and scores; LABELS.html shows it. Only objects above the score threshold of
their class are kept: that of the best F1 on a labelled data set, unless --threshold gives it.

The boxes of several teachers are fused by weighted boxes fusion; a fused box then has the mask of the detection that
overlaps it most.

If it is interrupted, the same command goes on where it was. Images that cannot be read are named and left out.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence

from kd_det.engine.arguments import add_plugin_argument, make_parser
from kd_det.engine.cli import import_plugin
from kd_det.errors import shorten
from kd_det.files import naming


def parse_args(arguments: Sequence[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, prog)
    parser.add_argument(
        "--teacher",
        action="append",
        required=True,
        metavar="SOURCE",
        help="a trained detector; repeat it to fuse the boxes of several",
    )
    parser.add_argument("--images", nargs="+", required=True, metavar="FOLDER", help="folders of images")
    parser.add_argument("--output", default="labels.json", metavar="FILE", help="COCO file to write (%(default)s)")
    parser.add_argument(
        "--config-file",
        default="",
        metavar="FILE",
        help="the config whose data sets define the classes, such as the student's (default: the first teacher's)",
    )
    parser.add_argument(
        "--dataset", metavar="NAME", help="labelled validation set (default: the first of DATASETS.TEST of the config)"
    )
    parser.add_argument(
        "--exclude", nargs="+", default=[], metavar="NAME", help="data sets whose images are not labelled"
    )
    parser.add_argument(
        "--threshold",
        nargs="+",
        default=[],
        metavar="SCORE",
        help="lowest score of a label: SCORE for all classes, CLASS=SCORE for one (default: that of each class's best "
        "F1 on the validation set)",
    )
    parser.add_argument(
        "--validate",
        type=float,
        metavar="AP50",
        help="compare the labels with the validation set, and write nothing if their AP50 in percent is lower",
    )
    parser.add_argument(
        "--tta",
        nargs="*",
        type=int,
        metavar="SIZE",
        help="detect in each image at several sizes, also flipped (default sizes: TEST.AUG of the teacher's config)",
    )
    parser.add_argument(
        "--iou",
        type=float,
        default=0.55,
        help="overlap above which the boxes of several teachers are one object (%(default)s)",
    )
    add_plugin_argument(parser)
    args = parser.parse_args(arguments)
    args.command = shlex.join(["kd-det", "label", *(sys.argv[1:] if arguments is None else arguments)])
    return args


def main(args: argparse.Namespace) -> None:
    from kd_det.labeling import LabelOptions, label_images

    for path in args.plugin:
        import_plugin(path)
    options = LabelOptions(
        teachers=args.teacher,
        images=args.images,
        output=args.output,
        config_file=args.config_file,
        dataset=args.dataset,
        exclude=args.exclude,
        thresholds=args.threshold,
        tta=args.tta,
        iou_threshold=args.iou,
        least_ap50=args.validate,
        command=args.command,
    )
    with naming(args.output):
        done = label_images(options)
    if done.resumed:
        print(f"{done.resumed} images had been labelled before an interruption.")
    if done.left_out:
        print(f"{done.left_out} images of {', '.join(args.exclude)} are left out.")
    print(", ".join(f"{name} from {score:.3f}" for name, score in done.thresholds.items()))
    if done.validation:
        print(f"{done.validation.dataset}: AP50 {done.validation.ap50:.2f}")
    if done.unreadable:
        print(f"Images that cannot be read: {shorten(done.unreadable)}.")
    print(f"{args.output}: {done.objects} objects in {done.images} images; IMAGE_ROOT is {done.root}.")
    print(f"{options.report}: numbers and pictures.")
