"""Implements the meta-architecture that trains a student alongside its teacher."""

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from kd_det.averaging import average, check_average
from kd_det.class_partition import ClassPartition, View
from kd_det.config import UNNAMED, student_config
from kd_det.construction import build_network
from kd_det.errors import InputError
from kd_det.gradient_balance import DEFAULT_PERIOD, GradientBalance, build_gradient_balance
from kd_det.gradients import GradientShares, build_gradient_shares
from kd_det.heads.build import (
    Specs,
    build_heads_of_teachers,
    freeze_pretrained,
    has_stage,
    student_signals,
    teacher_signals,
)
from kd_det.heads.head_table import head_table
from kd_det.registry import WRAPPER_REGISTRY, config_key
from kd_det.schedules import build_schedule
from kd_det.signals import Batch, Signals
from kd_det.taps import BackboneTap, build_tap, preprocess_alike, shared_images
from kd_det.teacher import Teacher, build_teacher
from kd_det.teacher_choices import TeacherChoice, choose_teachers, naming_teacher, select_teacher, used_teachers
from kd_det.teacher_classes import count_object_classes, divide_classes
from kd_det.wrapper import Network, StudentWrapper


@META_ARCH_REGISTRY.register()
@WRAPPER_REGISTRY.register()
class TeacherStudent(StudentWrapper):
    """Trains an unmodified student, and adds the losses of distillation heads to its loss dict.

    In training the student's own forward runs once while its tap records. The teacher computes the same signals on the
    same batch: box signals after the student has run, all others before. Each head turns the signals of both into
    losses. In inference only the student runs. With several teachers, each computes what its heads need.

    The event storage gets each head's weight as ``kd/weight/<head>``.

    Args:
        student: Any meta-architecture with a tap or a backbone.
        teacher: The teacher that heads without a choice learn from; None if there are no such heads.
        heads: The heads by their names; see :data:`kd_det.KD_HEAD_REGISTRY`.
        schedules: Maps the name of a head to a function from iteration to weight; a head without one has weight 1.
        mask_padding: Whether feature losses leave out padding.
        task_weight: Factor of the student's own losses.
        gradient_shares: Measures the gradients of the losses; None measures nothing, or with `gradient_balance` what it
            needs.
        gradient_balance: Steers the weights of heads; None steers none. The heads that it steers need no schedule here.
        classes: Division of the classes of `teacher` from the student's; None if they are those of its own attribute.
        teachers: Further teachers by their names.
        choices: Maps the name of a head to the names of its teachers; ``"teacher"`` is that of `teacher`.
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
        teachers: Mapping[str, Teacher] | None = None,
        choices: Mapping[str, TeacherChoice] | None = None,
    ):
        super().__init__()
        self.student = student
        self.students = [student]
        self.teacher = teacher
        self.teachers = ({} if teacher is None else {UNNAMED: teacher}) | dict(teachers or {})
        self.choices = {name: (choices or {}).get(name, TeacherChoice()) for name in heads}
        self.heads = nn.ModuleDict(heads)
        self.schedules = dict(schedules or {})
        self.mask_padding = mask_padding
        self.task_weight = task_weight
        self.gradient_balance = gradient_balance or GradientBalance({})
        self.gradient_shares = gradient_shares or GradientShares(DEFAULT_PERIOD if self.gradient_balance.shares else 0)
        if teacher is not None and classes is not None:
            teacher.classes = classes
        # Maps the name of a teacher of other classes to the classes in which each of its heads sees them.
        self.views = {
            name: choose_views(x.classes, self._heads_of(name)) for name, x in self.teachers.items() if x.classes
        }
        self.classes = self._compared_classes(UNNAMED)
        if self.frozen_adapters:
            for head in self.heads.values():
                freeze_pretrained(head)
        if self.heads:
            self.tap = build_tap(student)
            self._align_teachers()
            for name, head in self.heads.items():
                self.tap.check_replaced(name, getattr(head, "replaces", ()))
            # Without shared images, each network preprocesses the batch itself.
            self.shares_images = all(
                x.sees_given_images and preprocess_alike(student, x.model) for x in self.teachers.values()
            )

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        student = build_student(cfg)
        check_task_weight(cfg)
        parts: dict[str, Any] = {"student": student, "teacher": None, "heads": {}, "mask_padding": cfg.KD.MASK_PADDING}
        parts["task_weight"] = cfg.KD.TASK_WEIGHT
        if cfg.KD.HEADS or cfg.KD.INHERIT:
            # With the same seed the student's training must draw the same random numbers with and without a teacher.
            with torch.random.fork_rng(devices=[]):
                teachers = build_teachers(cfg, build_tap(student))
                parts["teacher"], parts["teachers"] = teachers.get(UNNAMED), teachers
                parts["choices"] = choices = choose_teachers(cfg)
                specs = {name: compared_specs(build_tap(student), x) for name, x in teachers.items()}
                parts["heads"] = build_heads_of_teachers(
                    cfg, {head: specs[choice.names[0]] for head, choice in choices.items()}
                )
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
        for name, teacher in self.teachers.items():
            if teacher.cfg is not None:
                networks.append(
                    Network(
                        "teacher" if name == UNNAMED else f"teacher {name}",
                        teacher.model,
                        teacher.cfg,
                        flip_channels=teacher.flip_channels,
                        weights=teacher.weights,
                        dtype=teacher.dtype,
                        classes=self._compared_classes(name),
                    )
                )
        return networks

    @property
    def stage_teachers(self) -> dict[str, Teacher]:
        staged = {name for head, choice in self.choices.items() if has_stage(self.heads[head]) for name in choice.names}
        return {name: teacher for name, teacher in self.teachers.items() if name in staged}

    def describe(self, cfg: CfgNode) -> list[str]:
        if not self.heads:
            return []
        student = self.tap.spec()
        specs = {name: (student, self.teachers[choice.names[0]].spec()) for name, choice in self.choices.items()}
        chosen = {name: str(choice) for name, choice in self.choices.items()} if len(self.teachers) > 1 else {}
        shares = self.gradient_balance.shares
        paragraphs = [head_table(self.named_heads, self.schedules, specs, teachers=chosen, shares=shares)]
        for name, teacher in self.teachers.items():
            title = "" if name == UNNAMED else f"Teacher {name}:\n"
            classes = self._compared_classes(name)
            aligned = teacher.alignment.describe(self._signals_of(name, self.heads))
            paragraphs += [f"{title}{text}" for text in (classes.table() if classes else "", aligned) if text]
        return paragraphs

    # ---- Which teacher teaches which head ----
    def _heads_of(self, teacher: str) -> dict[str, nn.Module]:
        """Maps the names of the heads that learn from a teacher to them."""
        return {name: head for name, head in self.heads.items() if teacher in self.choices[name].names}

    def _signals_of(self, teacher: str, active: Iterable[str]) -> set[str]:
        """Lists the signals that the active heads need from a teacher."""
        heads = self._heads_of(teacher)
        return {signal for name in active if name in heads for signal in teacher_signals(heads[name])}

    def _compared_classes(self, teacher: str) -> ClassPartition | None:
        """Returns the division of a teacher's classes, if some head sees class predictions."""
        return self.teachers[teacher].classes if self.views.get(teacher) else None

    def _align_teachers(self) -> None:
        """Aligns the teachers with the student, and checks that they can give what their heads need.

        Raises:
            InputError: If one cannot.
        """
        assert all(name in self.teachers for choice in self.choices.values() for name in choice.names)
        for name, teacher in self.teachers.items():
            with naming_teacher(name):
                teacher.align_with(self.tap)
        for head, choice in self.choices.items():
            if len(choice.names) > 1:
                teachers = {name: self.teachers[name] for name in choice.names}
                check_average(
                    head,
                    self.heads[head],
                    choice,
                    {name: compared_specs(self.tap, x)[1] for name, x in teachers.items()},
                    {name: x.classes for name, x in teachers.items()},
                )
        for name, teacher in self.teachers.items():
            with naming_teacher(name):
                compared = {signal for head in self._heads_of(name).values() for signal in student_signals(head)}
                self.tap.check_alignment(teacher.tap, compared)
                teacher.check(self._signals_of(name, self.heads))

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
        asked = {teacher: self._signals_of(teacher, active) for teacher in self.teachers}

        losses, student, teachers = self._forwards(batched_inputs, names, asked)
        replaced = self._replaced(active, losses)
        losses = {key: (0.0 if key in replaced else self.task_weight) * loss for key, loss in losses.items()}
        batch = Batch.from_inputs(batched_inputs, mask_padding=self.mask_padding)
        groups = {"task": list(losses.values())}
        sides = self._sides(active, student, teachers)
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
        self, batched_inputs: list[dict], names: set[str], asked: Mapping[str, set[str]]
    ) -> tuple[dict[str, Tensor], Signals, dict[str, Signals]]:
        """Runs all networks.

        Args:
            batched_inputs: The batch.
            names: The signals that heads need from the student.
            asked: Maps each teacher to the signals that heads need from it; one that has none does not run.

        Returns:
            The student's losses, its named signals, and those of each teacher.
        """
        teachers = {name: teacher.to(self.device) for name, teacher in self.teachers.items() if asked[name]}
        models = [self.student, *(teacher.model for teacher in teachers.values())]
        with shared_images(models, batched_inputs) if teachers and self.shares_images else nullcontext():
            started = {name: teacher.start(batched_inputs, asked[name]) for name, teacher in teachers.items()}
            with self.tap.record(names) as student:
                losses = self.student(batched_inputs)
            signals = {name: x.finish(started[name], asked[name], student) for name, x in teachers.items()}
        return losses, student, signals

    def _sides(
        self, active: list[str], student: Signals, teachers: Mapping[str, Signals]
    ) -> dict[str, tuple[Signals, Signals]]:
        """Maps the active heads to the signals of student and teacher, in the classes in which each head sees them."""
        aligned: dict[tuple[str, View | None], tuple[Signals, Signals]] = {}
        sides = {}
        for head in active:
            choice = self.choices[head]
            pairs = []
            for name in choice.names:
                view = self.views.get(name, {}).get(head)
                if (name, view) not in aligned:
                    aligned[name, view] = self._in_view(student, teachers.get(name, {}), name, view)
                pairs.append(aligned[name, view])
            # The student's signals are the same in all pairs.
            sides[head] = pairs[0]
            if len(pairs) > 1:
                sides[head] = pairs[0][0], average([teacher for _, teacher in pairs], choice, self.heads[head])
        return sides

    def _in_view(self, student: Signals, teacher: Signals, name: str, view: View | None) -> tuple[Signals, Signals]:
        """Returns the signals of the student and of a teacher in a view of the teacher's classes."""
        classes = self.teachers[name].classes
        return (student, teacher) if view is None or classes is None else classes.align(student, teacher, view)

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


def build_teachers(cfg: CfgNode, student: BackboneTap) -> dict[str, Teacher]:
    """Builds the teachers of a config, aligned with a student, and divides their classes from the student's.

    Args:
        cfg: The run's config.
        student: The student's tap.

    Returns:
        The teachers that a head or ``KD.INHERIT`` uses, by their names.

    Raises:
        InputError: If one cannot be built, or cannot be aligned.
    """
    teachers = {}
    for name in used_teachers(cfg):
        with select_teacher(cfg, name) as selected:
            teachers[name] = teacher = build_teacher(selected)
            teacher.align_with(student)
            counts = map(count_object_classes, (student.spec(), teacher.spec()))
            teacher.classes = divide_classes(selected, *counts)
    return teachers


def compared_specs(student: BackboneTap, teacher: Teacher) -> Specs:
    """Returns the shapes of the signals of a student and of its teacher, for the classes that are compared."""
    specs = student.spec(), teacher.spec()
    return teacher.classes.align_specs(*specs) if teacher.classes else specs


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
