"""Builds the data loaders of image classifiers."""

from collections.abc import Iterator
from numbers import Integral
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetFromList, MapDataset
from detectron2.data.samplers import InferenceSampler
from detectron2.utils import comm
from torch.utils.data import DataLoader, default_collate

from kd_det.classification.image_mapper import ClassificationMapper
from kd_det.data.datasets import draw_share
from kd_det.data.loader import SeededDataset, build_training_loader, feeds_gpu, sampler_factory
from kd_det.data.workers import ignore_signals
from kd_det.errors import InputError


class SplitBatches:
    """Turns a loader's batches of a few large tensors into lists of dicts, which Detectron2's models expect.

    A worker hands over each tensor separately, so that one tensor per batch costs far less than one per image. The
    images in the dicts are views, which :func:`kd_det.classification.image_classifier.stack` joins without a copy.

    Args:
        loader: Yields dicts of `image` (N, 3, H, W), `label` (N,) and `file_name`, a list of N names.
    """

    def __init__(self, loader: DataLoader):
        self.loader = loader

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        for batch in self.loader:
            columns = batch["image"].unbind(), batch["label"].tolist(), batch["file_name"]
            yield [
                {"image": image, "label": label, "file_name": name} for image, label, name in zip(*columns, strict=True)
            ]

    @property
    def batch_sampler(self) -> Any:
        return self.loader.batch_sampler

    def __len__(self) -> int:
        return len(self.loader)


def build_classification_train_loader(cfg: CfgNode) -> SplitBatches:
    """Builds a loader of endless shuffled batches of all data sets of DATASETS.TRAIN.

    SOLVER.IMS_PER_BATCH is the number of images per iteration in all processes together.

    Raises:
        InputError: If a data set or a key is wrong.
    """
    if cfg.DATALOADER.SAMPLER_TRAIN != "TrainingSampler":
        raise InputError(
            f"DATALOADER.SAMPLER_TRAIN: got {cfg.DATALOADER.SAMPLER_TRAIN!r}; image classifiers have TrainingSampler."
        )
    if not cfg.DATASETS.TRAIN:
        raise InputError("DATASETS.TRAIN: no data set is named.")
    if cfg.DATASETS.MIX:
        raise InputError(f"DATASETS.MIX: must be empty for image classifiers, got {dict(cfg.DATASETS.MIX)}.")
    records = draw_share(cfg, [record for name in cfg.DATASETS.TRAIN for record in _load(cfg, name)])
    dataset = SeededDataset(records, ClassificationMapper(cfg, is_train=True))
    return SplitBatches(build_training_loader(cfg, dataset, sampler_factory(cfg, records), collate_fn=default_collate))


def build_classification_test_loader(cfg: CfgNode, dataset_name: str) -> SplitBatches:
    """Builds a loader of all images of a data set in their order.

    Its batches are as large as in training; the last one may be smaller.

    Raises:
        InputError: If the data set or a key is wrong.
    """
    records = DatasetFromList(_load(cfg, dataset_name), copy=False)
    dataset = MapDataset(records, ClassificationMapper(cfg, is_train=False))
    batch_size = max(1, cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size())
    sampler = InferenceSampler(len(dataset))
    return SplitBatches(
        DataLoader(
            dataset,
            sampler=sampler,
            batch_size=batch_size,
            num_workers=cfg.DATALOADER.NUM_WORKERS,
            worker_init_fn=ignore_signals,
            pin_memory=feeds_gpu(cfg),
        )
    )


def _load(cfg: CfgNode, name: str) -> list[dict[str, Any]]:
    """Loads the dicts of a data set and checks every label."""
    records = DatasetCatalog.get(name)
    if not records:
        raise InputError(f"data set {name!r} has no images.")
    num_classes = cfg.MODEL.CLASSIFIER.NUM_CLASSES
    for i, record in enumerate(records):
        if "file_name" not in record or "label" not in record:
            raise InputError(f"data set {name!r}: dict {i} has {', '.join(record)}; file_name and label are needed.")
        label = record["label"]
        if not isinstance(label, Integral) or not 0 <= int(label) < num_classes:
            raise InputError(
                f"{record['file_name']}: got label {label!r} in data set {name!r}; MODEL.CLASSIFIER.NUM_CLASSES "
                f"allows whole numbers from 0 to {num_classes - 1}."
            )
    return records
