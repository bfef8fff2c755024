"""Writes the HTML report of a comparison."""

import math
import os
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from kd_det.analysis.examples import draw_attention
from kd_det.analysis.learned import read_learned
from kd_det.analysis.run import Run
from kd_det.analysis.runs import find_files
from kd_det.analysis.table import COSTS, decimals, format_number
from kd_det.export import ExportedModel
from kd_det.reporting import Page, write_page
from kd_det.reporting.charts import Axis, RunCurves, chart_groups, looks
from kd_det.reporting.curves import read_curves
from kd_det.reporting.gallery import Gallery
from kd_det.reporting.page import Cell, Detail, DotPlot, Dots, Section, Table
from kd_det.reporting.versions import describe_versions

SIZES = {"APs": "small objects", "APm": "medium objects", "APl": "large objects"}
TASKS = {
    "bbox": "Boxes: COCO AP by size and class",
    "segm": "Masks: COCO AP by size and class",
    "top1": "Accuracy by class, in percent",
}
PRIMARY = ("bbox AP", "top1")
MIB = 2**20
DASH = "-"


def write_report(
    path: str | Path,
    results: Mapping[str, Any],
    runs: Sequence[Run],
    gallery: Gallery,
    images: Sequence[dict],
    command: str = "",
) -> None:
    """Writes the report of a comparison as one HTML file.

    Args:
        path: Path of the file. The results of ``kd-det relevance`` and ``kd-det noise`` in its folder are shown, too.
        results: Results of :func:`kd_det.analysis.compare`.
        runs: The models, in the order of the results.
        gallery: The test images, with what the models find in them.
        images: Detectron2's dicts of these images; the first ones get attention maps.
        command: The command that wrote the comparison.
    """
    by_name: dict[str, Run] = {}
    for run in runs:
        by_name.setdefault(run.name, run)
    firsts = list(by_name.values())
    curves = [RunCurves(run.name, run_label(run), read_curves(Path(run.source, "metrics.json"))) for run in runs]
    sections = (verdict(results), overall(results), by_class(results), costs(results, firsts))
    page = Page(
        title=f"Comparison on {results['dataset']}",
        lead=(
            f"{results['dataset_images']} test images",
            f"{len(firsts)} models, {len(runs)} runs",
            results["device"],
            datetime.now().strftime("%Y-%m-%d %H:%M"),
        ),
        sections=list(filter(None, (*sections, read_learned(Path(path).parent)))),
        experiments=list(looks([run.experiment for run in curves]).items()),
        charts=chart_groups(curves),
        gallery=gallery,
        attention=draw_attention(firsts, images),
        details=details(runs, firsts, command),
    )
    write_page(page, path)


def run_label(run: Run) -> str:
    """Names a run by its experiment and its seed."""
    return run.name if run.cfg.SEED < 0 else f"{run.name}, seed {run.cfg.SEED}"


# ---- Tables ----
def verdict(results: Mapping[str, Any]) -> Section | None:
    """Shows the differences to each baseline; None without them."""
    tables = []
    for baseline, columns in results.get("differences", {}).items():
        if not columns:
            continue
        metrics = list(dict.fromkeys(name for column in columns.values() for name in column))
        first = next((name for name in PRIMARY if name in metrics), metrics[0])
        rows = [(name, difference_cells(column[first])) for name, column in columns.items() if first in column]
        heads = ("", "mean difference", "95 % interval", "seeds", "verdict")
        unpaired = results["unpaired"][baseline].items()
        note = "Not compared: " + "; ".join(f"{name}, {why}" for name, why in unpaired) + "." if unpaired else ""
        tables.append(Table(f"{first}: difference to {baseline}, paired by seed", heads, rows, note))
        others = [
            (metric, [Cell(brief_difference(column.get(metric))) for column in columns.values()])
            for metric in metrics
            if metric != first and not is_detail(metric)
        ]
        tables.append(Table(f"Other metrics: difference to {baseline}", ("", *columns), others))
    lead = (
        "Students are paired by their seed. A verdict needs three seeds and an interval that excludes zero; between "
        "equal students, one verdict in twenty is wrong by chance."
    )
    return Section("verdict", "Verdict", lead, tables) if tables else None


def difference_cells(difference: Mapping[str, Any]) -> list[Cell]:
    """Formats the difference of one metric as cells: mean, interval, seeds and verdict."""
    word = difference["verdict"]
    kind = {"helps": "helps", "hurts": "hurts"}.get(word, "none")
    return [
        Cell(signed(difference["mean"])),
        Cell(interval(difference) or DASH),
        Cell(str(difference["seeds"])),
        Cell(word or "too few seeds", kind),
    ]


def brief_difference(difference: Mapping[str, Any] | None) -> str:
    """Formats a difference in one cell."""
    if difference is None:
        return DASH
    return " ".join(filter(None, (signed(difference["mean"]), interval(difference), difference["verdict"])))


def interval(difference: Mapping[str, Any]) -> str:
    """Formats a confidence interval; "" without one."""
    low, high = difference["low"], difference["high"]
    return "" if is_missing(low) or is_missing(high) else f"[{signed(low)}, {signed(high)}]"


def signed(value: float | None) -> str:
    return DASH if value is None or is_missing(value) else f"{value:+.2f}"


def is_missing(value: float | None) -> bool:
    return value is None or math.isnan(value)


def overall(results: Mapping[str, Any]) -> Section:
    """Shows the metrics over all classes, one row per model."""
    summary, counts = results["summary"], Counter(run["name"] for run in results["runs"])
    metrics = [name for name in metric_names(summary) if not (is_detail(name) or name.startswith(COSTS))]
    rows = [
        (name, [number(column.get(metric), counts[name]) for metric in metrics]) for name, column in summary.items()
    ]
    note = "±: standard deviation over the runs of a model. " if max(counts.values()) > 1 else ""
    if "F1" in metrics:
        note += "F1: boxes of all classes together at IoU 0.5, at the score threshold beside it."
    tables = [Table("All metrics", ("", *metrics), rows, note)]
    return Section("results", "Results", "", tables, dot_plot(results))


def by_class(results: Mapping[str, Any]) -> Section | None:
    """Shows the metrics by size and by class, one column per model; None if there are none."""
    summary, counts = results["summary"], Counter(run["name"] for run in results["runs"])
    details = [name for name in metric_names(summary) if is_detail(name)]
    tables = []
    for task, caption in TASKS.items():
        rows = []
        for metric in (name for name in details if name.startswith(task)):
            label = SIZES.get(metric.removeprefix(f"{task} "), metric.partition("-")[2])
            rows.append((label, [number(x.get(metric), counts[name], bar=True) for name, x in summary.items()]))
        if rows:
            tables.append(Table(caption, ("", *summary), rows))
    return Section("classes", "By size and class", "", tables) if tables else None


def costs(results: Mapping[str, Any], firsts: Sequence[Run]) -> Section:
    """Shows the costs of inference, one column per model."""
    summary, counts = results["summary"], Counter(run["name"] for run in results["runs"])
    rows = []
    for metric in (name for name in metric_names(summary) if name.startswith(COSTS)):
        digits = decimals([column[metric]["mean"] for column in summary.values() if metric in column])
        rows.append((metric, [number(column.get(metric), counts[x], digits) for x, column in summary.items()]))
    rows.append(("weights (MiB)", [Cell(f"{weights_size(run) / MIB:.2f}") for run in firsts]))
    note = (
        "GFLOPs: billions of multiply-adds per image. Time: median, batch of one, models in turn; other work on the "
        "machine affects it. Weights: the size of a file that holds the student's weights alone."
    )
    return Section("costs", "Costs", "", [Table("Costs of inference", ("", *summary), rows, note)])


def weights_size(run: Run) -> int:
    """Returns the number of bytes of a model's weights and buffers, or of the exported file that holds them."""
    if isinstance(run.model, ExportedModel):
        return os.path.getsize(run.model.path)
    return sum(tensor.numel() * tensor.element_size() for tensor in run.model.state_dict().values())


def metric_names(summary: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(metric for column in summary.values() for metric in column))


def is_detail(metric: str) -> bool:
    """Checks whether a metric belongs to one class or to objects of one size."""
    return metric.startswith(tuple(TASKS)) and ("-" in metric or metric.partition(" ")[2] in SIZES)


def number(value: Mapping[str, float] | None, runs: int, digits: int = 2, *, bar: bool = False) -> Cell:
    """Formats a mean over runs; a bar shows it as a share of 100."""
    if value is None or is_missing(value["mean"]):
        return Cell(DASH)
    share = min(max(value["mean"] / 100, 0), 1) if bar else None
    return Cell(format_number(dict(value), digits, runs), share=share)


def dot_plot(results: Mapping[str, Any]) -> DotPlot | None:
    """Places a dot for each run by the primary metric; None if no model has it."""
    summary = results["summary"]
    metric = next((name for name in PRIMARY if name in metric_names(summary)), None)
    counts = Counter(run["name"] for run in results["runs"])
    values: dict[str, list[float]] = {name: [] for name in summary}
    for run in results["runs"]:
        value = run["metrics"].get(metric)
        if not is_missing(value):
            values[run["name"]].append(value)
    numbers = [value for column in values.values() for value in column]
    if metric is None or not numbers:
        return None
    margin = 0.05 * (max(numbers) - min(numbers)) or 1.0
    axis = Axis((min(numbers) - margin, max(numbers) + margin), (0, 100))
    styles = looks(list(summary))
    rows = []
    for name, column in values.items():
        if column:
            places = axis.place(np.array([*column, np.mean(column)])).tolist()
            text = format_number(dict(summary[name][metric]), 2, counts[name])
            rows.append(Dots(name, styles[name], places[:-1], places[-1], text))
    return DotPlot(metric, rows, axis.ticks(5))


# ---- Details ----
def details(runs: Sequence[Run], firsts: Sequence[Run], command: str) -> list[Detail]:
    """Collects versions, commands, seeds, and one config per model."""
    commands = [command] if command else []
    commands += [
        shlex.join(["kd-det", "train", "--config-file", f"{run.source}/config.yaml"]) for run in runs if is_folder(run)
    ]
    seeds = "\n".join(f"{run_label(run)}: {run.source}" for run in runs)
    found = [Detail("Versions", describe_versions()), Detail("Runs and seeds", seeds)]
    if commands:
        found.append(Detail("Commands", "\n".join(commands)))
    return found + [Detail(f"Config of {run_label(run)}", read_config(run)) for run in firsts]


def is_folder(run: Run) -> bool:
    """Checks whether a run is the output folder of a training."""
    return os.path.isfile(os.path.join(run.source, "config.yaml"))


def read_config(run: Run) -> str:
    """Returns the whole config of a run, or that of its student alone if the source is no output folder."""
    if is_folder(run):
        return Path(find_files(run.name, run.source)[0]).read_text(encoding="utf-8", errors="replace")
    return run.cfg.dump()
