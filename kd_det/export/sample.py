"""Reads the image that a student is traced on."""

import os

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from torch import Tensor

from kd_det.data import check_files, register_datasets
from kd_det.engine import build_test_mapper
from kd_det.errors import InputError


def read_sample(cfg: CfgNode, image: str | None, size: list[int] | None) -> Tensor:
    """Makes an image as the model expects it: noise, a file, or the first image of DATASETS.TEST.

    Args:
        cfg: Config of the student alone.
        image: File of the image, unless `size` is given.
        size: Height and width of noise.

    Raises:
        InputError: If there is no such image, or a side is below 1.
    """
    if size:
        if min(size) < 1:
            raise InputError(f"--size: both must be above 0, got {size[0]} and {size[1]}.")
        return torch.rand(3, *size, generator=torch.Generator().manual_seed(0)) * 255
    if image and not os.path.isfile(image):
        raise InputError(f"--image: there is no file {image}.")
    if image:
        record = {"file_name": image, "label": 0}
    else:
        try:
            register_datasets(cfg)
            check_files(cfg, train=False)
            records = [record for name in cfg.DATASETS.TEST for record in DatasetCatalog.get(name)]
        except InputError as error:
            raise InputError(f"--image: none is given, and DATASETS.TEST has none: {error}") from error
        if not records:
            raise InputError(f"--image: none is given, and DATASETS.TEST, {list(cfg.DATASETS.TEST)}, has none.")
        record = records[0]
    return build_test_mapper(cfg)(record)["image"].float()
