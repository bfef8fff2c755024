"""Compares trained models by their visual concepts on objects and on the background, and by how they learned them."""

import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.data import DatasetCatalog
from torch import Tensor
from tqdm import tqdm

from kd_det.analysis.probing import check_feature, feature_of_copies, labelled_boxes, object_mask
from kd_det.analysis.run import Run
from kd_det.analysis.run_history import load_checkpoints
from kd_det.analysis.runs import load_runs
from kd_det.analysis.table import Summary, summarise
from kd_det.analysis.visual_concepts import concept_ratio, find_concepts, learning_effort, measure_entropies, stability
from kd_det.data import choose_images
from kd_det.engine import build_test_mapper
from kd_det.errors import InputError, check_choice

# Features that have visual concepts, in addition to maps.
OTHERS = ("roi_features", "roi_box_features", "pooled")
FOREGROUNDS = ("masks", "boxes")
METRICS = ("N_fg", "N_bg", "lambda", "D_mean", "D_std", "rho")


def compare_concepts(
    runs: Sequence[tuple[str, str]],
    feature: str,
    *,
    dataset: str | None = None,
    images: int = 20,
    threshold: float = 0.2,
    foreground: str = "masks",
    **search: Any,
) -> Summary:
    """Measures the visual concepts of each run at each of its checkpoints.

    The foreground of a detector's images is the masks of their labelled objects, or the boxes of objects without a
    mask. The images of a classifier have none; their foreground is the middle, three quarters of each side, as in the
    published code for images of a single object.

    Args:
        runs: Name and source of each run: an output folder, or "CONFIG:WEIGHTS", which has one checkpoint. Runs with
            the same name are averaged.
        feature: A signal that all of them have: a map such as ``res4``, ``pooled``, ``roi_features`` or
            ``roi_box_features`` (of the labelled boxes).
        dataset: Name of the test set; None is the first run's DATASETS.TEST.
        images: Number of its images to use, evenly spaced; for detectors, among those with objects.
        threshold: Threshold of :func:`kd_det.analysis.visual_concepts.find_concepts`.
        foreground: "boxes" takes boxes even where there are masks.
        search: Options of :func:`kd_det.analysis.visual_concepts.measure_entropies`.

    Returns:
        Mean and std over runs, by name and metric. "N_fg" and "N_bg" are the numbers of concepts in an image on objects
        and on the background at the last checkpoint, and "lambda" is the share of the former. The others are NaN unless
        there are two checkpoints or more: "D_mean" and "D_std" (a variance) describe how far the weights moved until an
        image had the most concepts on objects, and "rho" is the share of all concepts ever learned that the last
        checkpoint has.

    Raises:
        InputError: If a model cannot be read or lacks the feature, or if no image has objects and background.
    """
    check_choice("--foreground", foreground, FOREGROUNDS)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dataset, loaded = load_runs(runs, dataset, device, whole_chains=False)
    for run in loaded:
        check_feature(run, feature, OTHERS)
    records = DatasetCatalog.get(dataset)
    if not any(record.get("annotations", True) for record in records):
        raise InputError(f"--dataset: no image of {dataset} has objects.")
    records = choose_images(records, images)
    metrics = [measure_run(run, feature, records, threshold, search, masks=foreground == "masks") for run in loaded]
    return summarise([run.name for run in loaded], metrics)


def measure_run(
    run: Run, feature: str, records: list[dict], threshold: float, search: dict[str, Any], *, masks: bool = True
) -> dict[str, float]:
    """Measures one run; see :func:`compare_concepts`."""
    mapper = build_test_mapper(run.cfg)
    images = [(record, mapper(record)) for record in records]
    entropies, steps = measure_checkpoints(run, feature, images, search)
    # An image that does not change the feature at some checkpoint shows nothing.
    responding = ~entropies.isnan().flatten(2).any(dim=2).any(dim=0)
    if not responding.any():
        raise InputError(f"--feature: {feature} of {run.name!r} does not change with any of the images.")
    foreground = torch.stack([find_foreground(*image, entropies.shape[-1], masks=masks) for image in images])
    return count_concepts(entropies[:, responding], foreground[responding], steps, threshold)


def measure_checkpoints(
    run: Run, feature: str, images: list[tuple[dict, dict]], search: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Measures the entropies of all images at each checkpoint of a run.

    Args:
        images: Pairs of Detectron2's dict of an image and the same image as the model gets it.

    Returns:
        Entropies (M, N, g, g) for M checkpoints and N images, and the steps of the weights between checkpoints, (M,).
    """
    run.model.requires_grad_(False)
    entropies, steps = [], []
    for path, step in load_checkpoints(run):
        steps.append(step.cpu())
        for record, sample in tqdm(images, desc=f"{run.name}, {os.path.basename(path)}", unit="image", disable=None):
            compute = feature_of_copies(run.model, feature, record, sample)
            pixels = sample["image"].float().to(run.device)
            entropies.append(measure_entropies(compute, pixels, **search).cpu())
    return torch.stack(entropies).unflatten(0, (len(steps), -1)), torch.stack(steps)


def count_concepts(entropies: Tensor, foreground: Tensor, steps: Tensor, threshold: float) -> dict[str, float]:
    """Computes the metrics of one run from entropies (M, N, g, g), foreground (N, g, g) and steps (M,)."""
    concepts = torch.stack([find_concepts(x, foreground, threshold=threshold) for x in entropies])
    on_objects, on_background = (
        (concepts & where).flatten(2).sum(dim=2).double() for where in (foreground, ~foreground)
    )
    metrics = {
        "N_fg": on_objects[-1].mean(),
        "N_bg": on_background[-1].mean(),
        "lambda": concept_ratio(on_objects[-1], on_background[-1]),
    }
    if len(steps) > 1:
        metrics["D_mean"], metrics["D_std"] = learning_effort(on_objects.T, steps)
        metrics["rho"] = stability(concepts & foreground)
    return dict.fromkeys(METRICS, math.nan) | {name: value.item() for name, value in metrics.items()}


def find_foreground(record: dict, sample: dict, grid: int, *, masks: bool = True) -> Tensor:
    """Marks the cells (grid, grid) whose centres lie in a labelled object; for a classifier's image, in its middle.

    Args:
        record: Detectron2's dict of the image.
        sample: The same image as the model gets it.
        grid: Number of cells along each side.
        masks: Whether an object is its mask, if it has one, instead of its box.
    """
    height, width = sample["image"].shape[-2:]
    boxes = torch.tensor([[0.0, width / 8, height / 8, width * 7 / 8, height * 7 / 8]])
    centres = (torch.arange(grid) + 0.5) / grid
    foreground = torch.zeros(grid, grid, dtype=torch.bool)
    if "annotations" in record:
        rows, columns = (centres * sample["height"]).long(), (centres * sample["width"]).long()
        without_mask = []
        for annotation in record["annotations"]:
            mask = object_mask(annotation, sample["height"], sample["width"]) if masks else None
            if mask is None:
                without_mask.append(annotation)
            elif not annotation.get("iscrowd", 0):
                foreground |= mask[rows][:, columns]
        boxes = labelled_boxes([record | {"annotations": without_mask}], [sample])
    x, y = (centres * width)[None, None, :], (centres * height)[None, :, None]
    left, top, right, bottom = boxes[:, 1:, None, None].unbind(1)
    return foreground | ((left <= x) & (x < right) & (top <= y) & (y < bottom)).any(dim=0)
