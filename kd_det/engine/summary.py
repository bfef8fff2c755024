"""Logs a summary before training starts, so that a wrong set-up shows at once and not days later."""

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import zip_longest

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.utils import comm
from tabulate import tabulate
from torch import nn

from kd_det.checkpoint import counted_keys
from kd_det.config import student_config
from kd_det.engine.flops import count_gflops
from kd_det.engine.loaders import is_classifier
from kd_det.engine.trainer import Trainer
from kd_det.heads.build import has_stage, student_signals, teacher_signals
from kd_det.inherit import Inheritance
from kd_det.meta_arch import TeacherStudent
from kd_det.mutual import MutualStudents, evaluation_mode
from kd_det.schedules import WeightSchedule
from kd_det.teacher import Teacher, load_teacher_config

logger = logging.getLogger(__name__)
# This is the side in pixels. An R-CNN with 50 layers takes one core 2 s at this size and 7 s at 800.
LARGEST_ON_CPU = 320
# Maps a part of the name of a backbone's builder to the key that describes such a backbone.
DETAILS = {"timm": ("TIMM", "NAME"), "cifar": ("CIFAR", "NAME"), "resnet": ("RESNETS", "DEPTH")}


@dataclass
class Network:
    """Describes one network of a run.

    Attributes:
        title: Its role in the run.
        model: The network.
        cfg: Its plain config.
        weights: Source of its weights.
        precision: Precision of its forward pass.
        flipped: Whether it expects the images in the opposite channel order.
    """

    title: str
    model: nn.Module
    cfg: CfgNode
    weights: str
    precision: str
    flipped: bool = False


def log_summary(trainer: Trainer, *, stage: str = "") -> None:
    """Logs the networks and the heads of a run in the main process, as tables.

    Operations are counted for the whole inference on one blank image of the test size. On a CPU its side has at most
    320 pixels, so that counting takes a few seconds. The count for an R-CNN depends on how many boxes it proposes.

    Args:
        trainer: A trainer with its weights loaded.
        stage: Path of the checkpoint of a pre-training stage, if there was one.
    """
    if not comm.is_main_process():
        return
    model = trainer.plain_model
    parts = [network_table(list_networks(trainer), image_side(trainer.cfg))]
    if isinstance(model, TeacherStudent) and model.heads and model.teacher is not None:
        parts.append(head_table(model, model.teacher))
    if trainer.inheritance is not None:
        parts.append(inheritance_table(trainer.inheritance))
    if isinstance(model, MutualStudents):
        turns = ", one after the other" if model.sequential else ""
        method = trainer.cfg.KD.MUTUAL.METHOD
        parts.append(f"They teach each other {model.logits}{turns}, weight {model.weight:g} ({method}).")
    solver, datasets = trainer.cfg.SOLVER, trainer.cfg.DATASETS
    evaluated = f"evaluated on {', '.join(datasets.TEST)}" if datasets.TEST else "not evaluated"
    parts.append(
        f"On {', '.join(datasets.TRAIN)}: {solver.MAX_ITER} iterations of {solver.IMS_PER_BATCH} images; {evaluated}."
    )
    if stage:
        parts.append(f"The pre-training stage has trained {stage}.")
    logger.info("Summary of the run:\n%s", "\n\n".join(parts))


def list_networks(trainer: Trainer) -> list[Network]:
    """Lists the networks of a run, the student first."""
    cfg, model, loaded = trainer.cfg, trainer.plain_model, trainer.checkpointer.loaded
    precision = "mixed" if cfg.SOLVER.AMP.ENABLED else "float32"
    weights = "{}: {} of {} keys".format(*loaded) if loaded.path else initial_weights(cfg)
    if isinstance(model, MutualStudents):
        # The number of matched keys is known only for the first student.
        others = [loaded[0] if trainer.start_iter else initial_weights(peer) for peer in model.configs[1:]]
        columns = zip(model.students, model.configs, [weights, *others], model.flip_channels, strict=True)
        return [Network(f"student {i}", s, c, w, precision, f) for i, (s, c, w, f) in enumerate(columns, 1)]
    if not isinstance(model, TeacherStudent):
        return [Network("student", model, cfg, weights, precision)]
    networks = [Network("student", model.student, student_config(cfg), weights, precision)]
    if model.teacher is not None:
        teacher_cfg, path = load_teacher_config(cfg)
        teacher, total = model.teacher, len(counted_keys(model.teacher.model))
        dtype = str(teacher.dtype).removeprefix("torch.")
        weights = f"{path}: {total} of {total} keys"
        teacher.to(model.device)
        networks.append(Network("teacher", teacher.model, teacher_cfg, weights, dtype, teacher.flip_channels))
    return networks


def initial_weights(cfg: CfgNode) -> str:
    """Describes the initial weights that a config gives a network."""
    if cfg.MODEL.WEIGHTS:
        return cfg.MODEL.WEIGHTS
    return "timm's, of ImageNet" if "timm" in cfg.MODEL.BACKBONE.NAME and cfg.MODEL.TIMM.PRETRAINED else "random"


def network_table(networks: list[Network], side: int) -> str:
    """Formats a table with one column for each network.

    Args:
        side: Side, in pixels, of the square image for which operations are counted.
    """
    rows = {
        "architecture": [architecture(x.cfg) for x in networks],
        "parameters": [parameters(x.model) for x in networks],
        f"GFLOPs, {side} x {side}": [gflops(x.model, side) for x in networks],
        "weights": [x.weights for x in networks],
        "images": [x.cfg.INPUT.FORMAT + (", channels flipped" if x.flipped else "") for x in networks],
        "pixel mean": [numbers(x.cfg.MODEL.PIXEL_MEAN) for x in networks],
        "pixel std": [numbers(x.cfg.MODEL.PIXEL_STD) for x in networks],
        "precision": [x.precision for x in networks],
    }
    table = [[name, *cells] for name, cells in rows.items()]
    return tabulate(table, ["", *(x.title for x in networks)], disable_numparse=True)


def architecture(cfg: CfgNode) -> str:
    """Names a network's meta-architecture and backbone, with its size."""
    builder = cfg.MODEL.BACKBONE.NAME
    details = [f"{key} {cfg.MODEL[node][key]}" for part, (node, key) in DETAILS.items() if part in builder]
    return " ".join([cfg.MODEL.META_ARCHITECTURE, builder, *details])


def parameters(model: nn.Module) -> str:
    """Counts the parameters, and those that are trained."""
    counts = [(p.numel(), p.numel() * p.requires_grad) for p in model.parameters()]
    total, trained = (sum(column) / 1e6 for column in zip(*counts, strict=True))
    return f"{total:.2f} M, {trained:.2f} M trained"


def gflops(model: nn.Module, side: int) -> str:
    """Formats the billions of multiply-adds of the inference on a blank image; "-" if they cannot be counted."""
    try:
        with evaluation_mode(model):
            return f"{count_gflops(model, {'image': torch.zeros(3, side, side)}):.2f}"
    except Exception as error:  # A network that cannot be traced may still be trainable.
        logger.debug("Not counted: %s", error)
        return "-"


def numbers(values: Collection[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def image_side(cfg: CfgNode) -> int:
    """Returns the side in pixels of the image for which operations are counted."""
    if is_classifier(cfg):
        side = cfg.INPUT.CLASSIFICATION.SIZE
    else:
        side = cfg.INPUT.MIN_SIZE_TEST or max(cfg.INPUT.MIN_SIZE_TRAIN)
    return min(side, LARGEST_ON_CPU) if cfg.MODEL.DEVICE == "cpu" else side


def head_table(model: TeacherStudent, teacher: Teacher) -> str:
    """Formats a table of the heads, with one line for each pair of signals or each signal without a counterpart."""
    specs = model.tap.spec(), teacher.tap.spec()
    rows: list[list[str]] = []
    for name, head in model.heads.items():
        schedule = model.schedules[name]
        assert isinstance(schedule, WeightSchedule)
        signals, when = (student_signals(head), teacher_signals(head)), describe_schedule(schedule)
        if not any(signals) and has_stage(head):
            signals = head.pretrain_signals, head.pretrain_teacher_signals
            when = "in the pre-training stage only"
        sides = [[shape(x, spec) for x in side] for side, spec in zip(signals, specs, strict=True)]
        cells = [[name, f"{schedule.weight:g}", when], *[["", "", ""]] * (max(map(len, sides)) - 1)]
        rows += [[*cell, *pair] for cell, pair in zip(cells, zip_longest(*sides, fillvalue=""), strict=True)]
    return tabulate(rows, ["head", "weight", "schedule", "student", "teacher"], disable_numparse=True)


def inheritance_table(inheritance: Inheritance) -> str:
    """Formats a table of the tensors that the student has taken over from its teacher, and of those that it has not."""
    rows = [
        [name, " x ".join(map(str, shape)), inheritance.refused.get(name, "the teacher's")]
        for name, shape in inheritance.shapes.items()
    ]
    table = tabulate(rows, ["tensor", "in the teacher", "in the student"], disable_numparse=True)
    return f"KD.INHERIT: {inheritance}.\n{table}"


def describe_schedule(schedule: WeightSchedule) -> str:
    """Describes a schedule in words; its numbers are iterations."""
    parts = [f"from {schedule.start}"] if schedule.start else []
    parts += [f"warm-up {schedule.warmup}"] if schedule.warmup else []
    return ", ".join([*parts, schedule.decay + ("" if schedule.stop is None else f" until {schedule.stop}")])


def shape(name: str, spec: Mapping[str, ShapeSpec]) -> str:
    """Describes a signal by its name, channels and stride."""
    stride = "" if spec[name].stride is None else f", stride {spec[name].stride}"
    channels = spec[name].channels
    return f"{name}: {channels} channel{'' if channels == 1 else 's'}{stride}"
