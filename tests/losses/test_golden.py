"""Fixed inputs with known values: from golden.json, and cases whose arithmetic a reader can follow."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from kd_det import losses

GOLDEN = json.loads(Path(__file__).with_name("golden.json").read_text())
LOG3 = math.log(3)


def tensors(values):
    """Nested lists of floats become float64 tensors, of integers int64 tensors; single numbers and words stay."""
    return torch.from_numpy(np.array(values)) if isinstance(values, list) else values


def close(actual, expected, tolerance=1e-9):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=0, atol=tolerance)


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"{case['function']}: {case['name']}")
def test_golden(case):
    options = {key: tensors(value) for key, value in case["options"].items()}
    actual = getattr(losses, case["function"])(*map(tensors, case["inputs"]), **options)
    assert actual.dtype == torch.float64
    close(actual, tensors(case["expected"]))


def test_golden_covers_every_function():
    by_hand = {"binary_soft_target_loss", "feature_attention"}  # below
    assert set(losses.__all__) - {case["function"] for case in GOLDEN} == by_hand


def checkerboard(side):
    rows = torch.arange(side)
    return ((rows[:, None] + rows) % 2 * 2 - 1).double()[None, None]


@pytest.mark.parametrize(
    ("student", "expected"),
    [
        (torch.ones(1, 2, 8, 8), 1.0),  # every term is 1, so is their weighted mean
        (checkerboard(8), 1 / (1 + 1 / 2 + 1 / 4 + 1 / 8)),  # the pooled terms vanish
        (checkerboard(4), 1 / (1 + 1 / 2 + 1 / 4)),  # no 4x4 grid
        (torch.ones(1, 2, 1, 8), 1.0),  # no grid at all
    ],
)
def test_hierarchical_context_by_hand(student, expected):
    close(losses.hierarchical_context_loss(student, torch.zeros_like(student)), expected, 1e-7)


def test_one_hot_maps_by_hand():
    one, other = torch.zeros(2, 1, 1, 2, 2, dtype=torch.float64)
    one[..., 0, 0] = 3
    other[..., 1, 1] = 5
    # unit maps (1, 0, 0, 0) and (0, 0, 0, 1): two of four cells differ by 1
    close(losses.attention_transfer_loss(one, other), 2 / 4)
    close(losses.attention_transfer_loss(one, other, reduction="sum_hw"), 2.0)
    close(losses.factor_transfer_loss(one, other), 2 / 4)
    close(losses.inheritance_loss(one, other, kind="od"), math.sqrt(3**2 + 5**2))
    close(losses.exploration_loss(one, other, kind="od"), -math.sqrt(3**2 + 5**2))


def test_soft_targets_by_hand():
    # teacher (3/4, 1/4), student (1/2, 1/2)
    expected = 3 / 4 * math.log(3 / 2) + 1 / 4 * math.log(1 / 2)
    assert expected == pytest.approx(0.130812, abs=1e-6)
    student, teacher = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([[LOG3, 0]], dtype=torch.float64)
    close(losses.soft_target_loss(student, teacher, temperature=1.0), expected)
    close(losses.mutual_loss(student, teacher), expected)
    close(losses.binary_soft_target_loss(student[0, :1], teacher[0, :1]), expected)
    # two such rows, the second with half the weight
    two = student.expand(2, 2), teacher.expand(2, 2)
    close(losses.soft_target_loss(*two, temperature=1.0, weights=torch.tensor([1.0, 0.5])), 0.75 * expected)


def test_binary_soft_targets_by_hand():
    # elements (LOG3 against 0) and (0 against 0), weighted 1 to 3
    student, teacher = torch.zeros(2, dtype=torch.float64), torch.tensor([LOG3, 0], dtype=torch.float64)
    one = 3 / 4 * math.log(3 / 2) + 1 / 4 * math.log(1 / 2)
    close(losses.binary_soft_target_loss(student, teacher), one / 2)
    close(losses.binary_soft_target_loss(student, teacher, weights=torch.tensor([1, 3])), one / 4)
    # far from zero, where sigmoids saturate, the divergence is the distance of the logits
    close(losses.binary_soft_target_loss(torch.tensor([-200.0]), torch.tensor([300.0])), 200.0)


def test_attention_and_focal_loss_by_hand():
    # |x| / T is log 3 in the first cell of the first channel, 0 elsewhere: means log 3 / 2 over channels or cells
    teacher = torch.tensor([[[[LOG3, 0.0]], [[0.0, 0.0]]]], dtype=torch.float64)
    spatial, channel = losses.feature_attention(-teacher, temperature=1.0)
    top = 2 * math.sqrt(3) / (math.sqrt(3) + 1)
    close(spatial, [[[top, 2 - top]]])
    close(channel, [[top, 2 - top]])
    # a student of 0 everywhere: differences of log 3 in one element alone, and uniform attention of 1
    student = torch.zeros_like(teacher)
    weight = torch.tensor([[[0.5, 9.0]]], dtype=torch.float64)
    close(losses.focal_loss(student, teacher, weight=weight, temperature=1.0), 0.5 * (top * LOG3) ** 2)
    close(losses.attention_loss(student, teacher, temperature=1.0), 4 * (top - 1))


def test_box_overlap_by_hand():
    # common 2 x 2 of areas 12 and 8: IoU 4 / 16; the hull of 5 x 4 holds 4 more
    a, b = torch.tensor([[0.0, 0.0, 4.0, 3.0]]), torch.tensor([[2.0, 1.0, 4.0, 5.0]])
    close(losses.box_overlap_loss(a, b, weights=torch.ones(1), normalizer=1), 1 - 4 / 16 + 4 / 20, 1e-6)


def test_boundary_and_overhaul_by_hand():
    student = torch.tensor([[-2.0, 0.5, -0.5, 1.5, 0.0]])
    teacher = torch.tensor([[-1.0, 1.0, 1.0, 0.1, 0.0]])
    # beyond the margin on the right side: 0; 1/2 short; 3/2 short; beyond; a teacher of 0 is inactive: 1 short
    close(losses.activation_boundary_loss(student, teacher), 0.5**2 + 1.5**2 + 1.0**2)
    # targets (-1, 1, 1, 0.1, 0): the first needs nothing, as both are inactive
    margin = torch.full((5,), -1.5)
    close(losses.overhaul_loss(student, teacher, margin=margin), 0.5**2 + 1.5**2 + 1.4**2, 1e-6)


def test_adjusted_targets_enter_as_log_probabilities():
    student = torch.tensor([[1.0, 0.2, -0.5, 0.3], [0.0, 1.0, 0.5, -1.0], [0.4, 0.1, 0.2, 0.9]], dtype=torch.float64)
    teacher = torch.tensor([[0.5, 2.0, 0.1, -0.3], [0.1, 1.5, 0.3, 0.2], [0.2, 0.6, 0.3, 1.1]], dtype=torch.float64)
    labels = torch.arange(3)
    probs = (teacher / 4).softmax(dim=1)
    shifted = losses.adjust_probability_shift(probs, labels)
    smoothed = losses.adjust_label_smoothing(probs, labels, correct_prob=0.9)
    certain = losses.adjust_label_smoothing(probs, labels, correct_prob=1.0)
    close(losses.soft_target_loss(student, 4 * probs.log(), temperature=4.0), 0.22479386251617384)
    close(losses.soft_target_loss(student, 4 * shifted.log(), temperature=4.0), 0.1569895802367545)
    close(losses.soft_target_loss(student, 4 * smoothed.log(), temperature=4.0), 9.616719026704216)
    assert losses.soft_target_loss(student, 4 * certain.log(), temperature=4.0).isfinite()


def test_gradient_of_soft_targets():
    student = torch.tensor([[1.0, 2.0, 0.5], [0.2, -0.3, 0.9]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[2.0, 1.0, 0.1], [0.0, 0.5, 1.5]], dtype=torch.float64)
    losses.soft_target_loss(student, teacher, temperature=4.0).backward()
    # T (q - p) / N
    close(student.grad, 4 * ((student / 4).softmax(1) - (teacher / 4).softmax(1)).detach() / 2)
    close(student.grad[0], [-0.20148752444921658, 0.16218514629551817, 0.03930237815369819])
