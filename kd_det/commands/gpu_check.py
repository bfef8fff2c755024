"""Check kd_det on a GPU, and print a table to paste into an issue.

    kd-det gpu-check
    kd-det gpu-check --only heads streams --output check
    kd-det gpu-check --rehearse

It takes about eight minutes and needs no data: networks have random weights, and images are synthetic scenes. It
compares every head with itself on the CPU, a teacher on its own CUDA stream with one that has none, and equal trainings
with KD.DETERMINISTIC; it trains in float16 and with two processes; and it measures the time of a step, the share in
which the GPU is idle, kernels, waits of the host and memory. A check that fails does not stop the others; the exit
status is then 1.

--rehearse runs all of it on the CPU with tiny sizes, to see that the checks themselves work.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from kd_det.engine.arguments import make_parser
from kd_det.errors import InputError, check_choice
from kd_det.files import naming

CHECKS = (
    "heads",
    "waits",
    "streams",
    "speed",
    "float16",
    "memory",
    "determinism",
    "races",
    "average",
    "processes",
    "compilation",
)


def parse_args(arguments: Sequence[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, prog)
    parser.add_argument(
        "--only", nargs="+", default=CHECKS, metavar="CHECK", help=f"run these checks alone: {', '.join(CHECKS)}"
    )
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="begin no further check after this time (%(default)s)"
    )
    parser.add_argument("--rehearse", action="store_true", help="run on the CPU, with tiny sizes")
    parser.add_argument("--output", metavar="FOLDER", help="also write gpu_check.md there")
    args = parser.parse_args(arguments)
    for name in args.only:
        check_choice("--only", name, CHECKS)
    if not args.minutes > 0:
        raise InputError(f"--minutes: must be above 0, got {args.minutes}.")
    return args


def main(args: argparse.Namespace) -> None:
    # cuBLAS reads this when it is first used; KD.DETERMINISTIC needs it.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import torch

    from kd_det.benchmarking import gpu_checks

    if not args.rehearse and not torch.cuda.is_available():
        raise InputError("gpu-check: PyTorch finds no GPU; --rehearse runs the checks on the CPU, with tiny sizes.")
    if args.output:
        os.makedirs(args.output, exist_ok=True)
    scale = gpu_checks.REHEARSAL if args.rehearse else gpu_checks.ON_GPU
    table, fine = gpu_checks.run_checks(args.only, scale, 60 * args.minutes)
    print(table)
    if args.output:
        with naming(args.output):
            Path(args.output, "gpu_check.md").write_text(table + "\n", encoding="utf-8")
    if not fine:
        sys.exit(1)
