"""Compares runs by accuracy, size and speed on one test set, and writes JSON, a table and a picture."""

import json
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.data import DatasetCatalog

from kd_det.analysis import compare_classifiers, compare_detectors
from kd_det.analysis.costs import measure_costs
from kd_det.analysis.differences import expand_baselines, find_differences
from kd_det.analysis.html_report import write_report
from kd_det.analysis.run import Run
from kd_det.analysis.runs import load_runs
from kd_det.analysis.table import make_difference_tables, make_table, summarise, without_nan
from kd_det.data import choose_images
from kd_det.engine import is_classifier
from kd_det.errors import InputError
from kd_det.files import write_text

# Numbers of images in the picture and in the report's gallery.
PICTURE_IMAGES, GALLERY_IMAGES = 4, 24


def compare(
    runs: Sequence[tuple[str, str]],
    output: str,
    *,
    dataset: str | None = None,
    images: int | None = None,
    threshold: float | None = None,
    baselines: Sequence[tuple[str, str]] = (),
    html: bool = False,
    command: str = "",
) -> dict[str, Any]:
    """Evaluates runs on one test set and writes ``comparison.json``, ``comparison.md`` and ``comparison.png``.

    Args:
        runs: Name and source of each run: an output folder, "CONFIG:WEIGHTS", or an exported file beside its
            ``student.yaml``; WEIGHTS may be an exported file, too. Runs with the same name are averaged. For a chain of
            generations, each generation and their ensemble are compared.
        output: The folder for the files; existing files are replaced.
        dataset: Name of the test set; None is the first run's DATASETS.TEST.
        images: Number of images in the picture and in the report's gallery; speed and operations are measured on them,
            too. None means 4, and 24 in the gallery.
        threshold: Lowest score of the boxes that the picture shows and F1 counts; None chooses the score of each
            detector's best F1 on the whole test set.
        baselines: Pairs of a name and the name of its baseline, for differences by seed with a verdict; an empty first
            name stands for all others.
        html: Whether to write ``report.html``, too: one file with all numbers, learning curves and test images.
        command: The command that calls this function, for the report.

    Returns:
        The content of the JSON file; "table" and, if there are baselines, "difference_table" are the tables as text.

    Raises:
        InputError: If a run or the data set cannot be read, they do not fit each other, or a baseline is wrong.
    """
    if images is not None and images < 1:
        raise InputError(f"--images: must be at least 1, got {images}.")
    if threshold is not None and not 0 <= threshold <= 1:
        raise InputError(f"--threshold: must be a score from 0 to 1, got {threshold}.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dataset, loaded = load_runs(runs, dataset, device, exported=True)
    # A wrong baseline is reported before the evaluation.
    expand_baselines([{"name": run.name, "seed": run.seed} for run in loaded], baselines)
    kind = compare_classifiers if is_classifier(loaded[0].cfg) else compare_detectors
    records = DatasetCatalog.get(dataset)
    chosen = choose_images(records, images or PICTURE_IMAGES)
    Path(output).mkdir(parents=True, exist_ok=True)
    measured = kind.evaluate(loaded, dataset, records, threshold, by_size=True)
    samples = [[kind.Mapper(run.cfg, is_train=False)(dict(image)) for image in chosen] for run in loaded]
    for metrics, costs in zip(measured, measure_costs(loaded, samples), strict=True):
        metrics.update(costs)
    results = collect(loaded, measured, dataset, len(records), baselines)
    predictions: dict[str, list[Any]] = {}
    firsts: dict[str, Run] = {}
    by_name: dict[str, list[dict[str, float]]] = defaultdict(list)
    for run, inputs, metrics in zip(loaded, samples, measured, strict=True):
        by_name[run.name].append(metrics)
        if run.name not in firsts:
            firsts[run.name] = run
            predictions[run.name] = [run.predict(image) for image in inputs]
    write_text(Path(output, "comparison.json"), json.dumps(without_nan(results), indent=2) + "\n")
    write_text(Path(output, "comparison.md"), tables(results) + "\n")
    kind.draw(chosen, dataset, predictions, by_name, os.path.join(output, "comparison.png"))
    if html:
        shown = choose_images(records, images or GALLERY_IMAGES)
        mappers = {name: kind.Mapper(run.cfg, is_train=False) for name, run in firsts.items()}
        found = {name: [run.predict(mappers[name](dict(x))) for x in shown] for name, run in firsts.items()}
        gallery = kind.make_gallery(shown, dataset, found, by_name)
        write_report(Path(output, "report.html"), results, loaded, gallery, shown, command)
    return results


def collect(
    runs: list[Run],
    measured: list[dict[str, float]],
    dataset: str,
    images: int,
    baselines: Sequence[tuple[str, str]] = (),
) -> dict[str, Any]:
    """Collects the results of a comparison, including the tables.

    Args:
        runs: The runs.
        measured: Metrics of each run.
        dataset: Name of the test set.
        images: Number of its images.
        baselines: See :func:`compare`.
    """
    cuda = torch.cuda.is_available()
    results: dict[str, Any] = {
        "dataset": dataset,
        "dataset_images": images,
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} thread(s)",
        "runs": [
            {"name": run.name, "source": run.source, "seed": run.seed, "metrics": metrics}
            for run, metrics in zip(runs, measured, strict=True)
        ],
        "summary": summarise([run.name for run in runs], measured),
    }
    results["table"] = make_table(results)
    if baselines:
        results |= find_differences(results["runs"], baselines)
        results["difference_table"] = make_difference_tables(results)
    return results


def tables(results: dict[str, Any]) -> str:
    """Returns all tables of a comparison as text."""
    return "\n\n".join(results[key] for key in ("table", "difference_table") if key in results)
