"""Maps the dicts of a data set to the inputs of an image classifier."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from torch import Tensor

from kd_det.classification.transforms import build_transform
from kd_det.data.images import read_image
from kd_det.errors import InputError


class ClassificationMapper:
    """Reads and transforms an image; all random numbers come from torch.

    Args:
        is_train: Whether the image is used in training, as in Detectron2's mappers.
        transform: Maps a uint8 RGB image (3, H, W) to one of the size that the model takes.
        image_format: Channel order that the model takes, RGB or BGR.
    """

    @configurable
    def __init__(self, is_train: bool, *, transform: Callable[[Tensor], Tensor], image_format: str):
        if image_format not in ("RGB", "BGR"):
            raise InputError(f"INPUT.FORMAT: got {image_format!r}; of image classifiers allowed are RGB, BGR.")
        self.is_train = is_train
        self.transform = transform
        self.image_format = image_format

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        return {
            "is_train": is_train,
            "transform": build_transform(cfg, is_train),
            "image_format": cfg.INPUT.FORMAT,
        }

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """Reads and transforms one image and orders its channels.

        Args:
            dataset_dict: A dict with `file_name`, `label` and, if the image is not in that file, `image` (H, W, 3),
                uint8 RGB.

        Returns:
            A dict with `image` (3, SIZE, SIZE) uint8, `label` and `file_name`.

        Raises:
            InputError: If the file is not an image that can be read.
        """
        image = dataset_dict.get("image")
        if image is None:
            image = read_image(dataset_dict["file_name"], "RGB")
        image = self.transform(torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1))
        if self.image_format == "BGR":
            image = image.flip(0)
        return {
            "image": image.contiguous(),
            "label": int(dataset_dict["label"]),
            "file_name": dataset_dict["file_name"],
        }
