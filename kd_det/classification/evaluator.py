"""Computes the accuracy of image classifiers."""

import logging

import detectron2.utils.comm as comm
import torch
from detectron2.evaluation import DatasetEvaluator

from kd_det.data import class_names

# Largest number of classes for which each class gets its own result.
MAX_LISTED = 100


class ClassificationEvaluator(DatasetEvaluator):
    """Computes top-1 and top-5 accuracy in percent, exactly over all processes.

    Args:
        dataset_name: Name of the data set, which gives the class names; the labels come from the inputs.
    """

    def __init__(self, dataset_name: str):
        self._dataset_name = dataset_name
        self._logger = logging.getLogger(__name__)
        self.reset()

    def reset(self) -> None:
        # (K, 3): for each class, the number of its images, and of those whose label is in the top 1 and the top 5.
        self._counts: torch.Tensor | None = None

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Counts the hits of a batch.

        Args:
            inputs: Dicts with `label`.
            outputs: Dicts with `scores` (K,) of any scale; only their order matters.
        """
        scores = torch.stack([output["scores"] for output in outputs])
        num_classes = scores.shape[1]
        labels = torch.tensor([x["label"] for x in inputs])
        hits = scores.topk(min(5, num_classes)).indices.cpu() == labels[:, None]
        columns = torch.stack([torch.ones_like(labels, dtype=torch.bool), hits[:, 0], hits.any(dim=1)], dim=1)
        counts = torch.zeros(num_classes, 3, dtype=torch.int64).index_add_(0, labels, columns.long())
        self._counts = counts if self._counts is None else self._counts + counts

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Sums the counts of all processes.

        Returns:
            In the main process, a dict that maps ``classification`` to `top1`, `top5` (with more than 5 classes),
            `error` (100 - `top1`) and, with at most 100 classes, `top1-NAME` of each class that has images. In other
            processes, {}.
        """
        parts = [part for part in comm.gather(self._counts) if part is not None]
        if not comm.is_main_process():
            return {}
        if not parts:
            self._logger.warning("%s: no predictions were given to the evaluator.", self._dataset_name)
            return {}
        counts = torch.stack(parts).sum(dim=0)
        images, top1, top5 = counts.sum(dim=0).tolist()
        results = {"top1": 100 * top1 / images}
        if len(counts) > 5:
            results["top5"] = 100 * top5 / images
        results["error"] = 100 - results["top1"]
        if len(counts) <= MAX_LISTED:
            names = dict(enumerate(class_names(self._dataset_name)))
            for index, (count, hits, _) in enumerate(counts.tolist()):
                if count:
                    results[f"top1-{names.get(index, index)}"] = 100 * hits / count
        return {"classification": results}
