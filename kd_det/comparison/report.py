"""Several trained detectors side by side: accuracy, size and speed on one test set."""

import contextlib
import io
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_test_loader
from detectron2.data.datasets.coco import convert_to_coco_json
from detectron2.evaluation import COCOEvaluator, DatasetEvaluators, PascalVOCDetectionEvaluator, inference_on_dataset
from detectron2.structures import Instances
from detectron2.utils.analysis import FlopCountAnalysis
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

from kd_det.data import DetectionMapper, check_files, check_num_classes, register_datasets
from kd_det.errors import InputError
from kd_det.export import find_run, load_student, read_student_config
from kd_det.pictures import draw_comparison

TIMED_ROUNDS = 5
# First words of the metrics, in the order of the table.
SECTIONS = ("bbox", "segm", "voc", "parameters", "GFLOPs", "ms")


@dataclass
class Run:
    """A trained detector.

    Attributes:
        name: Its title. Runs of one name are the seeds of one experiment.
        cfg: Config of the student alone.
        model: In evaluation mode.
    """

    name: str
    source: str
    cfg: CfgNode
    model: nn.Module


class VOCMetric(PascalVOCDetectionEvaluator):
    """The metric of PASCAL VOC under a name of its own, beside COCO's."""

    def evaluate(self) -> dict[str, Any]:
        return {"voc": super().evaluate()["bbox"]}


def compare(
    runs: Sequence[tuple[str, str]], output: str, *, dataset: str | None = None, images: int = 4, threshold: float = 0.5
) -> dict[str, Any]:
    """Evaluate runs on one test set and write ``comparison.json``, ``comparison.md`` and ``comparison.png``.

    Args:
        runs: Name and source of each: a run's output folder, or "CONFIG:WEIGHTS". Runs of equal names are averaged.
        output: The folder for the files, which are replaced.
        dataset: Name of the test set; the first run's DATASETS.TEST if None.
        images: Number of images in the picture; speed and operations are measured on them, too.
        threshold: Least score of the boxes in the picture.

    Returns:
        What the JSON holds; "table" is the table as text.

    Raises:
        InputError: If a run or the data set cannot be read, or they do not fit each other.
    """
    if images < 1:
        raise InputError(f"--images: must be at least 1, got {images}.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dataset, loaded = load_runs(runs, dataset, device)
    dicts = DatasetCatalog.get(dataset)
    chosen = choose_images(dicts, images)
    Path(output).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        name = coco_version(dataset, folder)
        measured = [evaluate(run, dataset, name, has_masks(dicts)) for run in loaded]
    samples = [[DetectionMapper(run.cfg, is_train=False)(dict(image)) for image in chosen] for run in loaded]
    times = measure_times([run.model for run in loaded], samples)
    for run, metrics, inputs, ms in zip(loaded, measured, samples, times, strict=True):
        metrics["parameters (M)"] = sum(p.numel() for p in run.model.parameters()) / 1e6
        metrics["GFLOPs"] = statistics.fmean(count_gflops(run.model, image) for image in inputs)
        metrics["ms per image"] = ms
    results = {
        "dataset": dataset,
        "dataset_images": len(dicts),
        "device": torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)",
        "runs": [{"name": r.name, "source": r.source, "metrics": m} for r, m in zip(loaded, measured, strict=True)],
        "summary": summarise(loaded, measured),
    }
    results["table"] = make_table(results)
    predictions = {}
    for run, inputs in zip(loaded, samples, strict=True):
        if run.name not in predictions:
            predictions[run.name] = [detect(run.model, image) for image in inputs]
    write(Path(output, "comparison.json"), json.dumps(without_nan(results), indent=2) + "\n")
    write(Path(output, "comparison.md"), results["table"] + "\n")
    classes = MetadataCatalog.get(dataset).thing_classes
    draw_comparison(chosen, classes, predictions, threshold, os.path.join(output, "comparison.png"))
    return results


def load_runs(runs: Sequence[tuple[str, str]], dataset: str | None, device: str) -> tuple[str, list[Run]]:
    """The name of the test set, and the runs, their configs checked before any model is built."""
    cfgs, weights = [], []
    for name, source in runs:
        if not os.path.isdir(source) and ":" not in source:
            raise InputError(f"--run {name}={source}: neither an output folder nor CONFIG:WEIGHTS.")
        config_file, path = find_run(source) if os.path.isdir(source) else source.split(":", 1)
        cfgs.append(read_student_config(config_file))
        weights.append(path)
        register_datasets(cfgs[-1])
    if not dataset and not cfgs[0].DATASETS.TEST:
        raise InputError(f"--dataset: none is given, and DATASETS.TEST of {runs[0][1]} is empty.")
    dataset = dataset or cfgs[0].DATASETS.TEST[0]
    for cfg in cfgs:
        cfg.DATASETS.TEST = (dataset,)
        check_files(cfg, train=False)
        check_num_classes(cfg, train=False)
    parts = zip(runs, cfgs, weights, strict=True)
    return dataset, [Run(*run, cfg, load_student(cfg, path, device)) for run, cfg, path in parts]


def choose_images(dicts: list[dict], count: int) -> list[dict]:
    """Images with objects, evenly spread over the data set: the same ones each time."""
    dicts = [x for x in dicts if x["annotations"]] or dicts
    return [dicts[i * len(dicts) // count] for i in range(min(count, len(dicts)))]


def has_masks(dicts: list[dict]) -> bool:
    """Whether every object has a mask."""
    return all("segmentation" in annotation for image in dicts for annotation in image["annotations"])


def coco_version(dataset: str, folder: str) -> str:
    """Name under which COCOEvaluator finds a data set's annotations; other formats are converted into `folder`."""
    metadata = MetadataCatalog.get(dataset)
    if "json_file" in metadata.as_dict():
        return dataset
    path = os.path.join(folder, "coco.json")
    convert_to_coco_json(dataset, path, allow_cached=False)
    MetadataCatalog.get(path).set(json_file=path, thing_classes=metadata.thing_classes)
    return path


def evaluate(run: Run, dataset: str, coco_name: str, masks: bool) -> dict[str, float]:
    """COCO AP of boxes and masks, over all classes and per class, and where the data set is a VOC one also VOC AP."""
    tasks = ("bbox", "segm") if masks and run.cfg.MODEL.MASK_ON else ("bbox",)
    evaluators = [COCOEvaluator(coco_name, tasks=tasks, distributed=False)]
    if MetadataCatalog.get(dataset).evaluator_type == "pascal_voc":
        evaluators.append(VOCMetric(dataset))
    loader = build_detection_test_loader(run.cfg, dataset, mapper=DetectionMapper(run.cfg, is_train=False))
    progress = tqdm(loader, desc=f"{run.name}: {dataset}", unit="image", disable=None)
    with contextlib.redirect_stdout(io.StringIO()):
        found = inference_on_dataset(run.model, progress, DatasetEvaluators(evaluators))
    keys = ("AP", "AP50", "AP75")
    # NaN stands for a detector that finds nothing.
    metrics = {f"{task} {key}": float(np.nan_to_num(found[task][key])) for task in found for key in keys}
    for task in tasks:
        metrics |= {f"{task} {key}": value for key, value in found[task].items() if key.startswith("AP-")}
    return metrics


def count_gflops(model: nn.Module, image: dict[str, Any]) -> float:
    """Billions of multiply-adds of the inference on an image, as fvcore counts them."""
    count = FlopCountAnalysis(model, [{"image": image["image"]}])
    count.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    return count.total() / 1e9


def measure_times(models: list[nn.Module], samples: list[list[dict[str, Any]]]) -> list[float]:
    """Median time of each model's inference on an image, in ms; the models take turns, so all meet the same load."""
    times: list[list[float]] = [[] for _ in models]
    for round_ in tqdm(range(TIMED_ROUNDS + 1), desc="speed", unit="round", disable=None):
        for turn in zip(*samples, strict=True):
            for own, model, image in zip(times, models, turn, strict=True):
                start = time.perf_counter()
                detect(model, image)
                if round_ > 0:  # The first one warms up.
                    own.append(1000 * (time.perf_counter() - start))
    return [statistics.median(own) for own in times]


@torch.no_grad()
def detect(model: nn.Module, image: dict[str, Any]) -> Instances:
    """What a model finds in an image, on the CPU."""
    return model([image])[0]["instances"].to("cpu")


def summarise(runs: list[Run], measured: list[dict[str, float]]) -> dict[str, dict[str, dict[str, float]]]:
    """Name of an experiment and metric to the mean and the standard deviation (0 for one run) over its runs."""
    seeds: dict[str, list[dict[str, float]]] = {}
    for run, metrics in zip(runs, measured, strict=True):
        seeds.setdefault(run.name, []).append(metrics)
    summary: dict[str, dict[str, dict[str, float]]] = {name: {} for name in seeds}
    for name, found in seeds.items():
        for metric in dict.fromkeys(metric for metrics in found for metric in metrics):
            values = [metrics.get(metric, math.nan) for metrics in found]
            std = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
            summary[name][metric] = {"mean": statistics.fmean(values), "std": std}
    return summary


def make_table(results: dict[str, Any]) -> str:
    """The summary as a Markdown table, one column per name, with what the numbers are below it."""
    summary = results["summary"]
    counts = {name: sum(run["name"] == name for run in results["runs"]) for name in summary}
    metrics = dict.fromkeys(metric for column in summary.values() for metric in column)
    order = sorted(metrics, key=lambda metric: SECTIONS.index(metric.split()[0]))

    def cell(name: str, metric: str) -> str:
        found = summary[name].get(metric)
        if found is None or math.isnan(found["mean"]):
            return "-"
        return f"{found['mean']:.2f}" + (f" ± {found['std']:.2f}" if counts[name] > 1 else "")

    headers = ["", *(name if count == 1 else f"{name} ({count} runs)" for name, count in counts.items())]
    rows = [[metric, *(cell(name, metric) for name in counts)] for metric in order]
    table = tabulate(rows, headers, tablefmt="pipe", disable_numparse=True)
    voc = "voc: PASCAL VOC AP, without objects marked as difficult. " if "voc AP" in metrics else ""
    return (
        f"{table}\n\n"
        f"{results['dataset']}, {results['dataset_images']} images. bbox, segm: COCO AP. {voc}"
        "±: standard deviation over runs. GFLOPs: billions of multiply-adds per image. "
        f"Time: median, batch of one, models in turn, on {results['device']}; other work on the machine shifts it."
    )


def without_nan(value: Any) -> Any:
    """The same with None for NaN, which JSON does not know."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def write(path: Path, text: str) -> None:
    """Write a file in one piece."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
