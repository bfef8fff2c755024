"""Builds the three parts of a row that are measured, with random networks and synthetic scenes."""

from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg
from detectron2.data import detection_utils as utils
from detectron2.modeling import build_model
from detectron2.modeling.backbone.resnet import BasicBlock, BottleneckBlock
from detectron2.solver import build_optimizer
from detectron2.structures import BoxMode
from torch import nn

from kd_det.benchmarking.rows import Row, Setup
from kd_det.config import UNNAMED, add_kd_config, merge_list
from kd_det.data.annotation_files import coco_annotation
from kd_det.data.shapes import make_scene
from kd_det.engine.step_trainer import AMP_DTYPES
from kd_det.heads.build import build_kd_heads, teacher_signals
from kd_det.lazy_configs import allow_lazy_config, is_lazy_config
from kd_det.meta_arch import TeacherStudent
from kd_det.registry import config_key
from kd_det.taps import build_tap
from kd_det.teacher import Teacher, build_teacher, teacher_options
from kd_det.teacher_choices import choose_teachers, select_teacher, with_keys_of

# The student, its teacher, and further teachers by their names.
Networks = tuple[nn.Module, Teacher | None, dict[str, Teacher]]


def detector_config(depth: int) -> CfgNode:
    """Returns the model zoo's config of Mask R-CNN with a ResNet and FPN, with kd_det's keys."""
    cfg = get_cfg()
    add_kd_config(cfg)
    cfg.merge_from_file(model_zoo.get_config_file("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml"))
    cfg.MODEL.DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
    cfg.MODEL.RESNETS.DEPTH = depth
    if depth < 50:
        cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.SOLVER.BASE_LR = 0.0
    cfg.KD.SOFT_TARGET.SOURCES = ["roi", "rpn", "mask"]
    return cfg


def row_config(row: Row, setup: Setup) -> CfgNode:
    """Returns the student's config with the heads and options of a row."""
    cfg = detector_config(setup.depths[0])
    cfg.KD.HEADS = list(row.heads)
    if setup.teacher:
        merge_list(cfg, ["KD.TEACHER.CONFIG_FILE", *setup.teacher], "--teacher")
    for i, further in enumerate(setup.further, start=2):
        cfg.KD.TEACHERS[f"teacher{i}"] = CfgNode()
        options = ["KD.TEACHER.CONFIG_FILE", *further]
        merge_list(cfg, [], "--teacher")  # This gives the new teacher its keys.
        merge_list(cfg, [with_keys_of(f"teacher{i}", option) for option in options], "--teacher")
    if setup.further:
        for head in filter(lambda head: config_key(head) in cfg.KD, row.heads):
            cfg.KD[config_key(head)].TEACHERS = [UNNAMED, *cfg.KD.TEACHERS]
    cfg.merge_from_list([part for pair in row.options.items() for part in pair])
    return cfg


def build_detector(cfg: CfgNode) -> nn.Module:
    """Builds a detector with random weights; see :func:`silence_branches`."""
    return silence_branches(build_model(cfg))


def silence_branches(model: nn.Module) -> nn.Module:
    """Makes the residual branches of ResNets output 0, so that activations do not double in each block."""
    for module in model.modules():
        if isinstance(module, BasicBlock | BottleneckBlock):
            last = module.conv3 if isinstance(module, BottleneckBlock) else module.conv2
            nn.init.zeros_(last.norm.weight)
    return model


def build_networks(cfg: CfgNode, setup: Setup) -> tuple[nn.Module, Teacher | None]:
    """Builds student and teacher, always with the same weights; without heads there is no teacher.

    Rows with the same options may share them.
    """
    torch.manual_seed(0)
    student = build_detector(cfg).train()
    if not cfg.KD.HEADS:
        return student, None
    if setup.teacher:
        return student, build_named_teacher(cfg, UNNAMED, student)
    teacher = Teacher(build_detector(detector_config(setup.depths[1])), **teacher_options(cfg))
    teacher.align_with(build_tap(student))
    return student, teacher.to(device_of(student))


def build_further_teachers(cfg: CfgNode, student: nn.Module) -> dict[str, Teacher]:
    """Builds the teachers of ``KD.TEACHERS`` with random weights; without heads there are none."""
    return {name: build_named_teacher(cfg, name, student) for name in cfg.KD.TEACHERS} if cfg.KD.HEADS else {}


def build_all_networks(row: Row, setup: Setup) -> Networks:
    """Builds the networks of a row: the student, its teacher, and further teachers."""
    cfg = row_config(row, setup)
    student, teacher = build_networks(cfg, setup)
    return student, teacher, build_further_teachers(cfg, student)


def build_named_teacher(cfg: CfgNode, name: str, student: nn.Module) -> Teacher:
    """Builds a teacher that the command line names, with random weights, for a student."""
    with select_teacher(cfg, name) as selected:
        if is_lazy_config(selected.KD.TEACHER.CONFIG_FILE):
            allow_lazy_config(selected.KD.TEACHER.CONFIG_FILE)  # The command line has named it.
        teacher = build_teacher(selected, trained=False)
        silence_branches(teacher.model)
        teacher.align_with(build_tap(student))
    return teacher.to(device_of(student))


def make_batch(size: int, count: int) -> list[dict]:
    """Makes synthetic scenes with boxes and masks, as the data loader gives them."""
    batch = []
    for i in range(count):
        image, objects = make_scene(np.random.default_rng(i), size)
        annotations = [coco_annotation(mask, category_id=c, bbox_mode=BoxMode.XYWH_ABS) for c, mask in objects]
        instances = utils.annotations_to_instances(annotations, (size, size))
        batch.append({"image": torch.from_numpy(image.transpose(2, 0, 1).copy()), "instances": instances})
    return batch


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


class Case:
    """Runs a step of the plain student, the teacher's forward pass, and a distillation step.

    Args:
        row: The heads and options.
        setup: The networks and the batch.
        student: The student.
        teacher: The teacher; None if there are no heads.
        further: Further teachers by their names.

    Attributes:
        parts: The three functions to measure: A, B and C.
    """

    def __init__(
        self,
        row: Row,
        setup: Setup,
        student: nn.Module,
        teacher: Teacher | None,
        further: Mapping[str, Teacher] | None = None,
    ):
        self.cfg = cfg = row_config(row, setup)
        self.batch = make_batch(setup.size, setup.batch)
        self.student, self.teacher = student, teacher
        self.device = device_of(student)
        tap = build_tap(student)
        heads = build_kd_heads(cfg, tap.spec(), teacher.spec()) if teacher else nn.ModuleDict()
        self.distilled = TeacherStudent(
            student=student, teacher=teacher, heads=heads, teachers=further, choices=choose_teachers(cfg)
        )
        self.distilled.to(self.device).train()
        if cfg.SOLVER.CHANNELS_LAST:
            self.distilled.to(memory_format=torch.channels_last)
        self.optimizers = {model: build_optimizer(cfg, model) for model in (student, self.distilled)}
        scaled = cfg.SOLVER.AMP.ENABLED and cfg.SOLVER.AMP.DTYPE == "float16"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=scaled)
        self.names = {name for head in heads.values() for name in teacher_signals(head)}
        torch.manual_seed(0)
        compared = {name for head in heads.values() for name in cast(Sequence[str], head.signals)}
        with tap.record(compared) as signals:
            student(self.batch)
        self.signals = {name: signal.detach() for name, signal in signals.items()}
        self.parts = self.plain_step, self.teacher_forward, self.distilled_step

    def plain_step(self) -> None:
        self._step(self.student)

    def teacher_forward(self) -> None:
        for teacher in self.distilled.teachers.values() if self.names else ():
            teacher(self.batch, self.names, self.signals)

    def distilled_step(self) -> None:
        self._step(self.distilled)

    def _step(self, model: nn.Module) -> None:
        torch.manual_seed(0)
        amp, optimizer = self.cfg.SOLVER.AMP, self.optimizers[model]
        with torch.autocast(self.device.type, dtype=AMP_DTYPES[amp.DTYPE], enabled=amp.ENABLED):
            losses = model(self.batch)
        optimizer.zero_grad()
        self.scaler.scale(sum(losses.values())).backward()
        self.scaler.step(optimizer)
        self.scaler.update()
