"""Computes COCO's metrics for any data set with COCO annotations."""

from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from detectron2.data import DatasetCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Instances
from pycocotools.cocoeval import COCOeval

from kd_det.data.coco_file import complete
from kd_det.data.coco_format import CocoFormat


class CocoEvaluator(COCOEvaluator):
    """Extends Detectron2's evaluator to models with more classes than the data set, and to incomplete annotations.

    Predictions of classes that the data set does not have are left out. If several classes share a name, each still has
    its own AP. When masks are evaluated, objects without a mask in a data set of DATASETS.COCO_FORMAT count as crowds:
    they are neither hits nor misses.

    Args:
        dataset_name: Name of a data set that has already been loaded.
        masks: Whether masks are evaluated.
        options: Further arguments of Detectron2's evaluator.
    """

    def __init__(self, dataset_name: str, *, masks: bool, **options: Any):
        dataset = DatasetCatalog.data.get(dataset_name)
        is_coco_format = isinstance(dataset, CocoFormat)
        with dataset.for_evaluation() if is_coco_format else nullcontext(dataset_name) as name:
            super().__init__(name, **options)
        if self._do_evaluation and complete(self._coco_api.dataset["annotations"]):
            self._coco_api.createIndex()
        if is_coco_format and masks:
            for annotation in self._coco_api.anns.values():
                if not annotation.get("segmentation"):
                    x, y, width, height = annotation["bbox"]
                    corners = [x, y, x + width, y, x + width, y + height, x, y + height]
                    annotation |= {"iscrowd": 1, "segmentation": [corners]}

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        super().process(inputs, [self._leave_out_unknown(output) for output in outputs])

    def _derive_coco_results(
        self, coco_eval: COCOeval | None, iou_type: str, class_names: Sequence[str] | None = None
    ) -> dict[str, float]:
        return super()._derive_coco_results(coco_eval, iou_type, class_names and distinct(class_names))

    def _leave_out_unknown(self, output: dict[str, Any]) -> dict[str, Any]:
        if "instances" not in output or "thing_classes" not in self._metadata.as_dict():
            return output
        instances: Instances = output["instances"]
        known = instances.pred_classes < len(self._metadata.thing_classes)
        return output if known.all() else output | {"instances": instances[known]}


def distinct(names: Sequence[str]) -> list[str]:
    """Returns class names; adds the number of the class to a name that several classes share."""
    counts = Counter(names)
    return [name if counts[name] == 1 else f"{name} (class {i})" for i, name in enumerate(names, 1)]
