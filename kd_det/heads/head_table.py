"""Describes heads in a table."""

from collections.abc import Callable, Mapping
from itertools import zip_longest

from detectron2.layers import ShapeSpec
from tabulate import tabulate
from torch import nn

from kd_det.heads.build import Specs, has_stage, student_signals, teacher_signals
from kd_det.schedules import WeightSchedule


def head_table(
    heads: Mapping[str, nn.Module],
    schedules: Mapping[str, Callable[[int], float]],
    specs: Mapping[str, Specs],
    *,
    teachers: Mapping[str, str],
    shares: Mapping[str, float],
) -> str:
    """Formats a table of heads, with one line for each pair of signals or each signal without a counterpart.

    Args:
        heads: The heads by their names.
        schedules: The :class:`WeightSchedule` of each.
        specs: Maps each head to the shapes of the student's signals and of its teacher's.
        teachers: Maps each head to its teachers, in words; empty if there is only one.
        shares: Maps each head whose weight is steered to its share of the gradient.
    """
    rows: list[list[str]] = []
    for name, head in heads.items():
        schedule = schedules[name]
        assert isinstance(schedule, WeightSchedule)
        signals, when = (student_signals(head), teacher_signals(head)), describe_schedule(schedule)
        if not any(signals) and has_stage(head):
            signals = head.pretrain_signals, head.pretrain_teacher_signals
            when = "in the pre-training stage only"
        sides = [[shape(x, spec) for x in side] for side, spec in zip(signals, specs[name], strict=True)]
        weight = f"share {shares[name]:g}" if name in shares else f"{schedule.weight:g}"
        first = [name, weight, when, *([teachers[name]] if teachers else [])]
        cells = [first, *[[""] * len(first)] * (max(map(len, sides)) - 1)]
        rows += [[*cell, *pair] for cell, pair in zip(cells, zip_longest(*sides, fillvalue=""), strict=True)]
    titles = ["head", "weight", "schedule", *(["learns from"] if teachers else []), "student", "teacher"]
    return tabulate(rows, titles, disable_numparse=True)


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
