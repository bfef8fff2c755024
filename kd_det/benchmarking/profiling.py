"""Profiles distillation steps."""

from pathlib import Path

import torch
from detectron2.utils.events import EventStorage
from torch.profiler import ProfilerActivity, record_function

from kd_det.benchmarking.case import Case, build_all_networks
from kd_det.benchmarking.measurement import WARM_UP
from kd_det.benchmarking.rows import Row, Setup

STEPS = 3


def profile(row: Row, setup: Setup, trace: Path | None) -> str:
    """Profiles a few distillation steps.

    The forward passes of student, teacher and heads are named ``kd_det: ...``; backward passes have PyTorch's names.

    Args:
        row: The heads and options to profile.
        setup: The networks and the batch.
        trace: File to write all events to, for chrome://tracing or https://ui.perfetto.dev; None writes none.

    Returns:
        A table of the operations that took the most time.
    """
    cuda = torch.cuda.is_available()
    with EventStorage():
        case = Case(row, setup, *build_all_networks(row, setup))
        name_parts(case)
        for _ in range(WARM_UP):
            case.distilled_step()
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
        with torch.profiler.profile(activities=activities) as profiler:
            for _ in range(STEPS):
                case.distilled_step()
            if cuda:
                torch.cuda.synchronize()
    if trace:
        profiler.export_chrome_trace(str(trace))
    order = "device_time_total" if cuda else "cpu_time_total"
    return profiler.key_averages().table(sort_by=order, row_limit=30, max_name_column_width=60)


def name_parts(case: Case) -> None:
    """Gives names to the forward passes of a case, which the profile shows."""
    parts: list[tuple[str, object, str]] = [("student", case.student, "forward")]
    for name, teacher in case.distilled.teachers.items():
        parts += [(name, teacher, "start"), (f"{name}, boxes", teacher, "finish")]
    parts += [(name, head, "forward") for name, head in case.distilled.heads.items()]
    for name, owner, method in parts:
        setattr(owner, method, record_function(f"kd_det: {name}")(getattr(owner, method)))
