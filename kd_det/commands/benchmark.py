"""Measure what distillation adds to a training step, what makes a step faster, and where its time goes.

    kd-det benchmark
    kd-det benchmark --heads none ReviewKDHead HintHead,SoftTargetHead --rounds 20 --output benchmark
    kd-det benchmark --switches --heads ReviewKDHead,SoftTargetHead
    kd-det benchmark --profile --heads ReviewKDHead --output profile
    kd-det benchmark --heads ReviewKDHead --teacher new_baselines/mask_rcnn_R_101_FPN_400ep_LSJ.py KD.TEACHER.SCALE 1.5
    kd-det benchmark --heads SoftTargetHead --teacher a.yaml --teacher b.yaml
    kd-det benchmark --loader CONFIG DATALOADER.NUM_WORKERS 2

Mask R-CNN R18-FPN learns from Mask R-CNN R101-FPN, with random weights, on synthetic scenes. Per combination of heads:

    A  a step of the plain student: forward, backward, optimizer
    B  the teacher's forward pass alone: the signals that the heads need, on the student's sampled boxes
    C  a step of the student with teacher and heads

C / (A + B) is the cost of kd_det and the heads themselves, C / A the cost of distillation. A, B and C take turns, with
the same seed and a learning rate of 0, so that all of them sample the same boxes each time. Ratios are medians over
rounds, so that other load on the machine affects both sides of a ratio.

--switches measures the first combination that has heads: with each switch that may make it faster, and with all of them
off. --profile prints the operations of its distillation step that take the most time; with --output, it also writes
trace.json for chrome://tracing or https://ui.perfetto.dev. --loader measures a config's training data loader alone, in
images per second.
"""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

from kd_det.engine.arguments import add_plugin_argument, make_parser
from kd_det.engine.cli import import_plugin
from kd_det.errors import InputError
from kd_det.files import naming

COMBINATIONS = [
    "none",
    "ReviewKDHead",
    "AttentionTransferHead",
    "HintHead",
    "SoftTargetHead",
    "ReviewKDHead,SoftTargetHead",
    "SoftmaxRegressionHead",
    "FactorTransferHead",
    "InheritExploreHead",
    "OverhaulHead",
    "BornAgainHead",
]


def parse_args(arguments: Sequence[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, prog)
    parser.add_argument(
        "--heads",
        nargs="+",
        default=COMBINATIONS,
        metavar="HEAD,...",
        help="combinations of heads; none stands for the plain student",
    )
    parser.add_argument("--rounds", type=int, default=11, help="number of measurements of each (%(default)s)")
    parser.add_argument("--size", type=int, help="side of the images in pixels (800; 320 without a GPU)")
    parser.add_argument("--batch", type=int, help="images per step (8; 2 without a GPU)")
    parser.add_argument(
        "--depths",
        type=int,
        nargs=2,
        choices=(18, 34, 50, 101, 152),
        default=(18, 101),
        metavar=("STUDENT", "TEACHER"),
        help="depths of the ResNets: 18, 34, 50, 101 or 152 (18 and 101)",
    )
    parser.add_argument(
        "--amp",
        choices=["none", "float16", "bfloat16"],
        default="none",
        help="SOLVER.AMP.DTYPE and KD.TEACHER.DTYPE of all measurements (%(default)s)",
    )
    parser.add_argument(
        "--teacher",
        nargs="+",
        action="append",
        default=[],
        metavar=("CONFIG", "KEY VALUE"),
        help="another teacher, with random weights: its config, as for kd-det train, and overrides; if there are "
        "several, the heads average their probabilities",
    )
    add_plugin_argument(parser)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--switches", action="store_true", help="measure each switch against all of them off")
    mode.add_argument("--profile", action="store_true", help="profile the distillation step")
    mode.add_argument(
        "--loader", nargs="+", metavar=("CONFIG", "KEY VALUE"), help="measure only the data loader of this config"
    )
    parser.add_argument("--output", metavar="FOLDER", help="also write benchmark.md and benchmark.json there")
    args = parser.parse_args(arguments)
    for name, minimum in {"rounds": 1, "batch": 1, "size": 64}.items():
        value = getattr(args, name)
        if value is not None and value < minimum:
            raise InputError(f"--{name}: must be {minimum} or more, got {value}.")
    return args


def main(args: argparse.Namespace) -> None:
    import torch

    from kd_det import benchmarking

    for path in args.plugin:
        import_plugin(path)
    if args.loader:
        print(benchmarking.measure_loader(args.loader[0], args.loader[1:]))
        return
    if args.output:
        os.makedirs(args.output, exist_ok=True)
    batch, size = (8, 800) if torch.cuda.is_available() else (2, 320)
    setup = benchmarking.Setup(
        depths=tuple(args.depths),
        batch=args.batch or batch,
        size=args.size or size,
        rounds=args.rounds,
        teacher=tuple(args.teacher[0]) if args.teacher else (),
        further=tuple(map(tuple, args.teacher[1:])),
        plugins=tuple(args.plugin),
    )
    rows = benchmarking.combinations(args.heads, benchmarking.mixed_precision(args.amp))
    if args.profile:
        trace = Path(args.output, "trace.json") if args.output else None
        print(benchmarking.profile(benchmarking.with_teacher(rows), setup, trace))
        return
    if args.switches:
        row = benchmarking.with_teacher(rows)
        results = benchmarking.measure(benchmarking.switches(row), setup) | {"amp": args.amp, "heads": row.heads}
        table = benchmarking.switches_table(results)
    else:
        results = benchmarking.measure(rows, setup, arithmetic=True) | {"amp": args.amp}
        table = benchmarking.combinations_table(results)
    print(table)
    if args.output:
        with naming(args.output):
            Path(args.output, "benchmark.md").write_text(table + "\n", encoding="utf-8")
            Path(args.output, "benchmark.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
