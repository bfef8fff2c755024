"""Values of the heads that a reader can check, or that published code gives."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec

from kd_det import Batch, InputError, add_kd_config, build_kd_heads
from kd_det.heads import AttentionTransferHead, HintHead, ReviewKDHead, SoftTargetHead
from kd_det.heads.review import AttentionFusion
from kd_det.losses import hierarchical_context_loss

from .signals import make_spec

GOLDEN = json.loads(Path(__file__).with_name("golden.json").read_text())
LOG3 = math.log(3)
# KL of (1/2, 1/2) from (3/4, 1/4), which are the softmax of (0, 0) and of (log 3, 0)
KL = 3 / 4 * math.log(3 / 2) + 1 / 4 * math.log(1 / 2)


def maps(*shape, channels=3, seed=0):
    return torch.randn(2, channels, *shape, generator=torch.Generator().manual_seed(seed))


def make_batch(sizes, *, mask_padding=False):
    return Batch([], sizes, mask_padding)


NO_BATCH = make_batch([(8, 8), (8, 8)])


# ---- ReviewKD ----
def golden_fusion(*, fuse=True):
    golden = {
        key: torch.tensor(value, dtype=torch.float64) for key, value in GOLDEN["attention_fusion"]["weights"].items()
    }
    fusion = AttentionFusion(2, 2, 1, norm="BN", fuse=fuse).double().eval()
    fusion.reduce.weight.data = golden["reduce"][:, :, None, None]
    fusion.expand.weight.data = golden["expand"][None] if golden["expand"].dim() == 3 else golden["expand"]
    if fuse:
        fusion.attention.weight.data = golden["attention"][:, :, None, None]
        fusion.attention.bias.data = golden["attention_bias"]
    return fusion


def golden_inputs():
    inputs = GOLDEN["attention_fusion"]["inputs"]
    return [torch.tensor(inputs[key], dtype=torch.float64) for key in ("student", "deeper")]


def test_fusion_gives_what_published_code_gives():
    out, residual = golden_fusion()(*golden_inputs())
    for actual, key in ((out, "out"), (residual, "residual")):
        expected = np.array(GOLDEN["attention_fusion"]["expected"][key])
        np.testing.assert_allclose(actual.detach().numpy(), expected.reshape(actual.shape), rtol=0, atol=1e-7)


def test_fusion_in_numpy():
    """1x1 convolution, nearest upsampling, sigmoid of two maps, their weighted sum; BatchNorm is 1 / sqrt(1 + 1e-5)."""
    weights = {key: np.array(value) for key, value in GOLDEN["attention_fusion"]["weights"].items()}
    student, deeper = (x.numpy()[0] for x in golden_inputs())
    own = np.einsum("oc,chw->ohw", weights["reduce"], student) / np.sqrt(1 + 1e-5)
    other = deeper.repeat(2, axis=1).repeat(2, axis=2)
    both = np.concatenate([own, other])
    attention = np.einsum("oc,chw->ohw", weights["attention"], both) + weights["attention_bias"][:, None, None]
    attention = 1 / (1 + np.exp(-attention))
    residual = own * attention[0] + other * attention[1]
    np.testing.assert_allclose(golden_fusion()(*golden_inputs())[1].detach().numpy()[0], residual, atol=1e-12)


def test_the_deepest_level_is_not_fused():
    student, _ = golden_inputs()
    out, residual = golden_fusion(fuse=False)(student, None)
    assert torch.equal(residual, golden_fusion(fuse=False).reduce(student))
    assert out.shape == (1, 1, 4, 4)


def review(levels):
    student, teacher = ({name: ShapeSpec(channels=c, stride=s) for name, s in levels.items()} for c in (3, 5))
    torch.manual_seed(0)
    return ReviewKDHead(student_spec=student, teacher_spec=teacher, mid_channels=4)


def test_review_of_one_level_is_the_context_loss_of_its_fusion():
    head, student, teacher = review({"p2": 4}), maps(8, 8), maps(8, 8, channels=5, seed=1)
    fused, _ = head.fusions["p2"](student, None)
    loss = head({"p2": student}, {"p2": teacher}, NO_BATCH)["loss_kd_review"]
    torch.testing.assert_close(loss, hierarchical_context_loss(fused, teacher), rtol=0, atol=1e-7)


def test_review_goes_from_the_deepest_level_to_the_finest():
    head = review({"p2": 4, "p3": 8, "p4": 16})
    student = {name: maps(8 // i, 8 // i, seed=i) for i, name in ((1, "p2"), (2, "p3"), (4, "p4"))}
    teacher = {name: maps(*x.shape[2:], channels=5, seed=9) for name, x in student.items()}
    fusions = head.fusions
    out4, residual = fusions["p4"](student["p4"], None)
    out3, residual = fusions["p3"](student["p3"], residual)
    out2, _ = fusions["p2"](student["p2"], residual)
    expected = sum(hierarchical_context_loss(x, teacher[k]) for k, x in (("p2", out2), ("p3", out3), ("p4", out4)))
    torch.testing.assert_close(head(student, teacher, NO_BATCH)["loss_kd_review"], expected, rtol=0, atol=1e-6)
    assert fusions["p4"].attention is None
    assert fusions["p2"].attention is not None


# ---- Hints and attention ----
def hint(channels=(3, 5)):
    specs = [{"p2": ShapeSpec(channels=c, stride=4)} for c in channels]
    return HintHead(student_spec=specs[0], teacher_spec=specs[1])


def test_hint_by_hand():
    """A regressor of weight 2 and bias 1 makes 3 of 1; the teacher's 5 is 2 away."""
    head = hint((1, 1))
    head.regressors["p2"].weight.data.fill_(2.0)
    head.regressors["p2"].bias.data.fill_(1.0)
    loss = head({"p2": torch.ones(2, 1, 3, 3)}, {"p2": torch.full((2, 1, 3, 3), 5.0)}, NO_BATCH)["loss_kd_hint"]
    assert loss.item() == pytest.approx(4.0)


@pytest.mark.parametrize(("reduction", "expected"), [("sum_hw", 2.0), ("mean", 2.0 / 4)])
def test_attention_by_hand(reduction, expected):
    """Unit maps (1, 0, 0, 0) and (0, 0, 0, 1), whatever the size of the activations and the number of channels."""
    student, teacher = torch.zeros(1, 2, 2, 2), torch.zeros(1, 7, 2, 2)
    student[0, :, 0, 0], teacher[0, :, 1, 1] = -3.0, 8.0
    head = AttentionTransferHead(strides={"p2": 4, "p3": 8}, reduction=reduction)
    loss = head({"p2": student, "p3": student}, {"p2": teacher, "p3": teacher}, NO_BATCH)
    assert loss["loss_kd_attention_transfer"].item() == pytest.approx(2 * expected)  # over two levels


# ---- Padding ----
def crop(signals, cells):
    return {name: x[:, :, : cells[0], : cells[1]] for name, x in signals.items()}


@pytest.mark.parametrize("make", [hint, lambda: AttentionTransferHead(strides={"p2": 4})], ids=["hint", "attention"])
@pytest.mark.parametrize("size", [(16, 20), (15, 18)])
def test_masked_padding_equals_cropped_maps(make, size):
    """Both images are 16 x 20 pixels, 4 x 5 cells, or just less: a cell that sees one pixel counts."""
    torch.manual_seed(0)
    head = make()
    student, teacher = {"p2": maps(8, 8)}, {"p2": maps(8, 8, channels=5, seed=1)}
    masked = head(student, teacher, make_batch([size, size], mask_padding=True))
    cropped = head(crop(student, (4, 5)), crop(teacher, (4, 5)), NO_BATCH)
    unmasked = head(student, teacher, make_batch([size, size]))
    for key, loss in masked.items():
        assert loss.item() == pytest.approx(cropped[key].item(), rel=1e-6)
        assert loss.item() != pytest.approx(unmasked[key].item(), rel=1e-2)


# ---- Soft targets ----
def roi_signals(logits, classes, **more):
    return {"roi_logits": torch.tensor(logits), "roi_classes": torch.tensor(classes), **more}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (KL + KL + 0) / 3),  # a foreground box and two of background; on the last one both sides agree
        ({"background_weight": 1.5}, (KL + 1.5 * KL + 0) / 3),
        ({"background_weight": 0.0}, KL / 3),
        ({"rois": "foreground"}, KL),
    ],
)
def test_soft_targets_of_boxes_by_hand(options, expected):
    """One class and background: logits (log 3, 0) are the probabilities 3/4 and 1/4."""
    student = roi_signals([[0.0, 0.0], [0.0, 0.0], [0.0, LOG3]], [0, 1, 1])
    teacher = {"roi_logits": torch.tensor([[LOG3, 0.0], [LOG3, 0.0], [0.0, LOG3]])}
    loss = SoftTargetHead(**options)(student, teacher, NO_BATCH)["loss_kd_soft_target_roi"]
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_temperature_by_hand():
    """At T = 2 logits (2 log 3, 0) are the probabilities 3/4 and 1/4; the loss is T^2 = 4 times the divergence."""
    student, teacher = roi_signals([[0.0, 0.0]], [0]), {"roi_logits": torch.tensor([[2 * LOG3, 0.0]])}
    loss = SoftTargetHead(temperature=2.0)(student, teacher, NO_BATCH)["loss_kd_soft_target_roi"]
    assert loss.item() == pytest.approx(4 * KL, abs=1e-6)


@pytest.mark.parametrize("source", ["rpn", "dense"])
def test_soft_targets_of_anchors_by_hand(source):
    """Sigmoids: 1/2 against 3/4, weighted by 3/4; and 1/4 on both sides, weighted by 1/4."""
    name = f"{source}_logits"
    student = {name: torch.tensor([[[0.0], [-LOG3]]], requires_grad=True)}
    teacher = {name: torch.tensor([[[LOG3], [-LOG3]]])}
    loss = SoftTargetHead(sources=[source])(student, teacher, NO_BATCH)[f"loss_kd_soft_target_{source}"]
    assert loss.item() == pytest.approx((3 / 4 * KL + 1 / 4 * 0) / (3 / 4 + 1 / 4), abs=1e-6)
    # The weights are constants: the gradient is weight * (q - p), for the second anchor 0.
    loss.backward()
    np.testing.assert_allclose(student[name].grad.flatten(), [3 / 4 * (1 / 2 - 3 / 4), 0.0], atol=1e-6)


@pytest.mark.parametrize("agnostic", [False, True])
def test_soft_targets_of_masks_by_hand(agnostic):
    """Only the labelled class's mask counts: that of class 1 is (log 3) against 0, all others are far off."""
    student, teacher = torch.full((1, 3, 2, 2), 50.0), torch.full((1, 3, 2, 2), -50.0)
    student[0, 1], teacher[0, 1] = 0.0, LOG3
    if agnostic:
        student, teacher = student[:, 1:2], teacher[:, 1:2]
    own = {"mask_logits": student, "mask_classes": torch.tensor([1])}
    loss = SoftTargetHead(sources=["mask"])(own, {"mask_logits": teacher}, NO_BATCH)["loss_kd_soft_target_mask"]
    assert loss.item() == pytest.approx(KL, abs=1e-6)


def test_soft_targets_of_heatmaps_by_hand():
    """Of three keypoints only the first is visible: its two likely cells have the odds 1:1 against 3:1."""
    student, teacher = torch.full((1, 3, 2, 2), -50.0), torch.full((1, 3, 2, 2), -50.0)
    student[0, :, 0], teacher[0, :, 0] = 0.0, torch.tensor([LOG3, 0.0])
    teacher[0, 1:] += 7 * torch.eye(2)
    own = {"keypoint_logits": student, "keypoint_labels": torch.tensor([[2, -1, -1]])}
    loss = SoftTargetHead(sources=["keypoint"])(own, {"keypoint_logits": teacher}, NO_BATCH)
    assert loss["loss_kd_soft_target_keypoint"].item() == pytest.approx(KL, abs=1e-6)


@pytest.mark.parametrize(
    ("kind", "squared", "logits", "expected"),
    [
        ("pixel", True, [[LOG3, LOG3], [0.0, 0.0]], 4 * KL),
        ("pixel", False, [[LOG3, LOG3], [0.0, 0.0]], KL),
        ("pixel", True, [[LOG3, 0.0], [LOG3, 0.0]], 0.0),
        ("channel", True, [[LOG3, 0.0], [LOG3, 0.0]], 4 * KL),
        ("channel", True, [[LOG3, LOG3], [0.0, 0.0]], 0.0),
    ],
)
def test_soft_targets_of_segments_by_hand(kind, squared, logits, expected):
    """Two classes, T = 2, three cells for 4 x 12 labels, those of the last cell ignored; the student is indifferent."""
    teacher = torch.full((1, 2, 1, 3), 50.0)
    teacher[0, :, 0, :2] = 2 * torch.tensor(logits)
    labels = torch.zeros(1, 4, 12, dtype=torch.int64)
    labels[:, :, 8:] = -1
    head = SoftTargetHead(sources=["sem_seg"], temperature=2.0, squared_temperature=squared, sem_seg=kind)
    own = {"sem_seg_logits": torch.zeros(1, 2, 1, 3), "sem_seg_labels": labels}
    loss = head(own, {"sem_seg_logits": teacher}, NO_BATCH)["loss_kd_soft_target_sem_seg"]
    assert loss.item() == pytest.approx(expected, abs=1e-6)


# ---- Options that cannot be ----
@pytest.mark.parametrize(
    ("name", "key", "value", "told"),
    [
        ("ReviewKDHead", "REVIEW.NORM", "IN", r"KD.REVIEW.NORM: 'IN' is not one of BN, SyncBN, GN, LN\."),
        ("ReviewKDHead", "REVIEW.IN_FEATURES", ["p4", "p2"], r"must go from the finest .* p4, p2 are \[16, 4\]\."),
        ("AttentionTransferHead", "ATTENTION_TRANSFER.REDUCTION", "sum", "'sum' is not one of sum_hw, mean, norm"),
        ("HintHead", "HINT.IN_FEATURES", [], "no feature is named; the student's backbone has p2, p3"),
        (
            "ReviewKDHead",
            "REVIEW.IN_FEATURES",
            ["p2", "roi_features"],
            "'roi_features' is not a feature map of the backbone, which has p2",
        ),
        (
            "ReviewKDHead",
            "REVIEW.TEACHER_PREACT",
            True,
            "there is no ReLU at the end of the teacher's p2, p3, p4, p5, p6; set",
        ),
        ("SoftTargetHead", "SOFT_TARGET.SOURCES", ["roi", "box"], r"got \['roi', 'box'\]; allowed are roi, rpn"),
        ("SoftTargetHead", "SOFT_TARGET.SOURCES", [], r"got \[\]; allowed are roi, rpn, mask, dense"),
        ("HintHead", "HINT.REGRESSOR", "conv", "'conv' is not one of linear, rectified"),
        ("SoftTargetHead", "SOFT_TARGET.ROIS", "fg", "got 'fg'; allowed are all, foreground"),
        ("SoftTargetHead", "SOFT_TARGET.SEM_SEG", "cwd", "SEM_SEG: 'cwd' is not one of pixel, channel"),
        ("SoftTargetHead", "SOFT_TARGET.TEMPERATURE", 0.0, "TEMPERATURE: must be above 0, got 0.0"),
        ("AttentionTransferHead", "ATTENTION_TRANSFER.POWER", 0, "POWER: must be at least 1, got 0"),
        (
            "SoftmaxRegressionHead",
            "SOFTMAX_REGRESSION.TEMPERATURE",
            4.0,
            "and 1 with KIND 'mse', which has none; got 4",
        ),
    ],
)
def test_options_that_cannot_be(name, key, value, told):
    cfg = get_cfg()
    add_kd_config(cfg)
    cfg.KD.HEADS = [name]
    cfg.merge_from_list([f"KD.{key}", value])
    with pytest.raises(InputError, match=told) as error:
        build_kd_heads(cfg, make_spec(6), make_spec(6))
    assert str(error.value).startswith(f"KD.{key.split('.')[0]}")


@pytest.mark.parametrize(
    ("options", "signal", "told"),
    [
        ({}, "roi_logits", r"roi_logits has 4 channels in the student and 7 in the teacher \(background included\)\."),
        ({"SOURCES": ["mask"]}, "mask_logits", "mask_logits has 3 channels in the student and 7"),
        ({"SOURCES": ["dense"]}, "dense_logits", "dense_logits has 3 channels in the student and 7"),
        ({"SOURCES": ["sem_seg"]}, "sem_seg_logits", "sem_seg_logits has 3 channels in the student and 7"),
        ({"SOURCES": ["keypoint"]}, "keypoint_logits", "keypoint_logits has 2 channels in the student and 7"),
    ],
)
def test_class_counts_that_differ(options, signal, told):
    cfg = get_cfg()
    add_kd_config(cfg)
    cfg.KD.HEADS = ["SoftTargetHead"]
    cfg.merge_from_list([part for key, value in options.items() for part in (f"KD.SOFT_TARGET.{key}", value)])
    teacher = {**make_spec(6), signal: ShapeSpec(channels=7)}
    with pytest.raises(
        InputError, match=f"^KD.SOFT_TARGET.*student and teacher must know the same classes, but {told}"
    ):
        build_kd_heads(cfg, make_spec(6), teacher)
