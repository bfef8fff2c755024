"""Mixes data sets in fixed shares: every batch has the same number of images of each, up to rounding."""

import itertools
import math
from collections.abc import Iterator, Sequence
from fractions import Fraction

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch.utils.data import Sampler

from kd_det.config_kinds import show
from kd_det.errors import InputError

# Shares are rounded to fractions with denominators up to this.
FINEST = 10**6


class MixedSampler(Sampler[int]):
    """Yields this process's endless indices of images of several data sets, of each in its share.

    The images of all processes together form one sequence, in which each data set keeps up with its share at any
    length; of two data sets, the number of images differs from it by less than one. Each process takes its part of each
    batch. If the shares of a batch are whole numbers, each batch has just these; otherwise they alternate. Each data
    set is shuffled on its own and begins anew when all of its images have been drawn.

    Args:
        counts: Number of images of each data set; the indices of the first come first.
        shares: Share of each data set, relative to their sum.
        batch_size: Number of images per batch and process.
        seed: Seed of the order, equal in all processes.
    """

    def __init__(self, counts: Sequence[int], shares: Sequence[float], batch_size: int, seed: int):
        self.counts = list(counts)
        self.weights = whole_numbers(shares)
        self.batch_size = batch_size
        self.seed = seed

    def __iter__(self) -> Iterator[int]:
        rank, whole = comm.get_rank(), self.batch_size * comm.get_world_size()
        images = [self._shuffle(i) for i in range(len(self.counts))]
        for place, dataset in enumerate(take_turns(self.weights)):
            index = next(images[dataset])
            if place % whole // self.batch_size == rank:
                yield index

    def _shuffle(self, dataset: int) -> Iterator[int]:
        """Yields the indices of a data set, endlessly, in a new order each time."""
        first, count = sum(self.counts[:dataset]), self.counts[dataset]
        seed = int(np.random.SeedSequence((self.seed, dataset)).generate_state(1, np.uint64)[0])
        generator = torch.Generator().manual_seed(seed % 2**63)
        while True:
            yield from (first + torch.randperm(count, generator=generator)).tolist()


def take_turns(weights: Sequence[int]) -> Iterator[int]:
    """Yields, endlessly, the index that lags most behind its weight's share of the sequence so far.

    Example:
        >>> list(itertools.islice(take_turns([1, 3]), 8))
        [1, 0, 1, 1, 1, 0, 1, 1]
    """
    total, drawn = sum(weights), [0] * len(weights)
    for length in itertools.count(1):
        lags = [weight * length - total * count for weight, count in zip(weights, drawn, strict=True)]
        index = lags.index(max(lags))
        drawn[index] += 1
        yield index


def whole_numbers(shares: Sequence[float]) -> list[int]:
    """Returns whole numbers in the same proportion."""
    fractions = [Fraction(share).limit_denominator(FINEST) for share in shares]
    unit = math.lcm(*(fraction.denominator for fraction in fractions))
    return [int(fraction * unit) for fraction in fractions]


def read_shares(cfg: CfgNode) -> list[float] | None:
    """Returns the share of each data set of DATASETS.TRAIN; None if DATASETS.MIX names none.

    Raises:
        InputError: If DATASETS.MIX names another data set, lacks one, or its values are no shares.
    """
    mix, names = dict(cfg.DATASETS.MIX), list(cfg.DATASETS.TRAIN)
    if not mix:
        return None
    unknown = [name for name in mix if name not in names]
    if unknown:
        raise InputError(f"DATASETS.MIX: {unknown[0]!r} is not in DATASETS.TRAIN, which names {', '.join(names)}.")
    lacking = [name for name in names if name not in mix]
    if lacking:
        raise InputError(f"DATASETS.MIX: has no share for {', '.join(lacking)} of DATASETS.TRAIN.")
    for name, share in mix.items():
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= FINEST:
            raise InputError(f"DATASETS.MIX.{name}: must be a number from 0 to {FINEST}, got {show(share)}.")
    if not any(whole_numbers(list(mix.values()))):
        raise InputError(f"DATASETS.MIX: the shares must have a sum above 0, got {show(mix)}.")
    return [float(mix[name]) for name in names]
