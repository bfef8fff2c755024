"""Box targets, with numbers that a reader can check."""

import math

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec

from kd_det import Batch, InputError, build_kd_heads
from kd_det.heads import BoxTargetHead

from .cases import make_cfg
from .signals import make_signals, make_spec

NO_BATCH = Batch([], [(8, 8), (8, 8)])
LOG3 = math.log(3)
# Deltas that move a box of 4 x 4 by half its width: its IoU with the box before is 1/3, and so is its GIoU.
MOVED, KEPT = [0.5, 0.0, 0.0, 0.0], [0.0] * 4


def compare(student, teacher, **options):
    (loss,) = BoxTargetHead(**options)(student, teacher, NO_BATCH).values()
    return loss.item()


# ---- Smooth L1 ----
@pytest.mark.parametrize("agnostic", [False, True])
def test_smooth_l1_by_hand(agnostic):
    """Two classes. Box 0 of class 1 is off by (0.5, 2, 0, 0): smooth L1 0.5^2 / 2 and 2 - 1/2. Box 1 is background."""
    deltas = torch.zeros(2, 4) if agnostic else torch.full((2, 8), 9.0)
    other = deltas.clone() + (0 if agnostic else 5)
    own_class = slice(0, 4) if agnostic else slice(4, 8)
    other[0, own_class] = deltas[0, own_class] + torch.tensor([0.5, -2.0, 0.0, 0.0])
    other[1] += 100
    student = {"roi_logits": torch.zeros(2, 3), "roi_classes": torch.tensor([1, 2]), "roi_deltas": deltas}
    assert compare(student, {"roi_deltas": other}) == pytest.approx((0.125 + 1.5) / 4)  # the mean over the four deltas


def test_smooth_l1_of_boxes_is_what_soft_targets_had():
    """To the last digit, so that earlier results hold."""
    student, teacher = (make_signals(make_spec(6), seed=seed) for seed in range(2))
    foreground = student["roi_classes"] < 3
    rows, classes = torch.arange(3), student["roi_classes"][foreground]
    s, t = (side["roi_deltas"][foreground].view(3, -1, 4)[rows, classes] for side in (student, teacher))
    assert compare(student, teacher) == (F.smooth_l1_loss(s, t, reduction="sum") / 12).item()


@pytest.mark.parametrize(("source", "labels"), [("rpn", [1, 0, -1, 1]), ("dense", [2, 3, -1, 0])])
def test_smooth_l1_of_anchors_is_that_of_objects(source, labels):
    """Of two objects one is off by (2, 0, 0, 0), the other by nothing."""
    classes = 1 if source == "rpn" else 3
    student = {
        f"{source}_logits": torch.zeros(1, 4, classes),
        f"{source}_deltas": torch.tensor([[[2.0, 0, 0, 0], [9.0] * 4, [9.0] * 4, KEPT]]),
        f"{source}_labels": torch.tensor([labels]),
    }
    teacher = {f"{source}_logits": torch.ones(1, 4, classes), f"{source}_deltas": torch.zeros(1, 4, 4)}
    assert compare(student, teacher, sources=[source]) == pytest.approx(1.5 / 4 / 2)


# ---- GIoU ----
@pytest.mark.parametrize(("source", "labels", "count"), [("rpn", [1, 0, -1, 1], 2), ("dense", [1, 2, -1, 2], 1)])
def test_overlap_of_anchors_by_hand(source, labels, count):
    """The student is unsure (1/2) of what the teacher gives 3/4, but for the last anchor, on which both agree.

    Each box of the teacher is moved by half a width, of the anchor that is left out, too.
    """
    classes = 1 if source == "rpn" else 2
    scales = torch.tensor([1.0] * 4 if source == "rpn" else [10.0, 10.0, 5.0, 5.0])
    student = {
        f"{source}_logits": torch.zeros(1, 4, classes),
        f"{source}_deltas": torch.zeros(1, 4, 4),
        f"{source}_anchors": torch.tensor([[4.0 * i, 0.0, 4.0 * i + 4, 4.0] for i in range(4)]),
        f"{source}_labels": torch.tensor([labels]),
        f"{source}_scales": scales,
    }
    t_logits = torch.zeros(1, 4, classes)
    t_logits[0, :3, -1] = LOG3
    teacher = {f"{source}_logits": t_logits, f"{source}_deltas": torch.tensor([[MOVED] * 4]) * scales}
    expected = 4 * 2 * (1 / 4) * (1 - 1 / 3) / count
    assert compare(student, teacher, sources=[source], kind="giou") == pytest.approx(expected)


def test_overlap_of_boxes_by_hand():
    """Two foreground boxes, of classes 0 and 1; the teacher gives the labels 3/5 where the student gives 1/3.

    Only the box of class 0 is moved; what other classes and background have for boxes means nothing.
    """
    scales = torch.tensor([10.0, 10.0, 5.0, 5.0])
    deltas = torch.tensor([KEPT + [9.0] * 4, [9.0] * 4 + KEPT, [9.0] * 8])
    student = {
        "roi_logits": torch.zeros(3, 3),
        "roi_deltas": torch.tensor([MOVED + KEPT, KEPT + KEPT, KEPT + KEPT]) * scales.repeat(2),
        "roi_classes": torch.tensor([0, 1, 2]),
        "roi_boxes": torch.tensor([[0, 0.0, 0.0, 4.0, 4.0], [0, 8.0, 0.0, 12.0, 4.0], [1, 0.0, 0.0, 4.0, 4.0]]),
        "roi_scales": scales,
    }
    teacher = {"roi_logits": LOG3 * torch.eye(3), "roi_deltas": deltas}
    expected = 4 * (3 / 5 - 1 / 3) * (1 - 1 / 3) / 2
    assert compare(student, teacher, kind="giou") == pytest.approx(expected)


# ---- Bounded ----
@pytest.mark.parametrize(("margin", "expected"), [(0.0, 4.0), (0.6, 4.0 + 0.5)])
def test_bounded_by_hand(margin, expected):
    """The labels are deltas of (1, 0, 0, 0), the teacher's squared errors 1: the student's 4 counts, its 0.5 may not.

    A class-agnostic model; the box that is labelled background has no object, and no size.
    """
    student = {
        "roi_logits": torch.zeros(3, 2),
        "roi_deltas": torch.tensor([[3.0, 0, 0, 0], [1.0, math.sqrt(0.5), 0, 0], [9.0] * 4]),
        "roi_classes": torch.tensor([0, 0, 1]),
        "roi_boxes": torch.tensor([[0, 0.0, 0.0, 10.0, 10.0], [1, 0.0, 0.0, 10.0, 10.0], [1, 0.0, 0.0, 0.0, 0.0]]),
        "roi_gt_boxes": torch.tensor([[1.0, 0.0, 11.0, 10.0], [1.0, 0.0, 11.0, 10.0], [0.0] * 4]),
        "roi_scales": torch.tensor([10.0, 10.0, 5.0, 5.0]),
    }
    teacher = {"roi_deltas": torch.tensor([[0.0] * 4, [2.0, 0, 0, 0], [0.0] * 4])}
    assert compare(student, teacher, kind="bounded", margin=margin) == pytest.approx(0.5 * expected / 2)


# ---- Options ----
def build(options, teacher=None):
    spec = make_spec(6)
    return build_kd_heads(make_cfg("BoxTargetHead", options), spec, spec | (teacher or {}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"SOURCES": []}, r"SOURCES: got \[\]; allowed are roi, rpn, dense\."),
        ({"SOURCES": ["roi", "mask"]}, r"SOURCES: got \['roi', 'mask'\]; allowed are roi, rpn, dense\."),
        ({"KIND": "iou"}, "KIND: 'iou' is not one of smooth_l1, giou, bounded"),
        ({"KIND": "bounded", "SOURCES": ["rpn"]}, r"SOURCES: must be \['roi'\] with KIND 'bounded', got \['rpn'\]"),
        ({"KIND": "bounded", "MARGIN": -0.1}, "MARGIN: must be 0 or more with KIND 'bounded'.*; got -0.1"),
        ({"MARGIN": 0.2}, "MARGIN: .*0 with the others, which have none; got 0.2 with 'smooth_l1'"),
    ],
)
def test_options_that_are_refused(options, message):
    with pytest.raises(InputError, match=f"^KD.BOX_TARGET.{message}"):
        build(options)


@pytest.mark.parametrize("signal", ["roi_deltas", "roi_logits"])
def test_classes_that_differ(signal):
    with pytest.raises(InputError, match=f"^KD.BOX_TARGET.SOURCES: student and teacher must know.* but {signal} has"):
        build({}, teacher={signal: ShapeSpec(channels=7)})
