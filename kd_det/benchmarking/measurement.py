"""Measures the times and the peak memory of the rows of a table."""

import multiprocessing
import resource
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.utils.events import EventStorage
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from kd_det.benchmarking.case import Case, Networks, build_all_networks
from kd_det.benchmarking.gpu_use import measure_use, milliseconds
from kd_det.benchmarking.head_memory import recording_kept_memory
from kd_det.benchmarking.rows import Row, Setup
from kd_det.engine.cli import import_plugin

# On a GPU the first steps also choose algorithms and reserve memory.
WARM_UP = 2
WARM_UP_ON_GPU = 5


def measure(rows: Sequence[Row], setup: Setup, *, arithmetic: bool = False) -> dict:
    """Measures all rows.

    Args:
        rows: The rows, whose names differ.
        setup: The networks and the batch of all rows.
        arithmetic: Whether to count operations and the memory that heads keep, too, which is impossible for compiled
            modules.

    Returns:
        ``rows``, which maps a row's name to ``A``, ``B``, ``C`` (ms), their ratios, images per second, ``memory`` (MB),
        and on a GPU what C does there: ``gpu`` (ms), ``idle`` (share), ``kernels`` and ``waits``; the fields of
        `setup`; ``device``, ``memory_kind`` and ``plain_memory``.
    """
    cuda = torch.cuda.is_available()
    # Memory comes first, because a new process would inherit the peak of this one.
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


def measure_times(rows: Sequence[Row], setup: Setup, arithmetic: bool) -> dict[str, dict[str, Any]]:
    """Maps the name of each row to its summary of A, B and C; see :func:`summary`."""
    networks: dict[tuple, Networks] = {}
    cases: dict[str, Case] = {}
    for row in rows:
        key = bool(row.heads), tuple(row.options.items())
        if key not in networks:
            networks[key] = build_all_networks(row, setup)
        cases[row.name] = Case(row, setup, *networks[key])
    measured: dict[str, list[tuple[float, ...]]] = {name: [] for name in cases}
    warm_up = WARM_UP_ON_GPU if torch.cuda.is_available() else WARM_UP
    with tqdm(total=(setup.rounds + warm_up) * len(cases), desc="time", unit="case", disable=None) as progress:
        for i in range(setup.rounds + warm_up):
            for name, case in cases.items():
                # The order of the parts alternates, so that a drifting load cancels out.
                times = [milliseconds(part) for part in case.parts[:: 1 if i % 2 else -1]]
                if i >= warm_up:
                    measured[name].append(tuple(times[:: 1 if i % 2 else -1]))
                progress.update()
    results = {name: summary(rounds, setup.batch) for name, rounds in measured.items()}
    for name, case in cases.items():
        if arithmetic:
            a, b, c = map(gigaflops, case.parts)
            results[name] |= {"ratio_of_operations": c / (a + b), "kept": kept_memory(case)}
        if torch.cuda.is_available():
            use = measure_use(case.distilled_step, rounds=setup.rounds, warm_up=0)
            results[name] |= {"gpu": use.busy, "idle": use.idle, "kernels": use.kernels, "waits": use.waits}
    return results


def kept_memory(case: Case) -> float:
    """Measures the memory in MB that the heads of a case keep until the backward pass, beyond the signals."""
    with recording_kept_memory(case.distilled.heads) as kept:
        case.distilled_step()
    return sum(kept.values()) / 2**20


def summary(rounds: Sequence[tuple[float, ...]], images: int) -> dict[str, Any]:
    """Summarises rounds of (A, B, C) in milliseconds: their medians, and the median and quartiles of C / (A + B)."""
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


def gigaflops(function: Callable[[], None]) -> float:
    """Counts the operations of the convolutions and matrix products of one call, forward and backward, in billions."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops() / 1e9


def measure_memory(job: tuple[Row, Setup]) -> float:
    """Measures the peak memory of the steps of one row in MB; must run in a process of its own."""
    row, setup = job
    with EventStorage():
        case = Case(row, setup, *build_all_networks(row, setup))
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        for _ in range(WARM_UP):
            case.distilled_step()
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def import_plugins(paths: Sequence[str]) -> None:
    """Imports plugins into a new process."""
    for path in paths:
        import_plugin(path)


def in_new_processes(jobs: Sequence[tuple[Row, Setup]]) -> list[float]:
    """Measures the peak memory of each job in a new process."""
    plugins = jobs[0][1].plugins
    context = multiprocessing.get_context("spawn")
    with context.Pool(1, initializer=import_plugins, initargs=(plugins,), maxtasksperchild=1) as pool:
        return list(tqdm(pool.imap(measure_memory, jobs), total=len(jobs), desc="memory", unit="case", disable=None))
