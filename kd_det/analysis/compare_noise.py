"""Compares how much trained models suffer from noise in one of their features, on a test set.

A model in a flat minimum is expected to suffer less; IE-KD argues with such noise (Huang et al., CVPR 2021,
https://arxiv.org/abs/2107.00181).
"""

import contextlib
import io
import json
import math
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.data import DatasetCatalog, build_detection_test_loader
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import Instances
from torch import nn
from tqdm import tqdm

from kd_det.analysis.compare_detectors import check_detector, choose_tasks, coco_evaluator, coco_version, read_ap
from kd_det.analysis.evaluation_losses import build_labelled_mapper, compute_losses, propose
from kd_det.analysis.feature_noise import FeatureNoise, measure_std, mix_seed
from kd_det.analysis.noise_picture import draw_curves
from kd_det.analysis.run import Run
from kd_det.analysis.runs import load_runs
from kd_det.analysis.table import format_number, format_table, summarise, without_nan
from kd_det.classification.evaluator import ClassificationEvaluator
from kd_det.data import choose_images
from kd_det.engine import is_classifier
from kd_det.engine.picture_grid import printable, save
from kd_det.errors import InputError
from kd_det.files import write_text
from kd_det.taps import build_tap

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
# Maps the metrics in the picture and in the table to their titles; the JSON file has more.
SHOWN = {"loss": "Task loss", "bbox AP": "AP of boxes", "segm AP": "AP of masks", "top1": "Top-1 accuracy (%)"}

# Images as a model gets them, with their numbers in the test set.
Batches = Iterable[tuple[Sequence[int], list[dict]]]


class NumberedBatches:
    """Reads images batch by batch, with their labels and numbers, as often as it is iterated over.

    Args:
        run: The model that gets the images.
        records: Dicts of the images.
        numbers: Number of each image in the test set.
    """

    def __init__(self, run: Run, records: list[dict], numbers: Sequence[int]):
        # Detectors get one image at a time, as in their evaluation, so that the padding is always the same.
        size = run.cfg.SOLVER.IMS_PER_BATCH if is_classifier(run.cfg) else 1
        workers = run.cfg.DATALOADER.NUM_WORKERS
        mapper = build_labelled_mapper(run.cfg)
        self.loader = build_detection_test_loader(records, mapper=mapper, batch_size=size, num_workers=workers)
        self.numbers = [numbers[i : i + size] for i in range(0, len(numbers), size)]

    def __iter__(self) -> Iterator[tuple[Sequence[int], list[dict]]]:
        return zip(self.numbers, self.loader, strict=True)


def compare_noise(
    runs: Sequence[tuple[str, str]],
    feature: str,
    output: str,
    *,
    strengths: Sequence[float] = STRENGTHS,
    draws: int = 3,
    seed: int = 0,
    dataset: str | None = None,
    images: int | None = None,
) -> dict[str, Any]:
    """Measures the task loss and the AP or accuracy of runs under noise; writes ``noise.json``, ``.md`` and ``.png``.

    The noise is that of :class:`kd_det.analysis.feature_noise.FeatureNoise`, and the task loss is the sum of the losses
    of :func:`kd_det.analysis.evaluation_losses.compute_losses`, averaged over images.

    Args:
        runs: Name and source of each run: an output folder, or "CONFIG:WEIGHTS". Runs with the same name share a curve.
        feature: A signal that all of them have: a map such as ``res4`` or ``p4``, or ``pooled`` of classifiers.
        output: The folder for the files; existing files are replaced.
        strengths: Standard deviations of the noise, in those of each channel.
        draws: Number of times that the noise is drawn for each image.
        seed: Seed of the noise and of the sampling of proposals.
        dataset: Name of the test set; None is the first run's DATASETS.TEST.
        images: Number of its images to use, evenly spaced; for detectors, among those with objects. None uses all.

    Returns:
        The content of the JSON file. "runs" has the metrics of each run at each strength and draw, "summary" their mean
        and standard deviation over the runs and draws of a name, and "table" the same as text.

    Raises:
        InputError: If an argument is out of range, a model cannot be read or lacks the feature, or the models are of
            different kinds.
    """
    strengths = check_arguments(strengths, draws, seed, images)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dataset, loaded = load_runs(runs, dataset, device, whole_chains=False)
    records = DatasetCatalog.get(dataset)
    if not records:
        raise InputError(f"--dataset: {dataset} has no images.")
    chosen = records if images is None else choose_images(records, images)
    numbers = {id(record): i for i, record in enumerate(records)}
    inputs = [NumberedBatches(run, chosen, [numbers[id(record)] for record in chosen]) for run in loaded]
    for run, batches in zip(loaded, inputs, strict=True):
        check_run(run, feature, batches)
    Path(output).mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"dataset": dataset, "images": len(chosen), "feature": feature, "draws": draws}
    results |= {"seed": seed, "runs": []}
    with tempfile.TemporaryDirectory() as folder:
        classify = is_classifier(loaded[0].cfg)
        coco_name = "" if classify else coco_version(dataset, folder)
        for run, batches in zip(loaded, inputs, strict=True):
            metric = Accuracy(dataset) if classify else AveragePrecision(run, coco_name, chosen)
            measured = measure_run(run, feature, batches, metric, strengths=strengths, draws=draws, seed=seed)
            results["runs"].append({"name": run.name, "source": run.source, "seed": run.seed, "measurements": measured})
    results["summary"] = summarise_strengths(results["runs"], strengths)
    results["table"] = make_tables(results)
    write_text(Path(output, "noise.json"), json.dumps(without_nan(results), indent=2) + "\n")
    write_text(Path(output, "noise.md"), results["table"] + "\n")
    title = f"noise in {feature}, relative to the standard deviation of each channel"
    titles = {metric: SHOWN[metric] for metric in shown_metrics(results["summary"])}
    save(draw_curves(results["summary"], titles, title), str(Path(output, "noise.png")))
    return results


def check_arguments(strengths: Sequence[float], draws: int, seed: int, images: int | None) -> list[float]:
    """Checks the arguments of :func:`compare_noise` and returns the strengths in ascending order, each once.

    Raises:
        InputError: If one is out of range.
    """
    for strength in strengths:
        if not (math.isfinite(strength) and strength >= 0):
            raise InputError(f"--strengths: must be finite and at least 0, got {strength}.")
    if not strengths:
        raise InputError("--strengths: none is given.")
    for option, value, least in (("--draws", draws, 1), ("--seed", seed, 0), ("--images", images, 1)):
        if value is not None and value < least:
            raise InputError(f"{option}: must be at least {least}, got {value}.")
    return sorted(set(strengths))


@torch.no_grad()
def check_run(run: Run, feature: str, batches: Batches) -> None:
    """Checks that a run is a classifier or a detector, and that noise can be added to the feature.

    Raises:
        InputError: If it is not.
    """
    if not is_classifier(run.cfg):
        _, first = next(iter(batches))
        check_detector(run.name, run.model(first)[0])
    known = build_tap(run.model).replaceable
    if feature not in known:
        raise InputError(
            f"--feature: {feature!r} is no feature of {run.name!r} that noise can be added to; it has "
            f"{', '.join(known)}."
        )


class Accuracy(DatasetEvaluator):
    """Computes the accuracy of classifiers over all classes together.

    Args:
        dataset: Name of the test set.
    """

    def __init__(self, dataset: str):
        self.by_class = ClassificationEvaluator(dataset)

    def reset(self) -> None:
        self.by_class.reset()

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        self.by_class.process(inputs, outputs)

    def evaluate(self) -> dict[str, float]:
        metrics = self.by_class.evaluate()["classification"]
        return {name: metrics[name] for name in ("top1", "top5") if name in metrics}


class AveragePrecision(DatasetEvaluator):
    """Computes COCO's AP of a detector on a part of a test set.

    Args:
        run: The detector.
        coco_name: Name under which COCOEvaluator finds the test set.
        records: Detectron2's dicts of the images.
    """

    def __init__(self, run: Run, coco_name: str, records: Sequence[dict]):
        self.records = records
        self.tasks = choose_tasks(run, records)
        self.coco = coco_evaluator(coco_name, self.tasks)

    def reset(self) -> None:
        self.coco.reset()

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        self.coco.process(inputs, outputs)

    def evaluate(self) -> dict[str, float]:
        with contextlib.redirect_stdout(io.StringIO()):
            results = self.coco.evaluate(img_ids=[record["image_id"] for record in self.records])
        return read_ap(results, self.tasks, self.records)


def measure_run(
    run: Run,
    feature: str,
    batches: Batches,
    metric: DatasetEvaluator,
    *,
    strengths: Sequence[float],
    draws: int,
    seed: int,
) -> list[dict[str, Any]]:
    """Measures one run at each strength and draw; without noise, one draw is enough.

    Args:
        batches: The images, which are read once more for each strength and draw.
        metric: Computes the other metrics from the predictions.

    Returns:
        Dicts of "strength", "draw" and "metrics", which are "loss", its parts and those of `metric`.
    """
    noise = FeatureNoise(measure_std(run, feature, (batch for _, batch in batches)), seed)
    settings = [(strength, draw) for strength in strengths for draw in range(draws if strength else 1)]
    proposals = [propose(run.model, batch, sampling_seed(seed, numbers)) for numbers, batch in batches]
    measured = []
    _, first = next(iter(batches))
    with build_tap(run.model).replace(feature, noise, first):
        for noise.strength, noise.draw in tqdm(settings, desc=run.name, unit="evaluation", disable=None):
            metrics = measure_setting(run.model, noise, batches, proposals, metric)
            measured.append({"strength": noise.strength, "draw": noise.draw, "metrics": metrics})
    return measured


@torch.no_grad()
def measure_setting(
    model: nn.Module,
    noise: FeatureNoise,
    batches: Batches,
    proposals: Sequence[list[Instances] | None],
    metric: DatasetEvaluator,
) -> dict[str, float]:
    """Measures the losses and the other metrics of a model under the current noise.

    Args:
        proposals: For each batch, what the model proposes without noise, if it is an R-CNN. The losses are computed on
            these boxes at every strength; the other metrics are those of predictions from the model's own boxes.
    """
    metric.reset()
    count, totals = 0, defaultdict[str, float](float)
    for (noise.images, batch), boxes in zip(batches, proposals, strict=True):
        count += len(batch)
        # All strengths and draws share the seed, so that they differ by the noise alone.
        for name, loss in compute_losses(model, batch, sampling_seed(noise.seed, noise.images), boxes).items():
            totals[name] += len(batch) * loss
        metric.process(batch, model(batch))
    losses = {name: total / count for name, total in totals.items()}
    return {"loss": sum(losses.values()), **losses, **metric.evaluate()}


def sampling_seed(seed: int, numbers: Sequence[int]) -> int:
    """Returns the seed of the sampling of anchors and proposals in a batch, which is that of its first image."""
    return mix_seed(seed, numbers[0])


def summarise_strengths(runs: Sequence[dict[str, Any]], strengths: Sequence[float]) -> dict[str, list[dict[str, Any]]]:
    """Computes mean and standard deviation of each metric over the runs and draws of a name, strength by strength.

    Args:
        runs: The runs as :func:`compare_noise` returns them.
        strengths: The strengths.

    Returns:
        Maps each name to dicts of "strength", "count", the number of values, and "metrics", one per strength.
    """
    curves: dict[str, list[dict[str, Any]]] = {run["name"]: [] for run in runs}
    for strength in strengths:
        found = [(run["name"], x["metrics"]) for run in runs for x in run["measurements"] if x["strength"] == strength]
        counts = Counter(name for name, _ in found)
        for name, metrics in summarise([name for name, _ in found], [metrics for _, metrics in found]).items():
            curves[name].append({"strength": strength, "count": counts[name], "metrics": metrics})
    return curves


def shown_metrics(curves: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Lists the metrics of SHOWN that some curve has."""
    return [x for x in SHOWN if any(x in point["metrics"] for points in curves.values() for point in points)]


def make_tables(results: dict[str, Any]) -> str:
    """Formats a Markdown table for each metric of SHOWN, with one row per strength, and explains them below."""
    curves = results["summary"]
    counts = Counter(run["name"] for run in results["runs"])
    headers = ["strength", *(name if counts[name] == 1 else f"{name} ({counts[name]} runs)" for name in curves)]

    def cell(point: dict[str, Any], metric: str) -> str:
        value = point["metrics"].get(metric)
        return "-" if value is None else format_number(value, 3, point["count"])

    parts = []
    for metric in shown_metrics(curves):
        points = list(zip(*curves.values(), strict=True))
        rows = [[f"{row[0]['strength']:g}", *(cell(point, metric) for point in row)] for row in points]
        parts += [f"{SHOWN[metric]}:", format_table(rows, headers)]
    draws = f"{results['draws']} draw{'s' * (results['draws'] > 1)} per run"
    parts.append(
        f"{printable(results['dataset'])}, {results['images']} images. Noise in {results['feature']}, its strength "
        f"relative to the standard deviation of each channel; {draws}. "
        "±: standard deviation over draws and runs."
    )
    return "\n\n".join(parts)
