"""Measures how a function uses the GPU: its time there, its kernels, and how often the host waits for it."""

import statistics
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

PROFILED = 3
# Events of the profiler that are copies, not kernels.
COPIES = ("Memcpy", "Memset")


@dataclass(frozen=True)
class Use:
    """Describes one call of a function on average.

    Attributes:
        wall: Time from beginning to end in ms.
        busy: Time in ms in which the GPU computes or copies; None without a GPU.
        kernels: Number of kernels; None without a GPU.
        waits: Number of times that the host waits for the GPU; None without a GPU.
    """

    wall: float
    busy: float | None = None
    kernels: float | None = None
    waits: int | None = None

    @property
    def idle(self) -> float | None:
        """Returns the share of the time in which the GPU does nothing."""
        return None if self.busy is None else max(0.0, 1 - self.busy / self.wall)


def measure_use(function: Callable[[], None], *, rounds: int, warm_up: int) -> Use:
    """Measures a function; times are medians.

    Args:
        function: Is called many times, always with the same work.
        rounds: Number of calls whose time is measured.
        warm_up: Number of calls before.
    """
    for _ in range(warm_up):
        function()
    wall = statistics.median(milliseconds(function) for _ in range(rounds))
    if not torch.cuda.is_available():
        return Use(wall)
    with torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(PROFILED):
            function()
        torch.cuda.synchronize()
    busy, kernels = summarize_events(profiler.events())
    return Use(wall, busy / PROFILED, kernels / PROFILED, count_waits(function))


def milliseconds(function: Callable[[], None]) -> float:
    """Measures the time of one call in ms, on a GPU by its own clock."""
    if not torch.cuda.is_available():
        start = time.perf_counter()
        function()
        return 1000 * (time.perf_counter() - start)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def summarize_events(events: Iterable[Any]) -> tuple[float, int]:
    """Returns the time in ms in which the GPU was busy, and the number of kernels.

    What ran at the same time on several streams counts once.

    Args:
        events: Events of PyTorch's profiler.
    """
    device = [x for x in events if x.device_type == DeviceType.CUDA and not getattr(x, "is_user_annotation", False)]
    busy, latest = 0.0, 0.0
    for start, end in sorted((x.time_range.start, x.time_range.end) for x in device):
        busy += max(0.0, end - max(start, latest))
        latest = max(latest, end)
    return busy / 1000, sum(not x.name.startswith(COPIES) for x in device)


def count_waits(function: Callable[[], None]) -> int:
    """Counts how often the host waits for the GPU in one call; 0 without a GPU."""
    if not torch.cuda.is_available():
        function()
        return 0
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return sum("called a synchronizing CUDA operation" in str(x.message) for x in caught)
