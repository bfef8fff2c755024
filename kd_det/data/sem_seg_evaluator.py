"""Computes the metrics of semantic segmentation for data sets whose labels are images of class indices."""

from typing import Any

import numpy as np
from detectron2.evaluation import SemSegEvaluator
from detectron2.utils.file_io import PathManager
from PIL import Image

from kd_det.errors import InputError, shorten


class SegmentationEvaluator(SemSegEvaluator):
    """Extends Detectron2's evaluator to NumPy 2, and reports labels that are not classes by the name of their file.

    Args:
        dataset_name: Name of a data set whose metadata has ``stuff_classes`` and ``ignore_label``.
        options: Further arguments of Detectron2's evaluator.
    """

    def __init__(self, dataset_name: str, **options: Any):
        super().__init__(dataset_name, sem_seg_loading_fn=self._load, **options)

    def _load(self, path: str, dtype: type) -> np.ndarray:
        """Reads the labels (H, W) of an image.

        Raises:
            InputError: If one of them is neither a class nor the ignored label.
        """
        with PathManager.open(path, "rb") as file:
            labels: np.ndarray = np.array(Image.open(file), dtype=dtype)
        unknown = np.unique(labels[(labels != self._ignore_label) & ((labels < 0) | (labels >= self._num_classes))])
        if len(unknown):
            raise InputError(
                f"{path}: has the labels {shorten([str(label) for label in unknown], 8)}; allowed are 0 to "
                f"{self._num_classes - 1}, and {self._ignore_label} for pixels that are not evaluated."
            )
        return labels
