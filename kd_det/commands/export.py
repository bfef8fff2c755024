"""Export the student of a run: a plain Detectron2 checkpoint and config, TorchScript, and ONNX.

    kd-det export --run output/reviewkd --output exported
    kd-det export --config-file reviewkd_r101_r18.yaml --weights model.pth --output exported
    kd-det export --run output/reviewkd --ema --output averaged
    kd-det export --run output/reviewkd --onnx --output deployed

exported/student.yaml and student.pth need only Detectron2, for example its DefaultPredictor, unless a part of the model
belongs to kd_det (image classifiers, timm's networks, build_basic_resnet_fpn_backbone) or to a plugin; this command and
the YAML then say what to import.

exported/student.ts needs only torch and torchvision. It maps one image, (3, H, W) float32 from 0 to 255, to a tuple of
tensors. It takes one image at a time, of any size (detectors) or of the sample's size (image classifiers), on the kind
of device that it was traced on. The export fails unless its results equal those of the eager model, on the sample and
on another image made from it.

With --onnx, exported/student.onnx needs only an ONNX runtime. Its input, image, is that of student.ts; its outputs are
boxes, classes and scores, and masks or keypoints if the student has them; of a classifier, scores. Height and width are
free, save for classifiers of a fixed size. Its metadata has the names of the classes, the channel order, and more. The
export fails unless ONNX Runtime gives the results of the eager model on four images of three sizes. It supports
GeneralizedRCNN, RetinaNet and ImageClassifier. See docs/deploy.md.

With --safetensors and --model-card, the folder is ready for the Hugging Face Hub: student.safetensors holds the weights
of student.pth, and README.md says where the student comes from: data, classes, teacher, heads, accuracy, with intervals
if the run is one of kd-det repeat, speed, commands, and a license to be filled in.

exported/backbone.pth, for image classifiers only, serves as MODEL.WEIGHTS of a detector with the same backbone, with or
without kd_det. Such a detector needs the classifier's INPUT.FORMAT, MODEL.PIXEL_MEAN and PIXEL_STD.
"""

import argparse
import shlex
import sys
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
        "--onnx",
        action="store_true",
        help="write student.onnx; needs onnx and onnxruntime: pip install 'kd_det[deploy]'",
    )
    parser.add_argument("--safetensors", action="store_true", help="write student.safetensors, too")
    parser.add_argument(
        "--model-card", action="store_true", help="write README.md, a model card for the Hugging Face Hub"
    )
    parser.add_argument(
        "--device", default="cpu", choices=["cpu", "cuda"], help="device that student.ts will run on (%(default)s)"
    )
    add_plugin_argument(parser)
    args = parser.parse_args(arguments)
    args.command = shlex.join(["kd-det", "export", *(sys.argv[1:] if arguments is None else arguments)])
    return args


def main(args: argparse.Namespace) -> None:
    if bool(args.run) == bool(args.config_file or args.weights) or bool(args.config_file) != bool(args.weights):
        raise InputError("give either --run, or --config-file and --weights.")
    import torch

    from kd_det.config import read_config
    from kd_det.export import Origin, export_student, find_run, header, read_sample, read_student_config

    for path in args.plugin:
        import_plugin(path)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device: this machine has no GPU.")
    config_file, weights = find_run(args.run) if args.run else (args.config_file, args.weights)
    cfg = read_student_config(config_file)
    origin = None
    if args.model_card:
        whole = read_config(config_file, "--config-file", other_heads=True)
        origin = Origin(whole, args.run or "", args.command, ema=args.ema)
    needs_sample = args.onnx or not args.no_torchscript
    sample = read_sample(cfg, args.image, args.size) if needs_sample else None
    with naming(args.output):
        exported = export_student(
            cfg,
            weights,
            args.output,
            ema=args.ema,
            sample=sample,
            device=args.device,
            torchscript=not args.no_torchscript,
            onnx=args.onnx,
            safetensors=args.safetensors,
            origin=origin,
        )
    print(f"{args.output}: {', '.join(exported.files)}")
    print(header(exported.needs).replace("# ", ""), end="")
    for name, outputs, tried in (
        ("student.ts", exported.outputs, exported.tried),
        ("student.onnx", exported.onnx_outputs, exported.onnx_tried),
    ):
        if tried:
            sizes = " and ".join(f"{height} x {width}" for height, width in tried)
            print(f"{name} returns ({', '.join(outputs)}); equal to the eager model on images of {sizes}.")
