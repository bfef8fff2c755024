"""Implements the meta-architecture that trains a student alongside its teacher."""

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from kd_det.class_partition import ClassPartition, View
from kd_det.config import student_config
from kd_det.construction import build_network
from kd_det.errors import InputError
from kd_det.gradient_balance import DEFAULT_PERIOD, GradientBalance, build_gradient_balance
from kd_det.gradients import GradientShares, build_gradient_shares
from kd_det.heads.build import build_kd_heads, freeze_pretrained, student_signals, teacher_signals
from kd_det.heads.head_table import head_table
from kd_det.registry import WRAPPER_REGISTRY, config_key
from kd_det.schedules import build_schedule
from kd_det.signals import Batch, Signals
from kd_det.taps import build_tap, preprocess_alike, shared_images
from kd_det.teacher import Teacher, build_teacher
from kd_det.teacher_classes import count_object_classes, divide_classes
from kd_det.wrapper import Network, StudentWrapper


@META_ARCH_REGISTRY.register()
@WRAPPER_REGISTRY.register()
class TeacherStudent(StudentWrapper):
    """Trains an unmodified student, and adds the losses of distillation heads to its loss dict.

    In training the student's own forward runs once while its tap records. The teacher computes the same signals on the
    same batch: box signals after the student has run, all others before. Each head turns the signals of both into
    losses. In inference only the student runs.

    The event storage gets each head's weight as ``kd/weight/<head>``.

    Args:
        student: Any meta-architecture with a tap or a backbone.
        teacher: The teacher; may be None only if there are no heads.
        heads: The heads by their names; see :data:`kd_det.KD_HEAD_REGISTRY`.
        schedules: Maps the name of a head to a function from iteration to weight; a head without one has weight 1.
        mask_padding: Whether feature losses leave out padding.
        task_weight: Factor of the student's own losses.
        gradient_shares: Measures the gradients of the losses; None measures nothing, or with `gradient_balance` what it
            needs.
        gradient_balance: Steers the weights of heads; None steers none. The heads that it steers need no schedule here.
        classes: Division of the teacher's classes from the student's; None if they are the same.
    """

    has_teacher = True
    # Freeze the head parts that were trained in the stage before the run.
    frozen_adapters = True

    @configurable
    def __init__(
        self,
        *,
        student: nn.Module,
        teacher: Teacher | None,
        heads: Mapping[str, nn.Module],
        schedules: Mapping[str, Callable[[int], float]] | None = None,
        mask_padding: bool = False,
        task_weight: float = 1.0,
        gradient_shares: GradientShares | None = None,
        gradient_balance: GradientBalance | None = None,
        classes: ClassPartition | None = None,
    ):
        super().__init__()
        self.student = student
        self.students = [student]
        self.teacher = teacher
        self.heads = nn.ModuleDict(heads)
        self.schedules = dict(schedules or {})
        self.mask_padding = mask_padding
        self.task_weight = task_weight
        self.gradient_balance = gradient_balance or GradientBalance({})
        self.gradient_shares = gradient_shares or GradientShares(DEFAULT_PERIOD if self.gradient_balance.shares else 0)
        self.views = {} if classes is None else choose_views(classes, heads)
        self.classes = classes if self.views else None
        if self.frozen_adapters:
            for head in self.heads.values():
                freeze_pretrained(head)
        if self.heads:
            assert teacher is not None
            self.tap = build_tap(student)
            names = {name for head in self.heads.values() for name in student_signals(head)}
            teacher.align_with(self.tap)
            self.tap.check_alignment(teacher.tap, names)
            teacher.check({name for head in self.heads.values() for name in teacher_signals(head)})
            for name, head in self.heads.items():
                self.tap.check_replaced(name, getattr(head, "replaces", ()))
            # Without shared images, each network preprocesses the batch itself.
            self.shares_images = teacher.sees_given_images and preprocess_alike(student, teacher.model)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        student = build_student(cfg)
        check_task_weight(cfg)
        parts: dict[str, Any] = {"student": student, "teacher": None, "heads": {}, "mask_padding": cfg.KD.MASK_PADDING}
        parts["task_weight"] = cfg.KD.TASK_WEIGHT
        if cfg.KD.HEADS or cfg.KD.INHERIT:
            # With the same seed the student's training must draw the same random numbers with and without a teacher.
            with torch.random.fork_rng(devices=[]):
                tap = build_tap(student)
                parts["teacher"] = teacher = build_teacher(cfg)
                teacher.align_with(tap)
                specs = tap.spec(), teacher.spec()
                classes = parts["classes"] = divide_classes(cfg, *map(count_object_classes, specs))
                parts["heads"] = build_kd_heads(cfg, *(classes.align_specs(*specs) if classes else specs))
        keys = {name: config_key(name) for name in parts["heads"]}
        parts["schedules"] = {
            name: build_schedule(cfg.KD[key], cfg.SOLVER.MAX_ITER, key=f"KD.{key}") for name, key in keys.items()
        }
        balance = build_gradient_balance(cfg, student, parts["heads"], parts["schedules"])
        period = DEFAULT_PERIOD if balance.shares else 0
        return parts | {
            "gradient_balance": balance,
            "gradient_shares": build_gradient_shares(cfg, student, default=period),
        }

    @property
    def device(self) -> torch.device:
        return next(self.student.parameters()).device

    @property
    def checkpointables(self) -> dict[str, object]:
        parts: dict[str, object] = {"kd_heads": self.heads}
        return parts | ({"kd_gradient_balance": self.gradient_balance} if self.gradient_balance.shares else {})

    @property
    def named_heads(self) -> dict[str, nn.Module]:
        return dict(self.heads.items())

    def networks(self, cfg: CfgNode) -> list[Network]:
        networks = super().networks(cfg)
        teacher = self.teacher
        if teacher is not None and teacher.cfg is not None:
            networks.append(
                Network(
                    "teacher",
                    teacher.model,
                    teacher.cfg,
                    flip_channels=teacher.flip_channels,
                    weights=teacher.weights,
                    dtype=teacher.dtype,
                    classes=self.classes,
                )
            )
        return networks

    def describe(self, cfg: CfgNode) -> list[str]:
        if self.teacher is None or not self.heads:
            return []
        specs = self.tap.spec(), self.teacher.spec()
        paragraphs = [head_table(self.named_heads, self.schedules, *specs, shares=self.gradient_balance.shares)]
        paragraphs += [self.classes.table()] if self.classes else []
        names = {name for head in self.heads.values() for name in teacher_signals(head)}
        return [*paragraphs, *filter(None, [self.teacher.alignment.describe(names)])]

    def forward(self, batched_inputs: list[dict]):
        """Runs the student; in training, adds the heads' weighted losses to the student's.

        Raises:
            FloatingPointError: If a loss is not finite.
        """
        if not self.training or not self.heads:
            return self.student(batched_inputs)
        storage = get_event_storage()
        iteration = storage.iter
        weights = {name: self.schedules.get(name, lambda _: 1.0)(iteration) for name in self.heads}
        weights |= self.gradient_balance.weights(iteration)
        active = [name for name in self.heads if weights[name] > 0]
        names = {signal for name in active for signal in student_signals(self.heads[name])}
        teacher_names = {signal for name in active for signal in teacher_signals(self.heads[name])}

        losses, student, teacher = self._forwards(batched_inputs, names, teacher_names)
        replaced = self._replaced(active, losses)
        losses = {key: (0.0 if key in replaced else self.task_weight) * loss for key, loss in losses.items()}
        batch = Batch.from_inputs(batched_inputs, mask_padding=self.mask_padding)
        groups = {"task": list(losses.values())}
        sides = self._sides(active, student, teacher)
        unweighted: dict[str, dict[str, Tensor]] = {}
        for name in active:
            unweighted[name] = self.heads[name](*sides[name], batch)
            repeated = losses.keys() & unweighted[name].keys()
            if repeated:
                raise InputError(f"KD.HEADS: {name} gives {', '.join(sorted(repeated))}, which exists already.")
            head_losses = {key: weights[name] * loss for key, loss in unweighted[name].items()}
            groups[name] = list(head_losses.values())
            losses |= head_losses
        idle = [
            p for name in self.heads if name not in active for p in self.heads[name].parameters() if p.requires_grad
        ]
        if idle:
            # DDP needs every parameter in the graph of every step.
            losses["loss_kd_idle"] = 0.0 * torch.stack([p.sum() for p in idle]).sum()
        check_finite(losses, iteration)
        if self.gradient_shares.is_due(iteration, early=self.gradient_balance.is_due(iteration)):
            weights |= self._measure(groups, iteration)
            # The step that was measured already has the new weights.
            for name in active:
                losses |= {key: weights[name] * loss for key, loss in unweighted[name].items()}
        storage.put_scalars(smoothing_hint=False, **{f"kd/weight/{name}": weight for name, weight in weights.items()})
        return losses

    def _measure(self, groups: Mapping[str, list[Tensor]], iteration: int) -> dict[str, float]:
        """Measures the gradients of groups of losses, logs their shares, and returns the weights of steered heads."""
        norms: Mapping[str, float | None] = self.gradient_shares.measure(self.student, groups)
        if self.gradient_balance.steers(groups):
            norms = self.gradient_balance.update(norms, iteration)
        self.gradient_shares.log(norms)
        return self.gradient_balance.weights(iteration)

    def _forwards(
        self, batched_inputs: list[dict], names: set[str], teacher_names: set[str]
    ) -> tuple[dict[str, Tensor], Signals, Signals]:
        """Runs both networks; returns the student's losses, its named signals, and the teacher's."""
        if not teacher_names:
            with self.tap.record(names) as student:
                return self.student(batched_inputs), student, {}
        assert self.teacher is not None
        teacher = self.teacher.to(self.device)
        models = [self.student, teacher.model]
        with shared_images(models, batched_inputs) if self.shares_images else nullcontext():
            started = teacher.start(batched_inputs, teacher_names)
            with self.tap.record(names) as student:
                losses = self.student(batched_inputs)
            return losses, student, teacher.finish(started, teacher_names, student)

    def _sides(self, active: list[str], student: Signals, teacher: Signals) -> dict[str, tuple[Signals, Signals]]:
        """Maps the active heads to the signals of both networks, in the classes in which each head sees them."""
        sides = dict.fromkeys(active, (student, teacher))
        if self.classes is None:
            return sides
        views = {name: self.views[name] for name in active if name in self.views}
        aligned = {view: self.classes.align(student, teacher, view) for view in dict.fromkeys(views.values())}
        return sides | {name: aligned[view] for name, view in views.items()}

    def _replaced(self, active: list[str], losses: Mapping[str, Tensor]) -> set[str]:
        """Lists the student's own losses that the active heads' losses replace."""
        replaced = {(name, key) for name in active for key in getattr(self.heads[name], "replaces", ())}
        for name, key in sorted(replaced):
            if key not in losses:
                raise InputError(
                    f"KD.HEADS: {name} takes the place of {key}, but the student's losses are {', '.join(losses)}."
                )
        return {key for _, key in replaced}


def build_student(cfg: CfgNode) -> nn.Module:
    """Builds the student of a distilled config.

    Raises:
        InputError: If ``KD.STUDENT_ARCHITECTURE`` does not name a student's meta-architecture.
    """
    name = cfg.KD.STUDENT_ARCHITECTURE
    known = sorted(known for known, _ in META_ARCH_REGISTRY if known not in WRAPPER_REGISTRY)
    if name not in known:
        raise InputError(
            f"KD.STUDENT_ARCHITECTURE: {name!r} is not a student's meta-architecture; registered: {', '.join(known)}."
        )
    return build_network(student_config(cfg), "the student's config")


def choose_views(classes: ClassPartition, heads: Mapping[str, nn.Module]) -> dict[str, View]:
    """Maps the name of each head that sees class predictions to the classes in which it sees them.

    Raises:
        InputError: If a head cannot be used with these classes.
    """
    views = {}
    for name, head in heads.items():
        names = student_signals(head), teacher_signals(head)
        classes.check_head(head, name, *names)
        view = classes.view(*names)
        if view is not None:
            views[name] = view
    return views


def check_task_weight(cfg: CfgNode) -> None:
    """Checks ``KD.TASK_WEIGHT``.

    Raises:
        InputError: If it is negative or not finite.
    """
    if not 0 <= cfg.KD.TASK_WEIGHT < math.inf:
        raise InputError(f"KD.TASK_WEIGHT: must be finite and 0 or more, got {cfg.KD.TASK_WEIGHT}.")


def check_finite(losses: Mapping[str, Tensor], iteration: int) -> None:
    """Checks that no loss is NaN or infinite.

    Raises:
        FloatingPointError: If one is; the message names the losses and the iteration.
    """
    values = torch.stack([loss.detach().float() for loss in losses.values()])
    if not values.isfinite().all():
        bad = ", ".join(f"{key} is {loss.item()}" for key, loss in losses.items() if not loss.isfinite())
        raise FloatingPointError(f"iteration {iteration}: {bad}")
