"""Compares image classifiers; :mod:`compare_detectors` has the same functions for detectors."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from kd_det.analysis.examples import classification_gallery
from kd_det.analysis.run import Run
from kd_det.classification.evaluator import ClassificationEvaluator
from kd_det.classification.image_mapper import ClassificationMapper
from kd_det.data import class_names
from kd_det.engine.picture_grid import save
from kd_det.engine.pictures import draw_classifications
from kd_det.reporting.gallery import Gallery

Mapper = ClassificationMapper


def evaluate(
    runs: list[Run], dataset: str, records: list[dict], threshold: float | None = None, *, by_size: bool = False
) -> list[dict[str, float]]:
    """Measures the top-1 and top-5 accuracy over all classes and the top-1 accuracy per class.

    It ignores `threshold` and `by_size`, which are for detectors.
    """
    results = [run.evaluate(dataset, ClassificationEvaluator(dataset))["classification"] for run in runs]
    return [{key: value for key, value in metrics.items() if key != "error"} for metrics in results]


def draw(
    images: list[dict],
    dataset: str,
    predictions: Mapping[str, Sequence[Tensor]],
    metrics: Mapping[str, Sequence[dict[str, float]]],
    path: str,
) -> None:
    """Writes a picture with the classes that each run predicts for the same images; ignores `metrics`."""
    save(draw_classifications(images, class_names(dataset), predictions), path)


def make_gallery(
    images: list[dict],
    dataset: str,
    predictions: Mapping[str, Sequence[Tensor]],
    metrics: Mapping[str, Sequence[dict[str, float]]],
) -> Gallery:
    """Collects the classes that each run predicts for the same images, for a report; ignores `metrics`."""
    return classification_gallery(images, dataset, predictions)
