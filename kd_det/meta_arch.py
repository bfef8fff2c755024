"""The meta-architecture that trains a student with a teacher beside it."""

from collections.abc import Callable, Mapping

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from kd_det.config import student_config
from kd_det.errors import InputError
from kd_det.heads.build import build_kd_heads
from kd_det.registry import config_key
from kd_det.schedules import build_schedule
from kd_det.signals import Batch
from kd_det.taps import build_tap
from kd_det.teacher import Teacher, build_teacher


@META_ARCH_REGISTRY.register()
class TeacherStudent(nn.Module):
    """A student, untouched, whose loss dict gains the distillation losses of some heads.

    In training the student's own forward runs once while its tap records; the teacher computes the same signals on the
    same batch; each head turns both into losses. In inference it is the student.

    Args:
        student: Any meta-architecture with a tap or a backbone.
        teacher: The teacher; None only without heads.
        heads: Name to head; see :data:`kd_det.KD_HEAD_REGISTRY`.
        schedules: Name of a head to its weight at an iteration; a head without one has weight 1.
        mask_padding: Whether feature losses leave out padding.
    """

    @configurable
    def __init__(
        self,
        *,
        student: nn.Module,
        teacher: Teacher | None,
        heads: Mapping[str, nn.Module],
        schedules: Mapping[str, Callable[[int], float]] | None = None,
        mask_padding: bool = False,
    ):
        super().__init__()
        self.student = student
        self.teacher = teacher
        self.heads = nn.ModuleDict(heads)
        self.schedules = dict(schedules or {})
        self.mask_padding = mask_padding
        if self.heads:
            self.tap = build_tap(student)
            self.tap.check_alignment(teacher.tap, {name for head in self.heads.values() for name in head.signals})

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        name = cfg.KD.STUDENT_ARCHITECTURE
        if name not in META_ARCH_REGISTRY or name == cls.__name__:
            known = ", ".join(sorted(known for known, _ in META_ARCH_REGISTRY if known != cls.__name__))
            raise InputError(
                f"KD.STUDENT_ARCHITECTURE: {name!r} is not a student's meta-architecture; registered: {known}."
            )
        student = build_model(student_config(cfg))
        parts = {"student": student, "teacher": None, "heads": {}, "mask_padding": cfg.KD.MASK_PADDING}
        if cfg.KD.HEADS:
            # With the same seed the student's training must draw the same random numbers with and without a teacher.
            with torch.random.fork_rng(devices=[]):
                parts["teacher"] = build_teacher(cfg)
                parts["heads"] = build_kd_heads(cfg, build_tap(student).spec(), parts["teacher"].tap.spec())
        keys = {name: config_key(name) for name in parts["heads"]}
        parts["schedules"] = {
            name: build_schedule(cfg.KD[key], cfg.SOLVER.MAX_ITER, key=f"KD.{key}") for name, key in keys.items()
        }
        return parts

    @property
    def device(self) -> torch.device:
        return next(self.student.parameters()).device

    def forward(self, batched_inputs: list[dict]):
        """See the student's forward; in training its losses are joined by the heads' weighted ones.

        Raises:
            FloatingPointError: If a loss is not finite.
        """
        if not self.training or not self.heads:
            return self.student(batched_inputs)
        iteration = get_event_storage().iter
        weights = {name: self.schedules.get(name, lambda _: 1.0)(iteration) for name in self.heads}
        active = [name for name in self.heads if weights[name] > 0]
        names = {signal for name in active for signal in self.heads[name].signals}

        with self.tap.record(names) as student:
            losses = self.student(batched_inputs)
        if active:
            teacher = self.teacher.to(self.device)(batched_inputs, names, student)
            batch = Batch.from_inputs(batched_inputs, mask_padding=self.mask_padding)
        for name in active:
            found = self.heads[name](student, teacher, batch)
            repeated = losses.keys() & found.keys()
            if repeated:
                raise InputError(f"KD.HEADS: {name} gives {', '.join(sorted(repeated))}, which exists already.")
            losses |= {key: weights[name] * loss for key, loss in found.items()}
        idle = [p.sum() for name in self.heads if name not in active for p in self.heads[name].parameters()]
        if idle:
            # DDP wants every parameter in the graph of every step.
            losses["loss_kd_idle"] = 0.0 * torch.stack(idle).sum()
        check_finite(losses, iteration)
        return losses


def check_finite(losses: Mapping[str, Tensor], iteration: int) -> None:
    """Stop at a loss that is not a number or infinite.

    Raises:
        FloatingPointError: Naming the losses and the iteration.
    """
    values = torch.stack([loss.detach().float() for loss in losses.values()])
    if not values.isfinite().all():
        bad = ", ".join(f"{key} is {float(loss)}" for key, loss in losses.items() if not loss.isfinite())
        raise FloatingPointError(f"iteration {iteration}: {bad}")
