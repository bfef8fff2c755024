"""Compares what trained models look at, by relevance maps of the objects in a test set.

IE-KD (Huang et al., CVPR 2021, https://arxiv.org/abs/2107.00181) shows such maps of the teacher and of both halves of a
student's channels.
"""

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from detectron2.data import DatasetCatalog
from torch import Tensor
from tqdm import tqdm

from kd_det.analysis.compare_halves import channel_order
from kd_det.analysis.probing import object_mask
from kd_det.analysis.relevance import COMPOSITES, explain
from kd_det.analysis.relevance_figures import color_relevance, rank_correlation, relevance_inside
from kd_det.analysis.run import Run
from kd_det.analysis.runs import load_runs
from kd_det.analysis.table import make_rows, summarise, without_nan
from kd_det.data import choose_images, class_names
from kd_det.data.images import read_image
from kd_det.engine import build_test_mapper
from kd_det.engine.picture_grid import Mark, Scene, draw_grid, printable, save
from kd_det.engine.pictures import OBJECT, box_of, class_name
from kd_det.errors import InputError, check_choice
from kd_det.files import write_text
from kd_det.taps import build_tap

TEACHER = "teacher"
# The titles of the columns: shares of the relevance inside, and the agreement with the teacher's maps.
IN_BOX, IN_MASK, AGREEMENT = "in box", "in mask", "rank correlation"
PICTURE_IMAGES = 4
WIDTH = 300  # The width of a column of the picture in pixels.


@dataclass(frozen=True)
class Sample:
    """Holds an image of the test set and the object in it that is explained.

    Attributes:
        record: Detectron2's dict of the image.
        label: Class of the object, or of a classifier's image.
        annotation: The object; None for a classifier's image.
    """

    record: dict
    label: int
    annotation: dict | None = None


@dataclass(frozen=True)
class View:
    """Describes a row of the table: a run, or a half of the channels of its feature.

    Attributes:
        name: Name of the row.
        run: The model.
        channels: Indices of the channels; None explains the whole network.
    """

    name: str
    run: Run
    channels: Tensor | None = None


def compare_relevance(
    teacher: str,
    runs: Sequence[tuple[str, str]],
    output: str,
    *,
    dataset: str | None = None,
    images: int = 20,
    composite: str = "layered",
    feature: str | None = None,
) -> dict[str, Any]:
    """Explains the labelled class of an object in each image; writes ``relevance.json``, ``.md`` and ``.png``.

    The maps are those of :func:`kd_det.analysis.relevance.explain`. In the images of detectors, the largest object is
    explained: its labelled class, in its labelled box, which is the same for all models.

    Args:
        teacher: Its output folder, or "CONFIG:WEIGHTS".
        runs: Name and source of each student, in the same form. Runs with the same name are averaged.
        output: The folder for the files; existing files are replaced.
        dataset: Name of the test set; None is the teacher's DATASETS.TEST.
        images: Number of its images to use, evenly spaced; for detectors, among those with objects.
        composite: Name of the rules.
        feature: A map of the students' backbones, such as ``res4`` or ``p4``: what passes through its inheriting and
            its exploring half (of ``KD.INHERIT_EXPLORE``) is explained, too.

    Returns:
        The content of the JSON file. "runs" has the metrics of each row of each run, averaged over images, "summary"
        their mean and standard deviation over the runs of a name, and "table" the same as text.

    Raises:
        InputError: If an argument is out of range, no image has objects, or a model cannot be read or explained.
    """
    if images < 1:
        raise InputError(f"--images: must be at least 1, got {images}.")
    check_choice("--composite", composite, COMPOSITES)
    if any(name == TEACHER for name, _ in runs):
        raise InputError(f"--run: {TEACHER!r} is the name of the network of --teacher; choose another one.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dataset, loaded = load_runs([(TEACHER, teacher), *runs], dataset, device, whole_chains=False)
    views = [view for run in loaded for view in find_views(run, feature)]
    samples = choose_samples(DatasetCatalog.get(dataset), images)
    if not samples:
        raise InputError(f"--dataset: no image of {dataset} has objects.")
    maps = [explain_samples(view, samples, composite, feature) for view in views]
    regions = [find_regions(sample) for sample in samples]
    metrics = [measure_maps(found, maps[0], regions) for found in maps]
    Path(output).mkdir(parents=True, exist_ok=True)
    rows = [
        {"name": view.name, "source": view.run.source, "seed": view.run.seed, "metrics": measured}
        for view, measured in zip(views, metrics, strict=True)
    ]
    results: dict[str, Any] = {"dataset": dataset, "images": len(samples), "composite": composite, "feature": feature}
    results |= {"area": measure_areas(regions), "runs": rows}
    results["summary"] = summarise([view.name for view in views], metrics)
    results["table"] = describe(results)
    write_text(Path(output, "relevance.json"), json.dumps(without_nan(results), indent=2) + "\n")
    write_text(Path(output, "relevance.md"), results["table"] + "\n")
    draw_maps(views, maps, samples, class_names(dataset), str(Path(output, "relevance.png")))
    return results


# ---- What is explained ----
def find_views(run: Run, feature: str | None) -> list[View]:
    """Lists the rows of a run: the network and, for a student, the two halves of its feature.

    Raises:
        InputError: If the student lacks the feature or an even number of its channels.
    """
    views = [View(run.name, run)]
    if feature is None or run.name == TEACHER:
        return views
    tap = build_tap(run.model)
    if feature not in tap.replaceable:
        known = ", ".join(tap.replaceable)
        raise InputError(f"--feature: {feature!r} is not a map of the backbone of {run.name!r}, which has {known}.")
    count = tap.spec()[feature].channels
    if count % 2:
        raise InputError(f"--feature: {feature} of {run.name!r} has {count} channels; their number must be even.")
    order = channel_order(run, feature)
    inherit, explore = (torch.arange(count) if order is None else order).chunk(2)
    return [*views, View(f"{run.name}, inherit", run, inherit), View(f"{run.name}, explore", run, explore)]


def choose_samples(records: list[dict], count: int) -> list[Sample]:
    """Chooses images evenly, and in each the largest object; leaves out images without objects."""
    samples = []
    for record in choose_images(records, count):
        if "annotations" not in record:
            samples.append(Sample(record, record["label"]))
            continue
        objects = [x for x in record["annotations"] if not x.get("iscrowd", 0)]
        if objects:
            largest = max(objects, key=lambda x: box_area(box_of(x)))
            samples.append(Sample(record, largest["category_id"], largest))
    return samples


def box_area(box: Sequence[float]) -> float:
    """Computes the area of a box x0, y0, x1, y1."""
    return (box[2] - box[0]) * (box[3] - box[1])


def explain_samples(view: View, samples: Sequence[Sample], composite: str, feature: str | None) -> list[Tensor]:
    """Computes the relevance of each pixel, summed over its channels, in the size of the image's file.

    Returns:
        A map (H, W) for each sample, on the CPU.
    """
    run = view.run
    mapper = build_test_mapper(run.cfg)
    maps = []
    for sample in tqdm(samples, desc=view.name, unit="image", disable=None):
        image = mapper(dict(sample.record))["image"].to(run.device)
        height, width = original_size(sample, image)
        box = None
        if sample.annotation is not None:
            scale = np.tile([image.shape[2] / width, image.shape[1] / height], 2)
            limits = np.tile([image.shape[2], image.shape[1]], 2)
            box = np.clip(np.array(box_of(sample.annotation)) * scale, 0, limits).tolist()
        part = feature if view.channels is not None else None
        found = explain(
            run.model, image, label=sample.label, box=box, composite=composite, feature=part, channels=view.channels
        )
        # Resizing by area keeps what lies where; the sum over the image does not matter for any figure.
        relevance = F.interpolate(found.relevance.sum(dim=0)[None, None].cpu(), size=(height, width), mode="area")
        maps.append(relevance[0, 0])
    return maps


def original_size(sample: Sample, image: Tensor) -> tuple[int, int]:
    """Returns height and width of a detector's image in its file, or of a classifier's image as the model gets it."""
    if sample.annotation is None:
        return int(image.shape[1]), int(image.shape[2])
    return int(sample.record["height"]), int(sample.record["width"])


# ---- Figures ----
def find_regions(sample: Sample) -> dict[str, Tensor]:
    """Marks the pixels (H, W) of the object: in its box, and in its mask if it has one."""
    if sample.annotation is None:
        return {}
    height, width = sample.record["height"], sample.record["width"]
    x0, y0, x1, y1 = box_of(sample.annotation)
    x, y = torch.arange(width) + 0.5, torch.arange(height)[:, None] + 0.5
    regions = {IN_BOX: (x0 <= x) & (x <= x1) & (y0 <= y) & (y <= y1)}
    mask = object_mask(sample.annotation, height, width)
    return regions if mask is None else regions | {IN_MASK: mask}


def measure_maps(
    maps: Sequence[Tensor], teacher: Sequence[Tensor], regions: Sequence[dict[str, Tensor]]
) -> dict[str, float]:
    """Averages the figures of one row over its images; images that lack a figure do not count.

    Args:
        maps: The maps of the row.
        teacher: The maps of the teacher for the same images.
        regions: The regions of each image's object.
    """
    found: dict[str, list[float]] = defaultdict(list)
    for relevance, reference, marked in zip(maps, teacher, regions, strict=True):
        for name, region in marked.items():
            found[name].append(relevance_inside(relevance, region))
        found[AGREEMENT].append(math.nan if maps is teacher else rank_correlation(relevance, reference))
    return {name: mean_of(values) for name, values in found.items()}


def measure_areas(regions: Sequence[dict[str, Tensor]]) -> dict[str, float]:
    """Computes the share of the image that each kind of region covers: that of evenly spread relevance."""
    names = dict.fromkeys(name for marked in regions for name in marked)
    return {name: mean_of([float(x[name].double().mean()) for x in regions if name in x]) for name in names}


def mean_of(values: Sequence[float]) -> float:
    """Averages the values that are not NaN; NaN if there are none."""
    numbers = [x for x in values if not math.isnan(x)]
    return sum(numbers) / len(numbers) if numbers else math.nan


def describe(results: dict[str, Any]) -> str:
    """Formats the figures as a Markdown table, with an explanation below it."""
    table = make_rows(results["summary"], "relevance", [(run["name"], run["source"]) for run in results["runs"]])
    areas = [f"{name.removeprefix('in ')} {share:.3f}" for name, share in results["area"].items()]
    parts = [
        f"{printable(results['dataset'])}, {results['images']} images; rules: {results['composite']}.",
        f"Share of the positive relevance in the object; share of the area: {', '.join(areas)}." if areas else "",
        "Rank correlation: with the teacher's maps.",
        f"inherit, explore: through the halves of {results['feature']}." if results["feature"] else "",
    ]
    return f"{table}\n\n{' '.join(filter(None, parts))}"


# ---- Picture ----
def draw_maps(
    views: Sequence[View], maps: Sequence[Sequence[Tensor]], samples: Sequence[Sample], names: Sequence[str], path: str
) -> None:
    """Draws a row for each of the first images: the image with the object, and the map of the first run of each name.

    Args:
        views: The rows of the table.
        maps: The maps of each of them.
        samples: The images.
        names: Names of the classes.
        path: Path of the PNG file.
    """
    columns: dict[str, Sequence[Tensor]] = {}
    for view, found in zip(views, maps, strict=True):
        columns.setdefault(view.name, found)
    rows = []
    for i, sample in enumerate(samples[:PICTURE_IMAGES]):
        pixels = read_pixels(sample, maps[0][i])
        marks = [] if sample.annotation is None else [Mark(box_of(sample.annotation), OBJECT)]
        cells = [Scene(color_relevance(pixels, found[i]), marks) for found in columns.values()]
        rows.append([Scene(pixels, marks, class_name(names, sample.label)), *cells])
    save(draw_grid(["image", *map(printable, columns)], rows, WIDTH), path)


def read_pixels(sample: Sample, relevance: Tensor) -> np.ndarray:
    """Reads the pixels of an image, RGB (H, W, 3), in the size of its maps (H, W)."""
    pixels = sample.record.get("image")
    if pixels is None:
        pixels = read_image(sample.record["file_name"], "RGB")
    height, width = relevance.shape
    return cv2.resize(np.asarray(pixels), (width, height), interpolation=cv2.INTER_AREA)
