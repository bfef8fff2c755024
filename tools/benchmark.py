#!/usr/bin/env python
"""Measure what distillation adds to a training step.

    tools/benchmark.py
    tools/benchmark.py --heads none ReviewKDHead HintHead,SoftTargetHead --rounds 20 --output benchmark
    tools/benchmark.py --loader CONFIG DATALOADER.NUM_WORKERS 2

Mask R-CNN R18-FPN learns from Mask R-CNN R101-FPN, with random weights, on synthetic scenes. Per combination of heads:

    A  a step of the plain student: forward, backward, optimizer
    B  the teacher's forward alone: the signals that the heads ask for, on the student's sampled boxes
    C  a step of the student with teacher and heads

C / (A + B) is what kd_det and the heads themselves cost. A, B and C take turns, with one seed and a learning rate of 0,
so that all of them sample the same boxes each time; the ratio is the median over rounds, so load on the machine hits
both sides of it.

With --loader: images per second of a config's training data loader alone, as many as its workers give.
"""

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg
from detectron2.data import detection_utils as utils
from detectron2.modeling import build_model
from detectron2.modeling.backbone.resnet import BasicBlock, BottleneckBlock
from detectron2.solver import build_optimizer
from detectron2.structures import BoxMode
from detectron2.utils.events import EventStorage
from tabulate import tabulate
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from kd_det import Teacher, TeacherStudent, add_kd_config, build_kd_heads
from kd_det.config import merge_file, merge_list
from kd_det.data import check_files, register_datasets
from kd_det.data.shapes import make_scene
from kd_det.data.writers import coco_annotation
from kd_det.engine import Trainer, find_config, run_tool
from kd_det.errors import InputError
from kd_det.heads.build import teacher_signals
from kd_det.taps import build_tap

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
WARM_UP = 2
LOADER_SECONDS = 10.0


def parse_args() -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--heads", nargs="+", default=COMBINATIONS, metavar="HEAD,...", help="combinations; none: KD.HEADS []"
    )
    parser.add_argument("--rounds", type=int, default=11, help="times that each is measured (%(default)s)")
    parser.add_argument(
        "--size", type=int, default=800 if cuda else 320, help="side of the images in pixels (%(default)s)"
    )
    parser.add_argument("--batch", type=int, default=8 if cuda else 2, help="images per step (%(default)s)")
    parser.add_argument(
        "--depths", type=int, nargs=2, default=(18, 101), metavar=("STUDENT", "TEACHER"), help="of the ResNets"
    )
    parser.add_argument(
        "--loader", nargs="+", metavar=("CONFIG", "KEY VALUE"), help="measure the data loader of this config alone"
    )
    parser.add_argument("--output", metavar="FOLDER", help="also write benchmark.md and benchmark.json there")
    args = parser.parse_args()
    if min(args.rounds, args.batch) < 1 or args.size < 64:
        raise InputError("--rounds and --batch must be at least 1, --size at least 64.")
    return args


def detector_config(depth: int, heads: list[str]) -> CfgNode:
    """Mask R-CNN with a ResNet and FPN, of the model zoo, for kd_det's heads."""
    cfg = get_cfg()
    add_kd_config(cfg)
    cfg.merge_from_file(model_zoo.get_config_file("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml"))
    cfg.MODEL.DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
    cfg.MODEL.RESNETS.DEPTH = depth
    if depth < 50:
        cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.SOLVER.BASE_LR = 0.0
    cfg.KD.HEADS = heads
    cfg.KD.SOFT_TARGET.SOURCES = ["roi", "rpn", "mask"]
    return cfg


def build_detector(cfg: CfgNode) -> nn.Module:
    """A detector with random weights whose residual branches are silent: else activations double with each block."""
    model = build_model(cfg)
    for module in model.modules():
        if isinstance(module, BasicBlock | BottleneckBlock):
            last = module.conv3 if isinstance(module, BottleneckBlock) else module.conv2
            nn.init.zeros_(last.norm.weight)
    return model


def make_batch(size: int, count: int) -> list[dict]:
    """Synthetic scenes with boxes and masks, as the data loader gives them."""
    batch = []
    for i in range(count):
        image, objects = make_scene(np.random.default_rng(i), size)
        annotations = [coco_annotation(mask, category_id=c, bbox_mode=BoxMode.XYWH_ABS) for c, mask in objects]
        instances = utils.annotations_to_instances(annotations, (size, size))
        batch.append({"image": torch.from_numpy(image.transpose(2, 0, 1).copy()), "instances": instances})
    return batch


class Case:
    """One combination of heads: the three things that are measured.

    Args:
        heads: Names of the heads.
        student: Shared by all cases, as is the teacher.
        teacher: None only without heads.
    """

    def __init__(self, heads: list[str], student: nn.Module, teacher: Teacher | None, args: argparse.Namespace):
        self.batch = make_batch(args.size, args.batch)
        self.student, self.teacher = student, teacher
        cfg = detector_config(args.depths[0], heads)
        tap = build_tap(student)
        modules = build_kd_heads(cfg, tap.spec(), teacher.tap.spec()) if heads else {}
        self.distilled = TeacherStudent(student=student, teacher=teacher if heads else None, heads=modules)
        self.distilled.to(student.device).train()
        self.optimizers = {model: build_optimizer(cfg, model) for model in (student, self.distilled)}
        self.names = {name for head in modules.values() for name in teacher_signals(head)}
        torch.manual_seed(0)
        with tap.record({name for head in modules.values() for name in head.signals}) as signals:
            student(self.batch)
        self.signals = {name: signal.detach() for name, signal in signals.items()}
        self.parts = self.plain_step, self.teacher_forward, self.distilled_step

    def plain_step(self) -> None:
        self._step(self.student)

    def teacher_forward(self) -> None:
        if self.names:
            self.teacher(self.batch, self.names, self.signals)

    def distilled_step(self) -> None:
        self._step(self.distilled)

    def _step(self, model: nn.Module) -> None:
        torch.manual_seed(0)
        losses = model(self.batch)
        self.optimizers[model].zero_grad()
        sum(losses.values()).backward()
        self.optimizers[model].step()


def split(combination: str) -> list[str]:
    """The heads of a combination."""
    return [] if combination == "none" else combination.split(",")


def milliseconds(function: Callable[[], None]) -> float:
    """Time of one call."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return 1000 * (time.perf_counter() - start)


def gigaflops(function: Callable[[], None]) -> float:
    """Arithmetic of the convolutions and matrix products of one call, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops() / 1e9


def measure_times(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Combination to the medians of A, B, C (ms) and of C / (A + B), and that ratio of their arithmetic."""
    student = build_detector(detector_config(args.depths[0], [])).train()
    teacher = Teacher(build_detector(detector_config(args.depths[1], [])))
    cases = {name: Case(split(name), student, teacher, args) for name in args.heads}
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in cases}
    with tqdm(total=(args.rounds + WARM_UP) * len(cases), desc="time", unit="case", disable=None) as progress:
        for i in range(args.rounds + WARM_UP):
            for name, case in cases.items():
                # Forwards and backwards by turns, so that a drifting load cancels out.
                times = [milliseconds(part) for part in case.parts[:: 1 if i % 2 else -1]]
                if i >= WARM_UP:
                    found[name].append(tuple(times[:: 1 if i % 2 else -1]))
                progress.update()
    results = {}
    for name, rounds in found.items():
        ratios = [c / (a + b) for a, b, c in rounds]
        results[name] = {
            key: statistics.median(column) for key, column in zip("ABC", np.transpose(rounds).tolist(), strict=True)
        }
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        results[name] |= {"ratio": middle, "ratio_low": low, "ratio_high": high}
        operations = [gigaflops(part) for part in cases[name].parts]
        results[name]["ratio_of_operations"] = operations[2] / (operations[0] + operations[1])
    return results


def measure_memory(job: tuple[str, argparse.Namespace]) -> float:
    """Peak memory of the steps of one combination, or of the "plain" student, in MB; runs in a process of its own."""
    name, args = job
    heads = split(name) if name != "plain" else []
    student = build_detector(detector_config(args.depths[0], [])).train()
    with EventStorage():
        teacher = Teacher(build_detector(detector_config(args.depths[1], []))) if heads else None
        case = Case(heads, student, teacher.to(student.device) if heads else None, args)
        for _ in range(WARM_UP):
            case.plain_step() if name == "plain" else case.distilled_step()
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def in_new_processes(jobs: list[tuple[str, argparse.Namespace]]) -> list[float]:
    """Peak memory of each job."""
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        return list(tqdm(pool.imap(measure_memory, jobs), total=len(jobs), desc="memory", unit="case", disable=None))


def measure_loader(config: str, overrides: list[str]) -> str:
    """Let a config's training data loader run for some seconds, and tell how fast it was."""
    cfg = get_cfg()
    add_kd_config(cfg)
    merge_file(cfg, find_config(config))
    merge_list(cfg, overrides, "--loader")
    register_datasets(cfg)
    check_files(cfg)
    batches = iter(Trainer.build_train_loader(cfg))
    workers = cfg.DATALOADER.NUM_WORKERS
    # What the workers have ready by now does not count, nor does their start.
    for _ in range(1 + 2 * workers):
        next(batches)
    start, images = time.perf_counter(), 0
    while time.perf_counter() < start + LOADER_SECONDS:
        images += len(next(batches))
    rate = images / (time.perf_counter() - start)
    return f"{config}: {rate:.0f} images per second with {workers} workers, {cfg.SOLVER.IMS_PER_BATCH} per batch"


def make_table(results: dict) -> str:
    """The results as Markdown."""
    rows = []
    for name, x in results["combinations"].items():
        ratio = f"{x['ratio']:.3f} ({x['ratio_low']:.3f} - {x['ratio_high']:.3f})"
        numbers = f"{x['ratio_of_operations']:.3f}", f"{x['memory']:.0f}"
        rows.append([name, *(f"{x[key]:.0f}" for key in "ABC"), ratio, *numbers])
    steps = ["A: plain step, ms", "B: teacher, ms", "C: KD step, ms"]
    headers = ["KD.HEADS", *steps, "C / (A + B)", "in arithmetic", "peak memory of C, MB"]
    return (
        tabulate(rows, headers, tablefmt="pipe", disable_numparse=True)
        + f"\n\nMask R-CNN R{results['depths'][0]}-FPN from R{results['depths'][1]}-FPN, random weights, "
        f"{results['batch']} images of {results['size']} x {results['size']}, float32, on {results['device']}. "
        f"Medians of {results['rounds']} interleaved rounds; in brackets the quartiles of the ratio. In arithmetic: "
        "the same ratio of the multiply-adds of convolutions and matrix products, what the heads cost by definition. "
        f"SoftTargetHead: roi, rpn and mask. Memory: {results['memory_kind']}, of one process per row; the plain "
        f"student has {results['plain_memory']:.0f} MB."
    )


def main() -> None:
    args = parse_args()
    if args.loader:
        print(measure_loader(args.loader[0], args.loader[1:]))
        return
    cuda = torch.cuda.is_available()
    # First, because a new process would inherit the peak of this one.
    plain, *memory = in_new_processes([(name, args) for name in ["plain", *args.heads]])
    with EventStorage():
        times = measure_times(args)
    results = {
        "device": torch.cuda.get_device_name() if cuda else f"a CPU with {torch.get_num_threads()} thread(s)",
        "memory_kind": "allocated on the GPU" if cuda else "resident, with Python and its libraries",
        **{key: getattr(args, key) for key in ("depths", "batch", "size", "rounds")},
        "plain_memory": plain,
        "combinations": {name: x | {"memory": m} for (name, x), m in zip(times.items(), memory, strict=True)},
    }
    table = make_table(results)
    print(table)
    if args.output:
        os.makedirs(args.output, exist_ok=True)
        Path(args.output, "benchmark.md").write_text(table + "\n", encoding="utf-8")
        Path(args.output, "benchmark.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_tool(main)
