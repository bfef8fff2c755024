"""Times and peak memory of the rows of a table."""

import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from detectron2.utils.events import EventStorage
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from kd_det.benchmarking.case import Case, build_networks, row_config
from kd_det.benchmarking.rows import Row, Setup

WARM_UP = 2


def measure(rows: Sequence[Row], setup: Setup, *, arithmetic: bool = False) -> dict:
    """Measure all rows, and the machine they ran on.

    Args:
        rows: Of different names.
        setup: What they share.
        arithmetic: Whether to count operations too, which cannot be done of what is compiled.

    Returns:
        ``rows``: name to ``A``, ``B``, ``C`` (ms), their ratios, images per second, and ``memory`` (MB).
    """
    cuda = torch.cuda.is_available()
    # First, because a new process would inherit the peak of this one.
    plain, *memory = in_new_processes([(row, setup) for row in [Row("plain", (), rows[0].options), *rows]])
    with EventStorage():
        times = measure_times(rows, setup, arithmetic)
    return {
        "device": torch.cuda.get_device_name() if cuda else f"a CPU with {torch.get_num_threads()} thread(s)",
        "memory_kind": "allocated on the GPU" if cuda else "resident, with Python and its libraries",
        **vars(setup),
        "plain_memory": plain,
        "rows": {name: x | {"memory": m} for (name, x), m in zip(times.items(), memory, strict=True)},
    }


def measure_times(rows: Sequence[Row], setup: Setup, arithmetic: bool) -> dict[str, dict[str, float]]:
    """Name of each row to the medians of A, B, C (ms) and of what follows from them."""
    networks, cases = {}, {}
    for row in rows:
        key = bool(row.heads), tuple(row.options.items())
        if key not in networks:
            networks[key] = build_networks(row_config(row, setup), setup)
        cases[row.name] = Case(row, setup, *networks[key])
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in cases}
    with tqdm(total=(setup.rounds + WARM_UP) * len(cases), desc="time", unit="case", disable=None) as progress:
        for i in range(setup.rounds + WARM_UP):
            for name, case in cases.items():
                # Forwards and backwards by turns, so that a drifting load cancels out.
                times = [milliseconds(part) for part in case.parts[:: 1 if i % 2 else -1]]
                if i >= WARM_UP:
                    found[name].append(tuple(times[:: 1 if i % 2 else -1]))
                progress.update()
    results = {name: summary(rounds, setup.batch) for name, rounds in found.items()}
    if arithmetic:
        for name, case in cases.items():
            a, b, c = map(gigaflops, case.parts)
            results[name]["ratio_of_operations"] = c / (a + b)
    return results


def summary(rounds: Sequence[tuple[float, ...]], images: int) -> dict[str, float]:
    """Medians over rounds of (A, B, C) in milliseconds, and the quartiles of C / (A + B)."""
    ratios = [c / (a + b) for a, b, c in rounds]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    times = {key: statistics.median(column) for key, column in zip("ABC", np.transpose(rounds).tolist(), strict=True)}
    return times | {
        "ratio": middle,
        "ratio_low": low,
        "ratio_high": high,
        "ratio_to_plain": statistics.median(c / a for a, _, c in rounds),
        "images_per_second": 1000 * images / times["C"],
    }


def milliseconds(function: Callable[[], None]) -> float:
    """Time of one call."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return 1000 * (time.perf_counter() - start)


def gigaflops(function: Callable[[], None]) -> float:
    """Arithmetic of the convolutions and matrix products of one call, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops() / 1e9


def measure_memory(job: tuple[Row, Setup]) -> float:
    """Peak memory of the steps of one row, in MB; runs in a process of its own."""
    row, setup = job
    with EventStorage():
        case = Case(row, setup, *build_networks(row_config(row, setup), setup))
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        for _ in range(WARM_UP):
            case.distilled_step()
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def in_new_processes(jobs: Sequence[tuple[Row, Setup]]) -> list[float]:
    """Peak memory of each job."""
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        return list(tqdm(pool.imap(measure_memory, jobs), total=len(jobs), desc="memory", unit="case", disable=None))
