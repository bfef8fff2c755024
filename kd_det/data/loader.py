"""Makes training batches that a resumed run repeats: the same images in the same order, with the same augmentation."""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList
from detectron2.data.samplers import RandomSubsetTrainingSampler, RepeatFactorTrainingSampler, TrainingSampler
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from kd_det.config import student_config
from kd_det.data.datasets import load_training_images
from kd_det.data.mapper import DetectionMapper
from kd_det.data.mixing import MixedSampler, read_shares
from kd_det.data.proposals import proposal_files
from kd_det.data.workers import ignore_signals
from kd_det.errors import InputError

# Meta-architectures that are trained on semantic segmentations.
SEGMENTING = ("PanopticFPN", "SemanticSegmentor")
IndexAndSeed = tuple[int, tuple[int, int]]


def seed_everything(*key: int, cuda: bool = True) -> None:
    """Seeds the random generators of Python, numpy and torch from several numbers.

    Args:
        key: Numbers that are 0 or more, such as the run's seed, the iteration and the rank; each of them matters.
        cuda: Whether to seed the generators of the GPUs, too.
    """
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
    random.seed(seed)
    np.random.seed(seed % 2**32)
    (torch.manual_seed if cuda else torch.default_generator.manual_seed)(seed % 2**63)


@contextmanager
def own_random_numbers(*key: int) -> Iterator[None]:
    """Seeds all random generators of the CPU for the body, and restores their states afterwards."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed_everything(*key, cuda=False)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class SeededDataset(Dataset):
    """Maps an index and a seed to an example; the same seed always gives the same random numbers, in any process.

    Args:
        records: The dicts of the data set.
        mapper: Turns a dict into an example.
    """

    def __init__(self, records: Sequence[dict[str, Any]], mapper: Callable[[dict[str, Any]], dict[str, Any]]):
        self.records = DatasetFromList(records, copy=False)
        self.mapper = mapper

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, item: tuple[int, tuple[int, ...]]) -> dict[str, Any]:
        index, seed = item
        if get_worker_info() is not None:  # Nothing else in a worker draws random numbers.
            seed_everything(*seed, cuda=False)
            return self.mapper(self.records[index])
        with own_random_numbers(*seed):
            return self.mapper(self.records[index])


class TrainingBatches(Sampler[list[IndexAndSeed]]):
    """Yields this process's endless batches of a :class:`SeededDataset`, which depend only on the seed.

    Attributes:
        seed: Seed of the order and of the examples, equal in all processes.
        start: Number of iterations to skip at the beginning, as if their batches had been used.

    Args:
        make_sampler: Maps a seed to a sampler of the indices for this process.
        batch_size: Number of images per batch and process.
        groups: Group of each index; a batch holds images of one group. None puts all images into one group.
    """

    def __init__(self, make_sampler: Callable[[int], Sampler], batch_size: int, groups: Sequence[int] | None = None):
        self.make_sampler = make_sampler
        self.batch_size = batch_size
        self.groups = groups
        self.seed = 0
        self.start = 0

    def __iter__(self) -> Iterator[list[IndexAndSeed]]:
        return itertools.islice(self._batches(), self.start, None)

    def _batches(self) -> Iterator[list[IndexAndSeed]]:
        rank, processes = comm.get_rank(), comm.get_world_size()
        waiting: dict[int, list[IndexAndSeed]] = {}
        for turn, index in enumerate(self.make_sampler(self.seed)):
            batch = waiting.setdefault(self.groups[index] if self.groups else 0, [])
            batch.append((index, (self.seed, turn * processes + rank)))
            if len(batch) == self.batch_size:
                yield batch.copy()
                batch.clear()


def build_training_loader(
    cfg: CfgNode,
    dataset: SeededDataset,
    make_sampler: Callable[[int], Sampler],
    *,
    groups: Sequence[int] | None = None,
    collate_fn: Callable[[list], Any] = list,
) -> DataLoader:
    """Builds a loader with :class:`TrainingBatches` as its ``batch_sampler``.

    Raises:
        InputError: If SOLVER.IMS_PER_BATCH does not split evenly over the processes.
    """
    processes, images = comm.get_world_size(), cfg.SOLVER.IMS_PER_BATCH
    if images < 1 or images % processes:
        raise InputError(f"SOLVER.IMS_PER_BATCH: got {images}; a multiple of the {processes} process(es) is needed.")
    batches = TrainingBatches(make_sampler, images // processes, groups)
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        collate_fn=collate_fn,
        worker_init_fn=ignore_signals,
        pin_memory=feeds_gpu(cfg),
        # The loader has its own generator: it draws a number when it starts, which a resumed run does at another
        # iteration.
        generator=torch.Generator(),
    )


def feeds_gpu(cfg: CfgNode) -> bool:
    """Returns whether batches go to a GPU, which copies them faster from pinned memory."""
    return torch.device(cfg.MODEL.DEVICE).type == "cuda" and torch.cuda.is_available()


def build_detection_training_loader(cfg: CfgNode) -> DataLoader:
    """Builds a loader of endless batches of DATASETS.TRAIN, like Detectron2's, but for runs that can be resumed.

    Raises:
        InputError: If there is no image, the sampler is unknown or the batch does not split evenly.
    """
    shares = read_shares(cfg)
    with proposal_files(cfg, "TRAIN", cfg.DATASETS.TRAIN) as files:
        parts = [load_training_images(cfg, proposal_files=files)] if shares is None else load_each(cfg, files)
    records = [record for part in parts for record in part]
    check_segments(cfg, records)
    grouped = cfg.DATALOADER.ASPECT_RATIO_GROUPING and shares is None
    groups = [int(x["width"] > x["height"]) for x in records] if grouped else None
    dataset = SeededDataset(records, DetectionMapper(cfg, is_train=True))
    make_sampler = sampler_factory(cfg, records) if shares is None else mixer_factory(cfg, parts, shares)
    return build_training_loader(cfg, dataset, make_sampler, groups=groups)


def load_each(cfg: CfgNode, files: Sequence[str] | None) -> list[list[dict[str, Any]]]:
    """Loads the images of each data set of DATASETS.TRAIN; see :func:`load_training_images`.

    Args:
        cfg: The run's config.
        files: A file of proposals for each data set, or None.
    """
    parts = []
    for i, name in enumerate(cfg.DATASETS.TRAIN):
        part = cfg.clone()
        part.defrost()
        part.DATASETS.TRAIN = (name,)
        parts.append(load_training_images(part, proposal_files=files and [files[i]]))
    return parts


def mixer_factory(
    cfg: CfgNode, parts: Sequence[Sequence[dict[str, Any]]], shares: Sequence[float]
) -> Callable[[int], Sampler]:
    """Returns a function that maps a seed to the sampler for DATASETS.MIX.

    Args:
        cfg: The run's config.
        parts: The images of each data set.
        shares: The share of each data set.

    Raises:
        InputError: If another sampler is asked for.
    """
    sampler = cfg.DATALOADER.SAMPLER_TRAIN
    if sampler != "TrainingSampler":
        raise InputError(f"DATALOADER.SAMPLER_TRAIN: must be TrainingSampler with DATASETS.MIX, got {sampler!r}.")
    counts, images = [len(part) for part in parts], cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size()
    return lambda seed: MixedSampler(counts, shares, images, seed)


def check_segments(cfg: CfgNode, records: Sequence[dict[str, Any]]) -> None:
    """Checks that all images have semantic segmentations if the model learns from them.

    Raises:
        InputError: If an image has none.
    """
    architecture = student_config(cfg).MODEL.META_ARCHITECTURE
    if architecture not in SEGMENTING:
        return
    for record in records:
        if "sem_seg_file_name" not in record:
            raise InputError(
                f"DATASETS.TRAIN: {architecture} learns from semantic segmentations, which {record['file_name']} lacks "
                "(sem_seg_file_name); Detectron2's coco_2017_train_panoptic_separated has them."
            )


def sampler_factory(cfg: CfgNode, records: Sequence[dict[str, Any]]) -> Callable[[int], Sampler]:
    """Returns a function that maps a seed to the sampler that ``DATALOADER.SAMPLER_TRAIN`` names.

    Raises:
        InputError: If there is no such sampler.
    """
    node = cfg.DATALOADER
    if node.SAMPLER_TRAIN == "TrainingSampler":
        return lambda seed: TrainingSampler(len(records), seed=seed)
    if node.SAMPLER_TRAIN == "RepeatFactorTrainingSampler":
        repeats = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            records, node.REPEAT_THRESHOLD, sqrt=node.REPEAT_SQRT
        )
        return lambda seed: RepeatFactorTrainingSampler(repeats, seed=seed)
    if node.SAMPLER_TRAIN == "RandomSubsetTrainingSampler" and "RANDOM_SUBSET_RATIO" in node:
        ratio = node.RANDOM_SUBSET_RATIO
        return lambda seed: RandomSubsetTrainingSampler(len(records), ratio, seed_shuffle=seed, seed_subset=seed)
    # Older versions of Detectron2 lack the last sampler's key.
    last = ["RandomSubsetTrainingSampler"] if "RANDOM_SUBSET_RATIO" in node else []
    allowed = ", ".join(["TrainingSampler", "RepeatFactorTrainingSampler", *last])
    raise InputError(f"DATALOADER.SAMPLER_TRAIN: got {node.SAMPLER_TRAIN!r}; allowed are {allowed}.")
