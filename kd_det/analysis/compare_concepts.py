"""How many visual concepts each of several trained models has, on objects and beside them, and how it learned them."""

import logging
import math
import os
from collections.abc import Callable, Sequence

import torch
from detectron2.data import DatasetCatalog
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector
from tqdm import tqdm

from kd_det.analysis.compare_halves import check_feature, labelled_boxes
from kd_det.analysis.runs import Run, load_runs
from kd_det.analysis.table import summarise
from kd_det.analysis.visual_concepts import concept_ratio, find_concepts, learning_effort, measure_entropies, stability
from kd_det.checkpoint import load_strictly
from kd_det.checkpoint_files import read_header
from kd_det.checkpoint_folder import read_headers
from kd_det.data import choose_images
from kd_det.engine import build_test_mapper
from kd_det.errors import InputError
from kd_det.export import find_run
from kd_det.taps import build_tap

logger = logging.getLogger(__name__)
# Features beside maps that concepts can be measured of.
OTHERS = ("roi_features", "roi_box_features", "pooled")
METRICS = ("N_fg", "N_bg", "lambda", "D_mean", "D_std", "rho")


def compare_concepts(
    runs: Sequence[tuple[str, str]],
    feature: str,
    *,
    dataset: str | None = None,
    images: int = 20,
    threshold: float = 0.2,
    **search,
) -> dict[str, dict[str, dict[str, float]]]:
    """Measure the visual concepts of each run, at each of its checkpoints.

    The foreground are the labelled boxes of a detector's images. Of a classifier's, which have none, it is the middle,
    three quarters of each side, as in the published code for images of one object.

    Args:
        runs: Name and source of each: an output folder, or "CONFIG:WEIGHTS", which has one checkpoint. Runs of equal
            names are averaged.
        feature: A signal of all of them: a map such as ``res4``, ``pooled``, ``roi_features`` or ``roi_box_features``
            (of the labelled boxes).
        dataset: Name of the test set; the first run's DATASETS.TEST if None.
        images: How many of its images are looked at, evenly spaced; of a detector's those with objects.
        threshold: Of :func:`kd_det.analysis.visual_concepts.find_concepts`.
        search: Options of :func:`kd_det.analysis.visual_concepts.measure_entropies`.

    Returns:
        Name, then metric, then mean and std over runs. Metrics: "N_fg" and "N_bg", concepts of an image on objects and
        beside them at the last checkpoint; "lambda", the share of the former; of two or more checkpoints (else NaN)
        "D_mean" and "D_std" (a variance), the way of the weights until an image had most concepts on objects, and
        "rho", the share that the last one has of all that were ever there.

    Raises:
        InputError: If a model cannot be read or lacks the feature, or if no image has objects and background.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dataset, loaded = load_runs(runs, dataset, device, whole_chains=False)
    for run in loaded:
        check_feature(run, feature, OTHERS)
    records = DatasetCatalog.get(dataset)
    if not any(record.get("annotations", True) for record in records):
        raise InputError(f"--dataset: no image of {dataset} has objects.")
    records = choose_images(records, images)
    found = [measure_run(run, feature, records, threshold, search) for run in loaded]
    return summarise([run.name for run in loaded], found)


def measure_run(run: Run, feature: str, records: list[dict], threshold: float, search: dict) -> dict[str, float]:
    """The metrics of one run, see :func:`compare_concepts`."""
    mapper = build_test_mapper(run.cfg)
    pairs = [(record, mapper(record)) for record in records]
    run.model.requires_grad_(False)
    entropies, steps, weights = [], [], None
    for path in find_checkpoints(run.source):
        load_strictly(run.model, path, key=f"--run {run.name}")
        entropies.append(
            [
                measure_entropies(
                    extract(run.model, feature, *pair), pair[1]["image"].float().to(run.model.device), **search
                )
                for pair in tqdm(pairs, desc=f"{run.name}, {os.path.basename(path)}", unit="image", disable=None)
            ]
        )
        before, weights = weights, parameters_to_vector(run.model.parameters()).double()
        if before is None:
            before, length = weights, weights.norm()
        steps.append((weights - before).norm() / length)
    entropies = torch.stack([torch.stack(images) for images in entropies]).cpu()
    # An image whose feature does not answer, at any checkpoint, tells nothing.
    answered = ~entropies.isnan().flatten(2).any(dim=2).any(dim=0)
    if not answered.any():
        raise InputError(f"--feature: {feature} of {run.name!r} does not change with any of the images.")
    entropies = entropies[:, answered]
    foreground = torch.stack([find_foreground(*pair, entropies.shape[-1]) for pair in pairs])[answered]
    concepts = torch.stack([find_concepts(x, foreground, threshold=threshold) for x in entropies])
    on, beside = ((concepts & where).flatten(2).sum(dim=2).double() for where in (foreground, ~foreground))
    metrics = {"N_fg": on[-1].mean(), "N_bg": beside[-1].mean(), "lambda": concept_ratio(on[-1], beside[-1])}
    if len(steps) > 1:
        metrics["D_mean"], metrics["D_std"] = learning_effort(on.T, torch.stack(steps).cpu())
        metrics["rho"] = stability(concepts & foreground)
    return dict.fromkeys(METRICS, math.nan) | {name: value.item() for name, value in metrics.items()}


def find_checkpoints(source: str) -> list[str]:
    """Paths of a run's checkpoints, the first one first; those of another run that used the folder before are left out.

    Args:
        source: The output folder, or "CONFIG:WEIGHTS", which is one checkpoint.
    """
    if not os.path.isdir(source):
        return [source.split(":", 1)[1]]
    last = find_run(source)[1]
    own = read_header(last)
    headers, reasons = read_headers(source)
    for damaged in reasons.values():
        logger.warning("%s; it is left out.", damaged)
    # The last one is often there twice, with its number and as model_final.pth.
    found = {header.iteration: path for path, header in headers.items() if header.run == own.run}
    return [path for _, path in sorted((found | {own.iteration: last}).items())]


def extract(model: nn.Module, feature: str, record: dict, sample: dict) -> Callable[[Tensor], Tensor]:
    """The function that computes a feature of copies of an image, (n, 3, H, W)."""
    tap = build_tap(model)

    def compute(images: Tensor) -> Tensor:
        batch = [sample | {"image": image} for image in images]
        boxes = labelled_boxes([record] * len(batch), batch) if feature.startswith("roi_") else torch.empty(0, 5)
        return tap.compute(batch, {feature}, {"roi_boxes": boxes.to(images.device)})[feature]

    return compute


def find_foreground(record: dict, sample: dict, grid: int) -> Tensor:
    """The cells, (grid, grid), whose centres lie in a labelled box; of a classifier's image those in its middle."""
    height, width = sample["image"].shape[-2:]
    boxes = torch.tensor([[0.0, width / 8, height / 8, width * 7 / 8, height * 7 / 8]])
    if "annotations" in record:
        boxes = labelled_boxes([record], [sample])
    centres = (torch.arange(grid) + 0.5) / grid
    x, y = (centres * width)[None, None, :], (centres * height)[None, :, None]
    left, top, right, bottom = boxes[:, 1:, None, None].unbind(1)
    return ((left <= x) & (x < right) & (top <= y) & (y < bottom)).any(dim=0)
