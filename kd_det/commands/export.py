"""Export the student of a run: a plain Detectron2 checkpoint and config, and TorchScript.

    kd-det export --run output/reviewkd --output exported
    kd-det export --config-file reviewkd_r101_r18.yaml --weights model.pth --output exported
    kd-det export --run output/reviewkd --ema --output averaged

exported/student.yaml and student.pth need only Detectron2, for example its DefaultPredictor, unless a part of the model
belongs to kd_det (image classifiers, timm's networks, build_basic_resnet_fpn_backbone) or to a plugin; this command and
the YAML then say what to import.

exported/student.ts needs only torch and torchvision. It maps one image, (3, H, W) float32 from 0 to 255, to a tuple of
tensors. It takes one image at a time, of any size (detectors) or of the sample's size (image classifiers), on the kind
of device that it was traced on. The export fails unless its results equal those of the eager model, on the sample and
on another image made from it.

exported/backbone.pth, for image classifiers only, serves as MODEL.WEIGHTS of a detector with the same backbone, with or
without kd_det. Such a detector needs the classifier's INPUT.FORMAT, MODEL.PIXEL_MEAN and PIXEL_STD.
"""

import argparse
from collections.abc import Sequence

from kd_det.engine.arguments import add_plugin_argument, make_parser
from kd_det.engine.cli import import_plugin
from kd_det.errors import InputError
from kd_det.files import naming


def parse_args(arguments: Sequence[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, prog)
    parser.add_argument("--run", metavar="FOLDER", help="output folder of a run: its config.yaml and newest checkpoint")
    parser.add_argument("--config-file", metavar="FILE", help="instead of --run, together with --weights")
    parser.add_argument("--weights", metavar="FILE", help="instead of --run, together with --config-file")
    parser.add_argument("--ema", action="store_true", help="export the averaged weights (SOLVER.EMA_DECAY of the run)")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="folder to create")
    sample = parser.add_mutually_exclusive_group()
    sample.add_argument("--image", metavar="FILE", help="image to trace on (default: the first of DATASETS.TEST)")
    sample.add_argument(
        "--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="trace on noise of this size instead"
    )
    parser.add_argument("--no-torchscript", action="store_true", help="do not write student.ts")
    parser.add_argument(
        "--device", default="cpu", choices=["cpu", "cuda"], help="device that student.ts will run on (%(default)s)"
    )
    add_plugin_argument(parser)
    return parser.parse_args(arguments)


def main(args: argparse.Namespace) -> None:
    if bool(args.run) == bool(args.config_file or args.weights) or bool(args.config_file) != bool(args.weights):
        raise InputError("give either --run, or --config-file and --weights.")
    import torch

    from kd_det.export import export_student, find_run, header, read_sample, read_student_config

    for path in args.plugin:
        import_plugin(path)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device: this machine has no GPU.")
    config_file, weights = find_run(args.run) if args.run else (args.config_file, args.weights)
    cfg = read_student_config(config_file)
    sample = None if args.no_torchscript else read_sample(cfg, args.image, args.size)
    with naming(args.output):
        exported = export_student(cfg, weights, args.output, ema=args.ema, sample=sample, device=args.device)
    print(f"{args.output}: {', '.join(exported.files)}")
    print(header(exported.needs).replace("# ", ""), end="")
    if exported.tried:
        sizes = " and ".join(f"{height} x {width}" for height, width in exported.tried)
        print(f"student.ts returns ({', '.join(exported.outputs)}); equal to the eager model on images of {sizes}.")
