"""The three things that are measured of a row, on random networks and synthetic scenes."""

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
from kd_det.config import add_kd_config
from kd_det.data.annotation_files import coco_annotation
from kd_det.data.shapes import make_scene
from kd_det.engine.step_trainer import AMP_DTYPES
from kd_det.heads.build import build_kd_heads, teacher_signals
from kd_det.meta_arch import TeacherStudent
from kd_det.taps import build_tap
from kd_det.teacher import Teacher, teacher_options


def detector_config(depth: int) -> CfgNode:
    """Mask R-CNN with a ResNet and FPN, of the model zoo, for kd_det's heads."""
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
    """The student's config, with the row's heads and options."""
    cfg = detector_config(setup.depths[0])
    cfg.KD.HEADS = list(row.heads)
    cfg.merge_from_list([part for pair in row.options.items() for part in pair])
    return cfg


def build_detector(cfg: CfgNode) -> nn.Module:
    """A detector with random weights whose residual branches are silent: else activations double with each block."""
    model = build_model(cfg)
    for module in model.modules():
        if isinstance(module, BasicBlock | BottleneckBlock):
            last = module.conv3 if isinstance(module, BottleneckBlock) else module.conv2
            nn.init.zeros_(last.norm.weight)
    return model


def build_networks(cfg: CfgNode, setup: Setup) -> tuple[nn.Module, Teacher | None]:
    """Student and, where there are heads, teacher, always the same; rows of equal options may share them."""
    torch.manual_seed(0)
    student = build_detector(cfg).train()
    if not cfg.KD.HEADS:
        return student, None
    teacher = Teacher(build_detector(detector_config(setup.depths[1])), **teacher_options(cfg))
    return student, teacher.to(student.device)


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
    """A row, built: a step of the plain student, the teacher's forward, and a distillation step.

    Args:
        row: What is built.
        setup: Of what size.
        student: The student.
        teacher: None only without heads.
    """

    def __init__(self, row: Row, setup: Setup, student: nn.Module, teacher: Teacher | None):
        self.cfg = cfg = row_config(row, setup)
        self.batch = make_batch(setup.size, setup.batch)
        self.student, self.teacher = student, teacher
        tap = build_tap(student)
        heads = build_kd_heads(cfg, tap.spec(), teacher.tap.spec()) if row.heads else {}
        self.distilled = TeacherStudent(student=student, teacher=teacher, heads=heads)
        self.distilled.to(student.device).train()
        if cfg.SOLVER.CHANNELS_LAST:
            self.distilled.to(memory_format=torch.channels_last)
        self.optimizers = {model: build_optimizer(cfg, model) for model in (student, self.distilled)}
        scaled = cfg.SOLVER.AMP.ENABLED and cfg.SOLVER.AMP.DTYPE == "float16"
        self.scaler = torch.amp.GradScaler(student.device.type, enabled=scaled)
        self.names = {name for head in heads.values() for name in teacher_signals(head)}
        torch.manual_seed(0)
        with tap.record({name for head in heads.values() for name in head.signals}) as signals:
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
        amp, optimizer = self.cfg.SOLVER.AMP, self.optimizers[model]
        with torch.autocast(self.student.device.type, dtype=AMP_DTYPES[amp.DTYPE], enabled=amp.ENABLED):
            losses = model(self.batch)
        optimizer.zero_grad()
        self.scaler.scale(sum(losses.values())).backward()
        self.scaler.step(optimizer)
        self.scaler.update()
