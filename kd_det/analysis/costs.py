"""Measures the costs of inference: parameters, operations and time."""

import statistics
import time
from typing import Any

from tqdm import tqdm

from kd_det.analysis.run import Run
from kd_det.engine.flops import count_gflops

TIMED_ROUNDS = 5


def measure_costs(runs: list[Run], samples: list[list[dict[str, Any]]]) -> list[dict[str, float]]:
    """Measures the costs of each run.

    Args:
        runs: The runs.
        samples: Images for each run, as its model gets them.
    """
    times = measure_times(runs, samples)
    return [
        measure_networks(run, images) | {"ms per image": ms}
        for run, images, ms in zip(runs, samples, times, strict=True)
    ]


def measure_networks(run: Run, images: list[dict[str, Any]]) -> dict[str, float]:
    """Counts the parameters and the operations per image of a run; returns {} for an exported file."""
    if not run.networks:
        return {}
    return {
        "parameters (M)": sum(p.numel() for p in run.model.parameters()) / 1e6,
        "GFLOPs": statistics.fmean(sum(count_gflops(x, image) for x in run.networks) for image in images),
    }


def measure_times(runs: list[Run], samples: list[list[dict[str, Any]]]) -> list[float]:
    """Measures each run's median time per image in ms; the runs take turns, so that all of them meet the same load."""
    times: list[list[float]] = [[] for _ in runs]
    for round_ in tqdm(range(TIMED_ROUNDS + 1), desc="speed", unit="round", disable=None):
        for images in zip(*samples, strict=True):
            for run, image, run_times in zip(runs, images, times, strict=True):
                start = time.perf_counter()
                run.predict(image)
                if round_ > 0:  # The first round only warms up.
                    run_times.append(1000 * (time.perf_counter() - start))
    return [statistics.median(run_times) for run_times in times]
