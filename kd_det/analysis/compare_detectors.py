"""Compares detectors; :mod:`compare_classifiers` has the same functions for image classifiers."""

import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.data import MetadataCatalog
from detectron2.data.datasets.coco import convert_to_coco_json
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators
from detectron2.structures import Instances

from kd_det.analysis.examples import detection_gallery
from kd_det.analysis.run import Run
from kd_det.data import CocoEvaluator, DetectionMapper, class_names
from kd_det.data.sem_seg_evaluator import SegmentationEvaluator
from kd_det.data.voc_evaluator import VocEvaluator
from kd_det.engine.evaluation import segmentation_tasks
from kd_det.engine.matching import OperatingPoint, match, operating_point
from kd_det.engine.picture_grid import save
from kd_det.engine.pictures import Choice, draw_detections
from kd_det.errors import InputError
from kd_det.reporting.gallery import Gallery

Mapper = DetectionMapper
# COCO's names of the AP of objects of below 32 x 32, of up to 96 x 96, and of more pixels.
BY_SIZE = ("APs", "APm", "APl")


class F1Metric(DatasetEvaluator):
    """Computes the best F1 of boxes at IoU 0.5 over all classes together, and the score threshold that gives it.

    Args:
        name: Name of the run, for messages.
        dataset: Name of the data set.
        records: Detectron2's dicts of its images.
        threshold: The score threshold to use; None searches for the best one.

    Raises:
        InputError: In :meth:`process`, if the model is not a detector.
    """

    def __init__(self, name: str, dataset: str, records: Sequence[dict], threshold: float | None = None):
        self.name = name
        self.classes = len(class_names(dataset))
        self.annotations = {record["image_id"]: record["annotations"] for record in records}
        self.threshold = threshold
        self.reset()

    def reset(self) -> None:
        self.images: list[tuple[list[dict], Instances]] = []

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        for image, output in zip(inputs, outputs, strict=True):
            check_detector(self.name, output)
            instances = output["instances"].to("cpu")
            # Masks, which would fill the memory, are left out.
            fields = {key: instances.get(key) for key in ("pred_boxes", "scores", "pred_classes")}
            self.images.append((self.annotations[image["image_id"]], Instances(instances.image_size, **fields)))

    def evaluate(self) -> dict[str, Any]:
        point = operating_point(match(self.images, classes=self.classes), self.threshold)
        return {"f1": {"F1": 100 * point.f1, "score threshold": point.threshold}}


def check_detector(name: str, output: Mapping[str, Any]) -> None:
    """Checks that a model gives instances for an image.

    Args:
        name: Name of the run, for messages.
        output: Result of the model.

    Raises:
        InputError: If it gives something else.
    """
    if "instances" not in output:
        raise InputError(
            f"--run {name}: its model gives {', '.join(output)}; only detectors, which give instances, can be compared."
        )


class VOCMetric(VocEvaluator):
    """Computes the metric of Pascal VOC under a name that does not clash with COCO's."""

    def evaluate(self) -> dict[str, Any]:
        return {"voc": super().evaluate()["bbox"]}


def evaluate(
    runs: list[Run], dataset: str, records: list[dict], threshold: float | None = None, *, by_size: bool = False
) -> list[dict[str, float]]:
    """Measures the COCO AP of boxes and masks (over all classes and per class), F1, and what suits the data set.

    That is the VOC AP for VOC data sets, and the mean IoU of panoptic models for panoptic data sets.

    Args:
        runs: The detectors.
        dataset: Name of the test set.
        records: Detectron2's dicts of its images.
        threshold: Lowest score of the boxes that F1 counts; None chooses the score that gives the best F1.
        by_size: Whether to measure the AP of small, medium and large objects, too.
    """
    with tempfile.TemporaryDirectory() as folder:
        coco_name = coco_version(dataset, folder)
        return [evaluate_run(run, dataset, coco_name, records, threshold, by_size=by_size) for run in runs]


def evaluate_run(
    run: Run, dataset: str, coco_name: str, records: list[dict], threshold: float | None, *, by_size: bool
) -> dict[str, float]:
    """Measures one run; see :func:`evaluate`.

    Args:
        coco_name: Name under which COCOEvaluator finds the test set.
    """
    tasks = choose_tasks(run, records)
    evaluators = [coco_evaluator(coco_name, tasks), F1Metric(run.name, dataset, records, threshold)]
    kind = MetadataCatalog.get(dataset).evaluator_type
    if kind == "pascal_voc":
        evaluators.append(VOCMetric(dataset))
    if "sem_seg" in segmentation_tasks(run.cfg, kind):
        evaluators.append(SegmentationEvaluator(dataset, distributed=False))
    results = run.evaluate(dataset, DatasetEvaluators(evaluators))
    f1, segments = results.pop("f1"), results.pop("sem_seg", {})
    metrics = read_ap(results, tasks, records)
    for task in tasks:
        if by_size:  # NaN means that the test set has no objects of this size, or that nothing is found.
            metrics |= {f"{task} {key}": float(results[task][key]) for key in BY_SIZE}
        metrics |= {f"{task} {key}": value for key, value in results[task].items() if key.startswith("AP-")}
    metrics |= {f"sem_seg {key}": value for key, value in segments.items() if key == "mIoU"}
    return metrics | f1


def choose_tasks(run: Run, records: Sequence[dict]) -> tuple[str, ...]:
    """Returns the tasks of COCO's evaluation that a detector and the labels of some images allow."""
    annotations = (annotation for record in records for annotation in record["annotations"])
    masks = run.cfg.MODEL.MASK_ON and all("segmentation" in each or each.get("iscrowd", 0) for each in annotations)
    return ("bbox", "segm") if masks else ("bbox",)


def coco_evaluator(coco_name: str, tasks: tuple[str, ...]) -> CocoEvaluator:
    """Builds the evaluator of COCO's metrics for a data set under the name that :func:`coco_version` returns."""
    return CocoEvaluator(coco_name, masks="segm" in tasks, tasks=tasks, distributed=False)


def read_ap(results: Mapping[str, Any], tasks: tuple[str, ...], records: Sequence[dict]) -> dict[str, float]:
    """Reads AP, AP50 and AP75 of each task from the results of an evaluation.

    Args:
        results: Maps tasks to their metrics.
        tasks: The tasks of COCO's evaluation; the results may have others, too.
        records: Detectron2's dicts of the images.
    """
    keys = ("AP", "AP50", "AP75")
    metrics = {f"{task} {key}": float(values[key]) for task, values in results.items() for key in keys}
    if any(not annotation.get("iscrowd", 0) for record in records for annotation in record["annotations"]):
        # For a detector that finds nothing, COCOEvaluator gives NaN instead of 0.
        metrics |= {key: 0.0 for key, value in metrics.items() if key.startswith(tasks) and math.isnan(value)}
    return metrics


def coco_version(dataset: str, folder: str) -> str:
    """Returns a name under which COCOEvaluator finds a data set; converts it into `folder` if it has no COCO file."""
    metadata = MetadataCatalog.get(dataset)
    if "json_file" in metadata.as_dict():
        return dataset
    path = os.path.join(folder, "coco.json")
    convert_to_coco_json(dataset, path, allow_cached=False)
    # The ids of the classes in the new file are those of the data set's metadata.
    known = {key: value for key, value in metadata.as_dict().items() if key.startswith("thing_")}
    MetadataCatalog.get(path).set(json_file=path, **known)
    return path


def draw(
    images: list[dict],
    dataset: str,
    predictions: Mapping[str, Sequence[Instances]],
    metrics: Mapping[str, Sequence[dict[str, float]]],
    path: str,
) -> None:
    """Writes a picture with the instances that each run finds in the same images, at the score threshold of its F1.

    Args:
        images: Detectron2's dicts of the images.
        dataset: Name of the test set.
        predictions: Maps a name to the instances that its first run finds in each image.
        metrics: Maps a name to the metrics of each of its runs, as :func:`evaluate` returns them.
        path: Path of the file.
    """
    save(draw_detections(images, class_names(dataset), predictions, choose(metrics)), path)


def make_gallery(
    images: list[dict],
    dataset: str,
    predictions: Mapping[str, Sequence[Instances]],
    metrics: Mapping[str, Sequence[dict[str, float]]],
) -> Gallery:
    """Collects the instances that each run finds in the same images for a report; see :func:`draw`."""
    return detection_gallery(images, dataset, predictions, choose(metrics))


def choose(metrics: Mapping[str, Sequence[dict[str, float]]]) -> dict[str, Choice]:
    """Chooses the instances above the score threshold of F1, for the first run of each name.

    Args:
        metrics: Maps a name to the metrics of each of its runs, as :func:`evaluate` returns them.
    """
    choices = {}
    for name, (first, *others) in metrics.items():
        note = f", AP {first['bbox AP']:.2f}" + (f", run 1 of {1 + len(others)}" if others else "")
        choices[name] = Choice(OperatingPoint(first["score threshold"], first["F1"] / 100), note)
    return choices
