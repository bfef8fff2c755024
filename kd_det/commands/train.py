"""Train, resume or evaluate a detector: plain, or distilled from a teacher.

    kd-det train --config-file reviewkd_r101_r18.yaml
    kd-det train --config-file reviewkd_r101_r18.yaml --resume
    kd-det train --config-file reviewkd_r101_r18.yaml --eval-only MODEL.WEIGHTS output/model_final.pth

A student's config becomes a distillation run with a recipe after it, and any Detectron2 config if a teacher and heads
are named:

    kd-det train --config-file BCCD/student.yaml recipes/reviewkd.yaml
    kd-det train --config-file COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml \\
        --teacher COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml --kd-heads ReviewKDHead

On several GPUs: --num-gpus 8, or torchrun --nproc-per-node 8 -m kd_det train ..., or SLURM's srun with one task per
GPU.

SIGTERM, Ctrl-C and SIGUSR1 (SLURM: --signal=USR1@120) stop a training after the current iteration, with a checkpoint
and exit status 75; --resume continues it. A second Ctrl-C stops it at once.
"""

import argparse
from collections.abc import Sequence

from kd_det.engine.arguments import training_parser


def parse_args(arguments: Sequence[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    return training_parser(__doc__, prog).parse_args(arguments)


def run(args: argparse.Namespace) -> None:
    from kd_det.checkpoint import KDCheckpointer, load_strictly
    from kd_det.config import student_config
    from kd_det.engine import Trainer, setup
    from kd_det.engine.interruption import interruptible
    from kd_det.engine.stages import train
    from kd_det.engine.tta import evaluate_with_tta
    from kd_det.errors import InputError
    from kd_det.files import naming

    cfg = setup(args)
    if args.eval_only:
        cfg = student_config(cfg)
        model = Trainer.build_model(cfg)
        checkpointer = KDCheckpointer(model, cfg.OUTPUT_DIR)
        if args.resume and checkpointer.has_checkpoint():
            checkpointer.resume_or_load("", resume=True)
        elif cfg.MODEL.WEIGHTS:
            load_strictly(model, cfg.MODEL.WEIGHTS, key="MODEL.WEIGHTS")
        else:
            raise InputError("MODEL.WEIGHTS: is empty, but --eval-only needs a trained model.")
        with naming(cfg.OUTPUT_DIR):
            Trainer.test(cfg, model)
            if cfg.TEST.AUG.ENABLED:
                evaluate_with_tta(Trainer.test, cfg, model)
        return
    with interruptible():
        train(cfg, resume=args.resume)


def main(args: argparse.Namespace) -> None:
    from kd_det.engine.launching import launch_workers

    launch_workers(run, args)
