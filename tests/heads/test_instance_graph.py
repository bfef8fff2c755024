"""DSIG, by numbers that a reader can check."""

import math

import pytest
import torch
from detectron2.layers import ShapeSpec

from kd_det import Batch, InputError, build_kd_heads
from kd_det.config import default_config
from kd_det.heads import InstanceGraphHead

from .signals import make_spec

OBJECT, BACKGROUND = 0, 1
# Of two logits whose difference is this, the cross-entropy with the background is 0.6.
LIMIT = math.log(math.exp(0.6) - 1)
CERTAIN = -9.0


def build(channels=2, teacher_channels=2):
    shapes = [{"roi_features": ShapeSpec(channels=x, height=1, width=1)} for x in (channels, teacher_channels)]
    head = InstanceGraphHead(student_spec=shapes[0], teacher_spec=shapes[1]).double()
    head.weights = dict.fromkeys(head.weights, 1.0)
    return head


def compare(head, rows, *, images=1):
    """Parts of the loss; a row is image, class, the teacher's logit of an object, and both sides' features."""
    image, classes, logits, s, t = zip(*rows, strict=True)
    s, t = (torch.tensor(x, dtype=torch.float64)[:, :, None, None] for x in (s, t))
    student = {
        "roi_features": s,
        "roi_classes": torch.tensor(classes),
        "roi_boxes": torch.tensor([[float(x), 0, 0, 8, 8] for x in image]),
    }
    teacher = {"roi_features": t, "roi_logits": torch.tensor([[x, 0.0] for x in logits], dtype=torch.float64)}
    losses = head(student, teacher, Batch([], [(8, 8)] * images))
    return {key.rpartition("_")[2]: loss.item() for key, loss in losses.items()}


def test_nodes_of_objects_and_background():
    """Mean squared differences of 5, and 2 and 0 in the background, which has 7.5 / 2 times their mean; all twice."""
    rows = [
        (0, OBJECT, CERTAIN, [0.0, 0.0], [1.0, 3.0]),
        (0, BACKGROUND, CERTAIN, [1.0, 1.0], [1.0, 3.0]),
        (0, BACKGROUND, CERTAIN, [1.0, 1.0], [1.0, 1.0]),
    ]
    losses = compare(build(), rows)
    assert losses["foreground"] == pytest.approx(2 * 5)
    assert losses["background"] == pytest.approx(2 * 7.5 / 2 * 1)


@pytest.mark.parametrize(("logit", "edges"), [(LIMIT + 0.001, 1 / 4), (LIMIT - 0.001, 0)])
def test_background_that_the_teacher_takes_for_an_object_has_edges(logit, edges):
    """Of two nodes, orthogonal in the student and parallel in the teacher, two of four cosines differ by 1."""
    rows = [
        (0, OBJECT, CERTAIN, [1.0, 0.0], [1.0, 0.0]),
        (0, BACKGROUND, logit, [0.0, 5.0], [3.0, 0.0]),
    ]
    assert compare(build(), rows)["edge"] == pytest.approx(2 * edges)


def test_images_are_averaged_and_have_no_edges_between_them():
    first = [(0, OBJECT, 0, [1.0, 0.0], [0.0, 1.0]), (0, BACKGROUND, 0, [1.0, 0.0], [1.0, 1.0])]
    second = [(0, OBJECT, 0, [1.0, 2.0], [2.0, 1.0]), (0, BACKGROUND, 0, [1.0, 3.0], [5.0, 1.0])]
    alone = [compare(build(), rows) for rows in (first, second)]
    both = compare(build(), first + [(1, *row[1:]) for row in second], images=2)
    assert both == pytest.approx({key: (alone[0][key] + alone[1][key]) / 2 for key in both})


def test_images_without_objects_are_compared_by_edges():
    rows = [(0, BACKGROUND, 0, [1.0, 0.0], [1.0, 0.0]), (0, BACKGROUND, 0, [0.0, 1.0], [2.0, 0.0])]
    assert compare(build(), rows) == {"foreground": 0, "background": 0, "edge": pytest.approx(2 / 4)}
    # the second image has no boxes at all
    assert compare(build(), rows, images=2) == {"foreground": 0, "background": 0, "edge": pytest.approx(1 / 4)}


def test_each_part_has_its_factor():
    shape = {"roi_features": ShapeSpec(channels=2, height=1, width=1)}
    rows = [(0, OBJECT, 0, [1.0, 0.0], [0.0, 1.0]), (0, BACKGROUND, 0, [1.0, 0.0], [1.0, 1.0])]
    ones = compare(build(), rows)
    published = compare(InstanceGraphHead(student_spec=shape, teacher_spec=shape), rows)
    expected = {key: factor * ones[key] for key, factor in zip(ones, (0.5, 0.5, 1.0), strict=True)}
    assert published == pytest.approx(expected)


def test_features_of_another_width_have_an_adapter():
    assert not list(build().parameters())
    head = build(2, 3)
    conv = head.align["roi_features"]
    conv.weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], dtype=torch.float64)[:, :, None, None]
    torch.nn.init.zeros_(conv.bias)
    assert compare(head, [(0, OBJECT, 0, [1.0, 2.0], [1.0, 2.0, 6.0])])["foreground"] == pytest.approx(2 * 3**2 / 3)


@pytest.mark.parametrize(
    ("signal", "shape", "told"),
    [
        ("roi_logits", ShapeSpec(channels=9), "student and teacher must know the same classes, but roi_logits has 4 "),
        ("roi_features", ShapeSpec(channels=6, height=7, width=7), r"roi_features have \(4, 4\) cells in the student"),
    ],
)
def test_teachers_that_do_not_fit(signal, shape, told):
    cfg = default_config()
    cfg.KD.HEADS = ["InstanceGraphHead"]
    with pytest.raises(InputError, match=f"^KD.HEADS: InstanceGraphHead: {told}"):
        build_kd_heads(cfg, make_spec(6), {**make_spec(6), signal: shape})
