"""Numbers of anchors, by hand and over processes."""

import pytest
import torch

from kd_det.heads import anchors


@pytest.mark.parametrize(
    ("labels", "background", "expected"),
    [
        ([[0, 3, -1], [2, 3, 1]], 3, 3.0),  # a detector of three classes
        ([[0, 1, -1], [1, 0, 0]], 0, 2.0),  # an RPN
        ([[3, -1, 3]], 3, 1.0),  # no object
    ],
)
def test_positive_count_by_hand(labels, background, expected):
    assert anchors.positive_count(torch.tensor(labels), background=background) == expected


def test_positive_count_is_the_mean_over_processes(monkeypatch):
    """This one has 1 object and the other 4."""
    monkeypatch.setattr(anchors.comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(anchors, "differentiable_all_reduce", lambda count: count + 4)
    assert anchors.positive_count(torch.tensor([0, 3, -1]), background=3) == 2.5
