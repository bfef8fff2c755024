"""The whole comparison: accuracy, size and speed on one test set, written as JSON, as a table and as a picture."""

import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.data import DatasetCatalog

from kd_det.analysis import compare_classifiers, compare_detectors
from kd_det.analysis.runs import load_runs, measure_times
from kd_det.analysis.table import make_table, summarise, without_nan
from kd_det.data import choose_images
from kd_det.engine import is_classifier
from kd_det.engine.flops import count_gflops
from kd_det.errors import InputError
from kd_det.files import write_whole


def compare(
    runs: Sequence[tuple[str, str]],
    output: str,
    *,
    dataset: str | None = None,
    images: int = 4,
    threshold: float | None = None,
) -> dict[str, Any]:
    """Evaluate runs on one test set and write ``comparison.json``, ``comparison.md`` and ``comparison.png``.

    Args:
        runs: Name and source of each: a run's output folder, or "CONFIG:WEIGHTS". Runs of equal names are averaged. Of
            a chain of generations each one and their ensemble are compared.
        output: The folder for the files, which are replaced.
        dataset: Name of the test set; the first run's DATASETS.TEST if None.
        images: Number of images in the picture; speed and operations are measured on them, too.
        threshold: Least score of the boxes in the picture and of those that F1 counts; if None, each detector's is the
            one of its best F1 on the whole test set.

    Returns:
        What the JSON holds; "table" is the table as text.

    Raises:
        InputError: If a run or the data set cannot be read, or they do not fit each other.
    """
    if images < 1:
        raise InputError(f"--images: must be at least 1, got {images}.")
    if threshold is not None and not 0 <= threshold <= 1:
        raise InputError(f"--threshold: must be a score from 0 to 1, got {threshold}.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dataset, loaded = load_runs(runs, dataset, device)
    kind = compare_classifiers if is_classifier(loaded[0].cfg) else compare_detectors
    records = DatasetCatalog.get(dataset)
    chosen = choose_images(records, images)
    Path(output).mkdir(parents=True, exist_ok=True)
    measured = kind.evaluate(loaded, dataset, records, threshold)
    samples = [[kind.Mapper(run.cfg, is_train=False)(dict(image)) for image in chosen] for run in loaded]
    times = measure_times(loaded, samples)
    for run, metrics, inputs, ms in zip(loaded, measured, samples, times, strict=True):
        metrics["parameters (M)"] = sum(p.numel() for p in run.model.parameters()) / 1e6
        metrics["GFLOPs"] = statistics.fmean(sum(count_gflops(x, image) for x in run.networks) for image in inputs)
        metrics["ms per image"] = ms
    results = {
        "dataset": dataset,
        "dataset_images": len(records),
        "device": torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)",
        "runs": [{"name": r.name, "source": r.source, "metrics": m} for r, m in zip(loaded, measured, strict=True)],
        "summary": summarise([run.name for run in loaded], measured),
    }
    results["table"] = make_table(results)
    predictions, by_name = {}, {}
    for run, inputs, metrics in zip(loaded, samples, measured, strict=True):
        by_name.setdefault(run.name, []).append(metrics)
        if run.name not in predictions:
            predictions[run.name] = [run.predict(image) for image in inputs]
    write(Path(output, "comparison.json"), json.dumps(without_nan(results), indent=2) + "\n")
    write(Path(output, "comparison.md"), results["table"] + "\n")
    kind.draw(chosen, dataset, predictions, by_name, os.path.join(output, "comparison.png"))
    return results


def write(path: Path, text: str) -> None:
    """Write a file in one piece."""
    write_whole(str(path), lambda file: file.write(text.encode()))
