"""Compares students seed by seed: the mean difference of each metric, its confidence interval and a verdict."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict

import numpy as np
from scipy.stats import t as student_t

from kd_det.errors import InputError

CONFIDENCE = 0.95
# A verdict needs at least this many seeds.
MIN_SEEDS = 3
HELPS, HURTS, NO_EVIDENCE = "helps", "hurts", "no evidence"
# Metrics that are better the lower they are, and those that are neither better nor worse.
LOWER_IS_BETTER = {"parameters (M)", "GFLOPs", "ms per image"}
NEUTRAL = {"score threshold"}
# A run of a comparison as comparison.json has it: its "name", its "seed" (None if it is unknown) and its "metrics".
RunResult = Mapping[str, Any]


class Difference(TypedDict):
    """Describes how far the students of one experiment differ from those of another in one metric.

    Attributes:
        mean: Mean difference over the seeds, in units of the metric; positive if the first experiment's is higher.
        low: Lower end of the 95 % confidence interval of the mean; NaN for a single seed.
        high: Upper end of the interval.
        seeds: Number of seeds.
        verdict: ``helps``, ``hurts`` or ``no evidence``; empty with fewer than three seeds, for a metric that is
            neither better nor worse, and where a number is missing.
    """

    mean: float
    low: float
    high: float
    seeds: int
    verdict: str


class Differences(TypedDict):
    """Describes all differences of a comparison.

    Attributes:
        differences: Maps the name of a baseline, then of an experiment, then of a metric to the difference.
        unpaired: Maps the name of a baseline, then of an experiment to why their runs cannot be paired.
    """

    differences: dict[str, dict[str, dict[str, Difference]]]
    unpaired: dict[str, dict[str, str]]


def direction(metric: str) -> int:
    """Returns 1 for a metric that is better the higher it is, -1 for one that is better the lower it is, else 0."""
    if metric in NEUTRAL:
        return 0
    return -1 if metric in LOWER_IS_BETTER else 1


def paired_difference(values: Sequence[float], baseline: Sequence[float], *, better: int = 1) -> Difference:
    """Computes the mean difference of paired values, with Student's t interval, and the verdict of the paired t-test.

    The verdict is ``helps`` or ``hurts`` if the interval excludes zero, which is when the two-sided test rejects at 5 %
    that the students are equal. If all differences are equal, the interval is that one number.

    Args:
        values: One value per seed.
        baseline: The values that they are compared with, of the same seeds in the same order.
        better: 1 if higher values are better, -1 if lower ones are, 0 if neither are.

    Example::

        paired_difference([27.1, 25.3, 28.8], [19.2, 18.4, 22.0])["verdict"]  # "helps"
    """
    differences = np.subtract(values, baseline, dtype=float)
    seeds, mean, margin = len(differences), float(differences.mean()), math.nan
    if seeds > 1:
        quantile = student_t.ppf((1 + CONFIDENCE) / 2, seeds - 1)
        margin = float(quantile * differences.std(ddof=1) / math.sqrt(seeds))
    low, high = mean - margin, mean + margin
    verdict = ""
    if better and seeds >= MIN_SEEDS and not math.isnan(mean):
        sign = better * ((low > 0) - (high < 0))
        verdict = {1: HELPS, -1: HURTS, 0: NO_EVIDENCE}[sign]
    return {"mean": mean, "low": low, "high": high, "seeds": seeds, "verdict": verdict}


def find_differences(runs: Sequence[RunResult], baselines: Sequence[tuple[str, str]]) -> Differences:
    """Compares experiments with their baselines, in all metrics that both have, over the seeds that both have.

    A metric that a run lacks has no mean: to leave that run out would hide that it failed.

    Args:
        runs: The runs; those with the same name are the seeds of an experiment.
        baselines: Pairs of an experiment and its baseline; an empty experiment stands for all others.

    Raises:
        InputError: See :func:`expand_baselines`.
    """
    result: Differences = {"differences": {}, "unpaired": {}}
    for baseline, names in expand_baselines(runs, baselines).items():
        differences = result["differences"].setdefault(baseline, {})
        unpaired = result["unpaired"].setdefault(baseline, {})
        for name in names:
            pairs, reason = pair_by_seed(runs, name, baseline)
            if reason:
                unpaired[name] = reason
            else:
                differences[name] = {
                    metric: paired_difference(
                        [value_of(run, metric) for run, _ in pairs],
                        [value_of(run, metric) for _, run in pairs],
                        better=direction(metric),
                    )
                    for metric in shared_metrics(pairs)
                }
    return result


def expand_baselines(runs: Iterable[RunResult], baselines: Sequence[tuple[str, str]]) -> dict[str, list[str]]:
    """Maps each baseline to the experiments that are compared with it.

    The name of a chain of generations stands for all of them and for their ensemble.

    Args:
        runs: The runs; their metrics are not looked at.
        baselines: See :func:`find_differences`.

    Raises:
        InputError: If there is no run of a name, or the seeds of a baseline are unknown or not unique.
    """
    runs = list(runs)
    names = list(dict.fromkeys(run["name"] for run in runs))
    expanded: dict[str, list[str]] = {}
    for experiment, baseline in baselines:
        argument = f"--baseline {experiment}={baseline}" if experiment else f"--baseline {baseline}"
        if experiment:
            named = [x for x in names if re.fullmatch(re.escape(experiment) + r"( gen \d+| ensemble)?", x)]
        else:
            named = [x for x in names if x != baseline]
        for name, there in ((baseline, baseline in names), (experiment, named or not experiment)):
            if not there:
                raise InputError(f"{argument}: no run is named {name!r}, only {', '.join(map(repr, names))}.")
        if baseline in named:
            raise InputError(f"{argument}: an experiment cannot be its own baseline.")
        problem = seeds_of(runs, baseline)[1]
        if problem:
            raise InputError(f"{argument}: runs are paired by the SEED of their configs, but {problem}.")
        expanded[baseline] = list(dict.fromkeys([*expanded.get(baseline, []), *named]))
    return expanded


def pair_by_seed(runs: Sequence[RunResult], name: str, baseline: str) -> tuple[list[tuple[RunResult, RunResult]], str]:
    """Pairs the runs of an experiment with those of its baseline that have the same seed, in the order of the seeds.

    Returns:
        The pairs and an empty text; or no pairs and the reason.
    """
    seeds, problem = seeds_of(runs, name)
    others, other_problem = seeds_of(runs, baseline)
    pairs = [(seeds[seed], others[seed]) for seed in sorted(seeds.keys() & others.keys())]
    if problem or other_problem:
        return [], problem or other_problem
    return pairs, "" if pairs else f"no seed in common with {baseline}"


def seeds_of(runs: Iterable[RunResult], name: str) -> tuple[dict[int, RunResult], str]:
    """Maps each seed of an experiment to its run.

    Returns:
        The dict and an empty text; or an empty dict and the reason why seeds do not identify the runs.
    """
    found: dict[int, RunResult] = {}
    for run in runs:
        if run["name"] == name:
            seed = run.get("seed")
            if seed is None:
                return {}, f"a run of {name} has no SEED"
            if seed in found:
                return {}, f"two runs of {name} have SEED {seed}"
            found[seed] = run
    return found, ""


def value_of(run: RunResult, metric: str) -> float:
    """Returns the value of a metric; NaN if the run lacks it, or has None, which stands for NaN in JSON."""
    value = run["metrics"].get(metric)
    return math.nan if value is None else value


def shared_metrics(pairs: Sequence[tuple[RunResult, RunResult]]) -> list[str]:
    """Lists the metrics that both experiments have, each in one of its runs at least."""
    sides = [dict.fromkeys(metric for run in side for metric in run["metrics"]) for side in zip(*pairs, strict=True)]
    return [metric for metric in sides[0] if metric in sides[1]]
