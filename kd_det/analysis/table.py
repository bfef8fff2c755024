"""The numbers of a comparison: mean and deviation over seeds, as a table and without NaN."""

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from tabulate import tabulate

from kd_det.engine.picture_grid import printable

# First letters of the metrics in the order of the table, and what is told of them below it.
SECTIONS = {
    "bbox": "bbox, segm: COCO AP.",
    "segm": "",
    "voc": "voc: PASCAL VOC AP, without objects marked as difficult.",
    "F1": "F1: of the boxes of all classes together at IoU 0.5, with the score threshold that the picture has, too.",
    "score": "",
    "top": "top1, top5: accuracy in percent; top1-NAME: of the images of one class.",
    "parameters": "",
    "GFLOPs": "GFLOPs: billions of multiply-adds per image.",
    "ms": "",
}
# Their numbers may be far below 1; those of the others are percentages.
COSTS = ("parameters", "GFLOPs", "ms")


def summarise(names: Sequence[str], measured: Sequence[dict[str, float]]) -> dict[str, dict[str, dict[str, float]]]:
    """Name of an experiment and metric to the mean and the standard deviation (0 for one run) over its runs.

    Args:
        names: The experiment of each run.
        measured: The metrics of each run.
    """
    seeds: dict[str, list[dict[str, float]]] = {}
    for name, metrics in zip(names, measured, strict=True):
        seeds.setdefault(name, []).append(metrics)
    summary: dict[str, dict[str, dict[str, float]]] = {name: {} for name in seeds}
    for name, found in seeds.items():
        for metric in dict.fromkeys(metric for metrics in found for metric in metrics):
            values = [metrics.get(metric, math.nan) for metrics in found]
            std = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
            summary[name][metric] = {"mean": statistics.fmean(values), "std": std}
    return summary


def make_table(results: dict[str, Any]) -> str:
    """The summary as a Markdown table, one column per name, with what the numbers are below it.

    A dash stands for what a model does not have, such as masks, and nan for what cannot be computed, such as the AP of
    a class without objects.
    """
    summary = results["summary"]
    counts = Counter(run["name"] for run in results["runs"])
    metrics = dict.fromkeys(metric for column in summary.values() for metric in column)
    sections = {metric: next(x for x in SECTIONS if metric.startswith(x)) for metric in metrics}
    order = sorted(metrics, key=lambda metric: list(SECTIONS).index(sections[metric]))

    def row(metric: str) -> list[str]:
        found = {name: column[metric] for name, column in summary.items() if metric in column}
        means = [x["mean"] for x in found.values()]
        digits = decimals(means) if sections[metric] in COSTS else 2
        cells = {name: format_number(x, digits, counts[name]) for name, x in found.items()}
        return [metric, *(cells.get(name, "-") for name in summary)]

    headers = ["", *(name if counts[name] == 1 else f"{name} ({counts[name]} runs)" for name in summary)]
    told = [text for section, text in SECTIONS.items() if text and section in sections.values()]
    if max(counts.values()) > 1:
        told.append("±: standard deviation over runs.")
    return (
        f"{format_table([row(metric) for metric in order], headers)}\n\n"
        f"{printable(results['dataset'])}, {results['dataset_images']} images. {' '.join(told)} "
        f"Time: median, batch of one, models in turn, on {results['device']}; other work on the machine shifts it."
    )


def make_rows(found: dict[str, dict[str, dict[str, float]]], title: str, runs: Sequence[tuple[str, str]]) -> str:
    """What :func:`summarise` gives as a Markdown table, one row per name; a dash where there is no number.

    Args:
        found: The summary.
        title: Of the first column.
        runs: Name and source of each run in the summary.
    """
    columns = list(next(iter(found.values())))
    counts = Counter(name for name, _ in runs)

    def row(name: str) -> list[str]:
        cells = (found[name][column] for column in columns)
        return [name, *("-" if math.isnan(x["mean"]) else format_number(x, 3, counts[name]) for x in cells)]

    return format_table([row(name) for name in found], [title, *columns])


def format_number(value: dict[str, float], digits: int, runs: int) -> str:
    """Return a mean, and of two or more runs also its standard deviation."""
    mean = f"{value['mean']:.{digits}f}"
    return mean if runs < 2 or math.isnan(value["mean"]) else f"{mean} ± {value['std']:.{digits}f}"


def format_table(rows: Sequence[Sequence[str]], headers: Sequence[str]) -> str:
    """Return a Markdown table, whose rows and columns no text can break."""

    def escape(text: str) -> str:
        return printable(text.replace("\\", "\\\\").replace("|", "\\|"))

    rows, headers = [[*map(escape, row)] for row in rows], [*map(escape, headers)]
    return tabulate(rows, headers, tablefmt="pipe", disable_numparse=True)


def decimals(values: list[float]) -> int:
    """Digits behind the point: two, or as many as leave the least value two that are not leading zeros."""
    least = min((value for value in values if value > 0), default=1.0)
    return max(2, 1 - math.floor(math.log10(least)))


def without_nan(value: Any) -> Any:
    """The same with None for NaN, which JSON does not know."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
