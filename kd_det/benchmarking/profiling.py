"""Where the time of a distillation step goes."""

from pathlib import Path

import torch
from detectron2.utils.events import EventStorage
from torch.profiler import ProfilerActivity, record_function

from kd_det.benchmarking.case import Case, build_networks, row_config
from kd_det.benchmarking.measurement import WARM_UP
from kd_det.benchmarking.rows import Row, Setup

STEPS = 3


def profile(row: Row, setup: Setup, trace: Path | None) -> str:
    """Profile some distillation steps.

    The forwards of student, teacher and heads are named ``kd_det: ...``; what belongs to a backward has PyTorch's name.

    Args:
        row: What is profiled.
        setup: Of what size.
        trace: File to write all events to, for chrome://tracing or https://ui.perfetto.dev.

    Returns:
        The operations that took longest, as a table.
    """
    cuda = torch.cuda.is_available()
    with EventStorage():
        case = Case(row, setup, *build_networks(row_config(row, setup), setup))
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
    """Name the forwards of a case in what is profiled."""
    parts = [("student", case.student, "forward")]
    parts += [("teacher", case.teacher, "start"), ("teacher, boxes", case.teacher, "finish")]
    parts += [(name, head, "forward") for name, head in case.distilled.heads.items()]
    for name, owner, method in parts:
        setattr(owner, method, record_function(f"kd_det: {name}")(getattr(owner, method)))
