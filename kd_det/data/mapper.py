"""Extends Detectron2's mapper with errors that name the file at fault."""

import os
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data import detection_utils as utils

from kd_det.data.images import EIGHT_BITS, read_image
from kd_det.errors import InputError


class DetectionMapper(DatasetMapper):
    """Extends the stock mapper with errors that name the image, and with support for images without objects.

    An image without annotations gets empty instances, even with cropping, where the stock mapper fails. Where
    annotations have a `score`, the instances have ``gt_scores`` (N,).

    Raises:
        InputError: When called, if the image cannot be read, if its size differs from that in its annotation, or if
            masks are needed and an annotation has none. If it is raised in a worker of a data loader, its message has
            the traceback as text.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        if not is_train and cfg.MODEL.KEYPOINT_ON:
            # The stock mapper would look up the keypoints of the training data.
            cfg = cfg.clone()
            cfg.defrost()
            cfg.MODEL.KEYPOINT_ON = False
        return super().from_config(cfg, is_train)

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        file_name = dataset_dict["file_name"]
        try:
            record = super().__call__(dataset_dict | {"file_name": EIGHT_BITS + os.fspath(file_name)})
        except (utils.SizeMismatchError, InputError) as error:  # These errors already name the file and its fault.
            raise InputError(str(error).replace(EIGHT_BITS, "")) from error
        except Exception:
            # Read the file again to find out whether it is at fault.
            read_image(file_name, self.image_format)
            raise
        return record | {"file_name": file_name}

    def _transform_annotations(
        self, dataset_dict: dict[str, Any], transforms: Any, image_shape: tuple[int, int]
    ) -> None:
        things = _trained_on(dataset_dict)
        if self.use_instance_mask:
            check_masks(dataset_dict)
        if any("score" in annotation for annotation in things):
            self._transform_scored(dataset_dict, transforms, image_shape)
        elif things:
            super()._transform_annotations(dataset_dict, transforms, image_shape)
        else:
            dataset_dict.pop("annotations")
            dataset_dict["instances"] = utils.annotations_to_instances([], image_shape)

    def _transform_scored(self, dataset_dict: dict[str, Any], transforms: Any, image_shape: tuple[int, int]) -> None:
        """Transforms annotations whose scores become ``gt_scores`` of the instances; those without a score have 1."""
        things = _trained_on(dataset_dict)
        classes = torch.tensor([annotation["category_id"] for annotation in things])
        scores = torch.tensor([float(annotation.get("score", 1.0)) for annotation in things])
        # The stock method drops objects that cropping leaves nothing of; their places stand in for classes meanwhile.
        for place, annotation in enumerate(things):
            annotation["category_id"] = place
        super()._transform_annotations(dataset_dict, transforms, image_shape)
        instances = dataset_dict["instances"]
        places = instances.gt_classes
        instances.gt_classes, instances.gt_scores = classes[places], scores[places]


def check_masks(record: dict[str, Any]) -> None:
    """Checks that all objects of an image that are trained on have a mask.

    Raises:
        InputError: If one has none.
    """
    if not all("segmentation" in annotation for annotation in _trained_on(record)):
        raise InputError(f"{record['file_name']}: an annotation has no segmentation, but MODEL.MASK_ON asks for masks.")


def _trained_on(record: dict[str, Any]) -> list[dict[str, Any]]:
    return [annotation for annotation in record.get("annotations", ()) if not annotation.get("iscrowd", 0)]
