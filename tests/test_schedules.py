"""The weight of a head over the iterations."""

import re

import pytest
from detectron2.config import CfgNode

from kd_det import InputError
from kd_det.schedules import WeightSchedule, adapted_weight, build_schedule


def build(max_iter=100, weight=1.0, **changes):
    schedule = {"START": 0, "WARMUP": 0, "STOP": -1, "DECAY": "constant"} | changes
    return build_schedule(CfgNode({"WEIGHT": weight, "SCHEDULE": schedule}), max_iter, key="KD.X")


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (WeightSchedule(2.0), {0: 2, 10**9: 2}),
        (WeightSchedule(start=3), {0: 0, 2: 0, 3: 1, 4: 1}),
        (WeightSchedule(stop=3), {0: 1, 2: 1, 3: 0, 4: 0}),
        (WeightSchedule(4.0, start=2, warmup=3), {1: 0, 2: 1, 3: 2, 4: 3, 5: 4, 6: 4}),  # quarters of 4
        (WeightSchedule(stop=4, decay="linear"), {0: 1, 1: 0.75, 2: 0.5, 3: 0.25, 4: 0}),
        (WeightSchedule(stop=4, decay="cosine"), {0: 1, 2: 0.5, 4: 0}),
        (
            WeightSchedule(2.0, start=1, warmup=1, stop=6, decay="linear"),
            {0: 0, 1: 1, 2: 2, 3: 1.5, 4: 1, 5: 0.5, 6: 0},
        ),
    ],
)
def test_weights_by_hand(schedule, expected):
    assert {i: schedule(i) for i in expected} == pytest.approx(expected)


@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_a_decay_without_stop_ends_with_the_run(decay):
    schedule = build(max_iter=50, DECAY=decay)
    assert schedule.stop == 50
    weights = [schedule(i) for i in range(51)]
    assert weights == sorted(weights, reverse=True)
    assert (weights[0], weights[25], weights[50]) == pytest.approx((1, 0.5, 0))


def test_a_constant_weight_without_stop_never_ends():
    assert build(max_iter=50).stop is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"DECAY": "step"}, "KD.X.SCHEDULE.DECAY: got 'step'; allowed are constant, linear, cosine."),
        ({"START": -1}, "KD.X.SCHEDULE: START and WARMUP must be 0 or more, got START -1, WARMUP 0."),
        ({"WARMUP": -2}, "KD.X.SCHEDULE: START and WARMUP must be 0 or more, got START 0, WARMUP -2."),
        ({"weight": -1.0}, "KD.X.WEIGHT: must be finite and 0 or more, got -1.0."),
        ({"weight": float("nan")}, "KD.X.WEIGHT: must be finite and 0 or more, got nan."),
        ({"weight": float("inf")}, "KD.X.WEIGHT: must be finite and 0 or more, got inf."),
        ({"START": 5, "WARMUP": 5, "STOP": 10}, "KD.X.SCHEDULE.STOP: must lie after START + WARMUP = 10"),
        ({"START": 99, "WARMUP": 1, "DECAY": "linear"}, "KD.X.SCHEDULE: a linear decay needs iterations after START"),
    ],
)
def test_schedules_that_cannot_be(changes, message):
    with pytest.raises(InputError, match=f"^{re.escape(message)}"):
        build(**changes)


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (0.1, 2 * (0.4 / 0.6) / (0.1 / 0.9)),  # below: to the upper edge
        (0.5, 2 * (0.2 / 0.8) / (0.5 / 0.5)),  # above: to the lower edge
        (0.21, 2),
        (0.3, 2),
        (1e-6, 20),  # at most ten times
        (1.0, 0.2),  # at least a tenth
    ],
)
def test_adapted_weights_by_hand(share, expected):
    assert adapted_weight(2.0, share, target=0.3, tolerance=0.1) == pytest.approx(expected)


def test_an_adapted_weight_reaches_its_share():
    task = 3.0  # the task's gradient, beside one of 1 per unit of weight
    weight = adapted_weight(1.0, 1 / (1 + task), target=0.5, tolerance=0.05)
    assert weight / (weight + task) == pytest.approx(0.55)


@pytest.mark.parametrize(("target", "tolerance"), [(0.1, 0.2), (0.9, 0.1), (0.5, -0.1)])
def test_bands_of_shares_that_cannot_be(target, tolerance):
    with pytest.raises(InputError, match=r"^adapted_weight: target - tolerance must be 0 or more"):
        adapted_weight(1.0, 0.3, target=target, tolerance=tolerance)
