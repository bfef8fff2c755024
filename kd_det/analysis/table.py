"""Summarises the numbers of a comparison: mean and deviation over seeds, as a table and without NaN."""

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from tabulate import tabulate

from kd_det.analysis.differences import CONFIDENCE, HELPS, HURTS, MIN_SEEDS, NO_EVIDENCE, Difference
from kd_det.engine.picture_grid import printable

# Maps the name of an experiment, and then of a metric, to its "mean" and "std" over runs.
Summary = dict[str, dict[str, dict[str, float]]]
# Maps the first letters of metrics, in the order of the table, to the explanation below it.
SECTIONS = {
    "bbox": "bbox, segm: COCO AP.",
    "segm": "",
    "voc": "voc: PASCAL VOC AP, without objects marked as difficult.",
    "sem_seg": "sem_seg: mean IoU of the classes of pixels.",
    "F1": "F1: boxes of all classes together at IoU 0.5, at the score threshold of the picture.",
    "score": "",
    "top": "top1, top5: accuracy in percent; top1-NAME: on the images of one class.",
    "parameters": "",
    "GFLOPs": "GFLOPs: billions of multiply-adds per image.",
    "ms": "",
}
DIFFERENCE_NOTE = (
    f"In brackets: {CONFIDENCE:.0%} confidence interval of the mean (Student's t). {HELPS}, {HURTS}: the interval "
    f"excludes zero; {NO_EVIDENCE}: it does not; fewer than {MIN_SEEDS} seeds give no verdict. Less is better for "
    "parameters, GFLOPs and ms per image. Between equal students, one verdict in twenty is wrong by chance."
)
# Metrics whose numbers may be far below 1; all others are percentages.
COSTS = ("parameters", "GFLOPs", "ms")


def summarise(names: Sequence[str], measured: Sequence[dict[str, float]]) -> Summary:
    """Computes the mean and the standard deviation (0 for a single run) of each metric over the runs of an experiment.

    Args:
        names: Name of the experiment of each run.
        measured: Metrics of each run.
    """
    seeds: dict[str, list[dict[str, float]]] = {}
    for name, metrics in zip(names, measured, strict=True):
        seeds.setdefault(name, []).append(metrics)
    summary: Summary = {name: {} for name in seeds}
    for name, runs in seeds.items():
        for metric in dict.fromkeys(metric for metrics in runs for metric in metrics):
            values = [metrics.get(metric, math.nan) for metrics in runs]
            std = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
            summary[name][metric] = {"mean": statistics.fmean(values), "std": std}
    return summary


def make_table(results: dict[str, Any]) -> str:
    """Formats results as a Markdown table with one column per name, and explains the numbers below it.

    A dash marks what a model does not have, such as masks; nan marks what cannot be computed, such as the AP of a class
    without objects.

    Args:
        results: Results of :func:`kd_det.analysis.compare`, except "table".
    """
    summary = results["summary"]
    counts = Counter(run["name"] for run in results["runs"])
    sections = {metric: section_of(metric) for metric in order_metrics(summary.values())}

    def row(metric: str) -> list[str]:
        numbers = {name: column[metric] for name, column in summary.items() if metric in column}
        means = [x["mean"] for x in numbers.values()]
        digits = decimals(means) if sections[metric] in COSTS else 2
        cells = {name: format_number(x, digits, counts[name]) for name, x in numbers.items()}
        return [metric, *(cells.get(name, "-") for name in summary)]

    headers = ["", *(name if counts[name] == 1 else f"{name} ({counts[name]} runs)" for name in summary)]
    notes = [text for section, text in SECTIONS.items() if text and section in sections.values()]
    if max(counts.values()) > 1:
        notes.append("±: standard deviation over runs.")
    return (
        f"{format_table([row(metric) for metric in sections], headers)}\n\n"
        f"{printable(results['dataset'])}, {results['dataset_images']} images. {' '.join(notes)} "
        f"Time: median, batch of one, models in turn, on {results['device']}; other work on the machine affects it."
    )


def section_of(metric: str) -> str:
    """Returns the section of a metric in the table."""
    return next(x for x in SECTIONS if metric.startswith(x))


def order_metrics(columns: Iterable[Mapping[str, Any]]) -> list[str]:
    """Orders the metrics of all columns by their sections.

    Args:
        columns: Mappings whose keys are metrics.
    """
    metrics = dict.fromkeys(metric for column in columns for metric in column)
    return sorted(metrics, key=lambda metric: list(SECTIONS).index(section_of(metric)))


def make_difference_tables(results: dict[str, Any]) -> str:
    """Formats a Markdown table for each baseline, with one column per experiment, and explains them below.

    Args:
        results: Results of :func:`kd_det.analysis.compare` with baselines, except "difference_table".
    """
    parts = []
    for baseline, columns in results["differences"].items():
        rows = []
        for metric in order_metrics(columns.values()):
            cells = {name: column[metric] for name, column in columns.items() if metric in column}
            means = [results["summary"][name][metric]["mean"] for name in (baseline, *cells)]
            digits = decimals(means) if section_of(metric) in COSTS else 2
            rows.append([metric, *(format_difference(cells[x], digits) if x in cells else "-" for x in columns)])
        seeds = [next(iter(column.values()))["seeds"] for column in columns.values()]
        headers = [f"{name} ({n} seed{'s' * (n > 1)})" for name, n in zip(columns, seeds, strict=True)]
        parts.append(f"Difference to {printable(baseline)}, seed by seed:")
        parts.append(format_table(rows, ["", *headers]) if columns else "There is none.")
        unpaired = results["unpaired"][baseline].items()
        if unpaired:
            parts.append("Not compared: " + "; ".join(printable(f"{name}, {why}") for name, why in unpaired) + ".")
    return "\n\n".join([*parts, DIFFERENCE_NOTE])


def format_difference(difference: Difference, digits: int) -> str:
    """Formats a difference with its interval, if there is one, and its verdict."""
    if math.isnan(difference["mean"]):
        return "nan"
    mean, low, high = (f"{x:+.{digits}f}" for x in (difference["mean"], difference["low"], difference["high"]))
    interval = "" if math.isnan(difference["low"]) else f"[{low}, {high}]"
    return " ".join(filter(None, (mean, interval, difference["verdict"])))


def make_rows(summary: Summary, title: str, runs: Sequence[tuple[str, str]]) -> str:
    """Formats a summary as a Markdown table with one row per name; a dash stands for NaN.

    Args:
        summary: Result of :func:`summarise`.
        title: Title of the first column.
        runs: Name and source of each run in the summary.
    """
    columns = list(next(iter(summary.values())))
    counts = Counter(name for name, _ in runs)

    def row(name: str) -> list[str]:
        cells = (summary[name][column] for column in columns)
        return [name, *("-" if math.isnan(x["mean"]) else format_number(x, 3, counts[name]) for x in cells)]

    return format_table([row(name) for name in summary], [title, *columns])


def format_number(value: dict[str, float], digits: int, runs: int) -> str:
    """Formats a mean, with its standard deviation if there are two runs or more."""
    mean = f"{value['mean']:.{digits}f}"
    return mean if runs < 2 or math.isnan(value["mean"]) else f"{mean} ± {value['std']:.{digits}f}"


def format_table(rows: Sequence[Sequence[str]], headers: Sequence[str]) -> str:
    """Formats a Markdown table; escapes text that would break its rows or columns."""

    def escape(text: str) -> str:
        return printable(text.replace("\\", "\\\\").replace("|", "\\|"))

    rows, headers = [[*map(escape, row)] for row in rows], [*map(escape, headers)]
    return tabulate(rows, headers, tablefmt="pipe", disable_numparse=True)


def decimals(values: list[float]) -> int:
    """Returns the number of decimals: two, or more if the smallest value needs them for two significant digits."""
    smallest = min((value for value in values if value > 0), default=1.0)
    return max(2, 1 - math.floor(math.log10(smallest)))


def without_nan(value: Any) -> Any:
    """Replaces NaN, which JSON lacks, by None."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
