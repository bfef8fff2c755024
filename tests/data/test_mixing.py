"""Tests the shares of data sets in batches."""

import itertools
from collections import Counter

import pytest
from detectron2.config import CfgNode

from kd_det import InputError
from kd_det.data import mixing
from kd_det.data.loader import TrainingBatches
from kd_det.data.mixing import MixedSampler, read_shares, take_turns, whole_numbers


def take(count, *, counts=(5, 7), shares=(1, 3), batch_size=4, seed=0):
    return list(itertools.islice(MixedSampler(counts, shares, batch_size, seed), count))


@pytest.fixture
def as_rank(monkeypatch):
    """Makes this process one of several."""

    def become(rank, processes):
        monkeypatch.setattr(mixing.comm, "get_rank", lambda: rank)
        monkeypatch.setattr(mixing.comm, "get_world_size", lambda: processes)

    return become


def test_each_batch_has_the_shares():
    indices = take(400)
    for start in range(0, 400, 4):
        assert sum(index < 5 for index in indices[start : start + 4]) == 1
    # Each data set is drawn evenly: 100 images of five, 300 of seven.
    drawn = Counter(indices)
    assert {drawn[i] for i in range(5)} == {20}
    assert {drawn[i] for i in range(5, 12)} <= {42, 43}


@pytest.mark.parametrize("shares", [(1, 2), (0.3, 0.2, 0.5), (1, 1, 1), (0, 1), (5, 0.01)])
def test_shares_that_no_batch_can_have(shares):
    """At any length the number of images of each of these data sets is off by less than one."""
    drawn = [0] * len(shares)
    for length, index in enumerate(itertools.islice(take_turns(whole_numbers(shares)), 1000), 1):
        drawn[index] += 1
        for count, share in zip(drawn, shares, strict=True):
            assert abs(count - length * share / sum(shares)) < 1
    assert [count == 0 for count in drawn] == [share == 0 for share in shares]


def test_order_depends_on_the_seed_alone():
    assert take(60, seed=3) == take(60, seed=3)
    assert take(60, seed=3) != take(60, seed=4)
    first = [index for index in take(60) if index < 5]
    assert first[:5] != first[5:10]
    assert sorted(first[:5]) == sorted(first[5:10]) == list(range(5))


def test_processes_share_what_one_process_draws(as_rank):
    whole = take(80, batch_size=8)
    parts = []
    for rank in (0, 1):
        as_rank(rank, 2)
        parts.append(take(40, batch_size=4))
    for start in range(0, 40, 4):
        together = parts[0][start : start + 4] + parts[1][start : start + 4]
        assert together == whole[2 * start : 2 * start + 8]
        assert [sum(index < 5 for index in part[start : start + 4]) for part in parts] == [1, 1]


def test_a_resumed_run_goes_on_with_the_same_batches():
    batches = [TrainingBatches(lambda seed: MixedSampler((5, 7), (1, 2), 4, seed), 4) for _ in range(2)]
    batches[1].start = 13
    assert list(itertools.islice(batches[0], 13, 20)) == list(itertools.islice(batches[1], 7))


def config(cfg, mix):
    cfg.DATASETS.TRAIN, cfg.DATASETS.MIX = ("a", "b"), CfgNode(mix)
    return cfg


def test_shares_of_a_config(cfg):
    assert read_shares(config(cfg, {})) is None
    assert read_shares(config(cfg, {"b": 3, "a": 0.5})) == [0.5, 3.0]


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        ({"a": 1, "c": 1}, "DATASETS.MIX: 'c' is not in DATASETS.TRAIN, which names a, b"),
        ({"a": 1}, "DATASETS.MIX: has no share for b of DATASETS.TRAIN"),
        ({"a": 0, "b": 0.0}, "DATASETS.MIX: the shares must have a sum above 0, got {'a': 0, 'b': 0.0}"),
        ({"a": 1e-9, "b": 0}, "DATASETS.MIX: the shares must have a sum above 0"),
        ({"a": -1, "b": 1}, "DATASETS.MIX.a: must be a number from 0 to 1000000, got -1"),
        ({"a": 1, "b": "2"}, "DATASETS.MIX.b: must be a number from 0 to 1000000, got '2'"),
        ({"a": True, "b": 1}, "DATASETS.MIX.a: must be a number"),
        ({"a": float("nan"), "b": 1}, "DATASETS.MIX.a: must be a number"),
    ],
)
def test_wrong_shares(cfg, mix, message):
    with pytest.raises(InputError, match=f"^{message}"):
        read_shares(config(cfg, mix))
