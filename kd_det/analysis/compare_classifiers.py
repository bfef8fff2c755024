"""Compares image classifiers; ``compare_detectors`` has the same functions for detectors."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from kd_det.analysis.runs import Run
from kd_det.classification.evaluator import ClassificationEvaluator
from kd_det.classification.image_mapper import ClassificationMapper
from kd_det.data import class_names
from kd_det.engine.picture_grid import save
from kd_det.engine.pictures import draw_classifications

Mapper = ClassificationMapper


def evaluate(
    runs: list[Run], dataset: str, records: list[dict], threshold: float | None = None
) -> list[dict[str, float]]:
    """Measure top-1 and top-5 accuracy over all classes, and top-1 per class; `threshold` has no part in it."""
    found = [run.evaluate(dataset, ClassificationEvaluator(dataset))["classification"] for run in runs]
    return [{key: value for key, value in metrics.items() if key != "error"} for metrics in found]


def draw(
    images: list[dict],
    dataset: str,
    predictions: Mapping[str, Sequence[Tensor]],
    metrics: Mapping[str, Sequence[dict[str, float]]],
    path: str,
) -> None:
    """Write the picture: every run's class of the same images; `metrics` have no part in it."""
    save(draw_classifications(images, class_names(dataset), predictions), path)
