"""Soft targets by DKD, NKD, GDKD and DIST, and with standardised logits."""

import math

import pytest
import torch
from detectron2.layers import ShapeSpec
from torch._subclasses.fake_tensor import FakeTensorMode

from kd_det import Batch, InputError, build_kd_heads
from kd_det.config import default_config
from kd_det.heads import SoftTargetHead
from kd_det.heads.divided_targets import DividedTargets
from kd_det.losses import between_groups_loss, correlation_loss

CLASSES = 4
# Two boxes of objects and one labelled background, the last of four logits.
LABELS = torch.tensor([0, 2, CLASSES - 1])


def rows(seed):
    return torch.randn(3, CLASSES, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2


S, T = rows(0), rows(1)


def compare(s=S, t=T, labels=LABELS, **options):
    head = SoftTargetHead(**options)
    (loss,) = head({"roi_logits": s, "roi_classes": labels}, {"roi_logits": t}, Batch([], [])).values()
    return loss.item()


def kl(s, t, temperature=1.0):
    p, q = (t / temperature).softmax(dim=-1), (s / temperature).softmax(dim=-1)
    return temperature**2 * (p * (p / q).log()).sum(dim=-1)


def without(x, labels):
    return torch.stack([torch.cat([row[:y], row[y + 1 :]]) for row, y in zip(x, labels.tolist(), strict=True)])


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_dkd_splits_the_divergence_into_the_labelled_class_and_the_others(temperature):
    """KL is that of (p_y, 1 - p_y) and 1 - p_y times that of the others, each row for itself (Zhao et al., eq. 7)."""
    options = {"divergence": "dkd", "temperature": temperature}
    target = compare(**options, target_weight=1.0, other_weight=0.0)
    other = compare(**options, target_weight=0.0, other_weight=1.0)
    assert other == pytest.approx(kl(without(S, LABELS), without(T, LABELS), temperature).mean().item())
    p = (T / temperature).softmax(dim=1)[torch.arange(3), LABELS]
    inner = kl(without(S, LABELS), without(T, LABELS), temperature)
    assert target == pytest.approx((kl(S, T, temperature) - (1 - p) * inner).mean().item())
    both = compare(**options, target_weight=2.0, other_weight=0.25)
    assert both == pytest.approx(2 * target + 0.25 * other)


def test_dkd_weighs_background_boxes_and_leaves_them_out():
    options = {"divergence": "dkd", "other_weight": 0.25}
    foreground = compare(**options, rois="foreground")
    assert foreground == pytest.approx(compare(S[:2], T[:2], LABELS[:2], **options))
    assert compare(**options, background_weight=0.0) == pytest.approx(2 / 3 * foreground)


def test_nkd_is_a_weighted_cross_entropy_and_the_divergence_of_the_others():
    p, q = T.softmax(dim=1)[torch.arange(3), LABELS], S.softmax(dim=1)[torch.arange(3), LABELS]
    expected = (-p * q.log()).mean() + 1.5 * kl(without(S, LABELS), without(T, LABELS), 3.0).mean()
    assert compare(divergence="nkd", temperature=3.0, other_weight=1.5) == pytest.approx(expected.item())


def test_gdkd_compares_the_teachers_most_probable_classes_with_the_rest():
    t = torch.tensor([[3.0, 0.0, 1.0, 2.0]], dtype=torch.float64).log1p()
    s, label = torch.zeros_like(t), LABELS[:1]
    sums = torch.tensor([[7.0, 3.0]]).double().log(), torch.tensor([[2.0, 2.0]]).double().log()  # 4 + 3 and 1 + 2
    parts = {
        "target_weight": kl(sums[1], sums[0]),
        "top_weight": kl(s[:, :2], torch.tensor([[4.0, 3.0]]).double().log()),
        "other_weight": kl(s[:, :2], torch.tensor([[1.0, 2.0]]).double().log()),
    }
    off = dict.fromkeys(parts, 0.0)
    for key, expected in parts.items():
        loss = compare(s, t, label, divergence="gdkd", top_k=2, **(off | {key: 1.0}))
        assert loss == pytest.approx(expected.item()), key


def test_gdkd_of_the_labelled_class_alone_is_dkd():
    sure = T.clone()
    sure[torch.arange(3), LABELS] = 9.0
    weights = {"target_weight": 1.0, "other_weight": 0.25}
    gdkd = compare(t=sure, divergence="gdkd", top_k=1, **weights)
    assert gdkd == pytest.approx(compare(t=sure, divergence="dkd", **weights))


def test_dist_is_one_minus_the_correlation_along_classes_and_along_rows():
    p, q = T.softmax(dim=1), S.softmax(dim=1)
    of_rows = 1 - torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(p, q, strict=True)]).mean()
    of_classes = (
        1 - torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(p.T, q.T, strict=True)]).mean()
    )
    loss = compare(divergence="dist", target_weight=0.5, other_weight=2.0)
    assert loss == pytest.approx((0.5 * of_rows + 2.0 * of_classes).item(), rel=1e-6)
    warm = compare(S * 4, T * 4, divergence="dist", target_weight=0.5, other_weight=2.0, temperature=4.0)
    assert warm == pytest.approx(16 * loss)


@pytest.mark.parametrize("divergence", ["dkd", "gdkd", "dist"])
def test_the_square_of_the_temperature_can_be_left_out(divergence):
    options = {"divergence": divergence, "temperature": 3.0, "top_k": 2}
    assert compare(**options) == pytest.approx(9 * compare(**options, squared_temperature=False))


@pytest.mark.parametrize("divergence", ["kl", "dkd"])
def test_standardised_logits_have_no_scale_and_no_offset(divergence):
    options = {"divergence": divergence, "standardize": True, "temperature": 2.0}
    loss = compare(**options)
    assert compare(5 * S + 3, 0.1 * T - 2, **options) == pytest.approx(loss, rel=1e-5)
    z_s, z_t = ((x - x.mean(dim=1, keepdim=True)) / x.std(dim=1, keepdim=True) for x in (S, T))
    assert loss == pytest.approx(compare(z_s, z_t, **options | {"standardize": False}), rel=1e-5)


@pytest.mark.parametrize("divergence", ["dkd", "nkd", "gdkd", "dist"])
def test_a_very_sure_student_has_a_finite_gradient(divergence):
    s = torch.tensor([[200.0, -200.0, 0.0, 0.0]], requires_grad=True)
    head = SoftTargetHead(divergence=divergence, top_k=2)
    signals = {"roi_logits": s, "roi_classes": torch.tensor([1])}
    (loss,) = head(signals, {"roi_logits": torch.zeros(1, 4)}, Batch([], [])).values()
    loss.backward()
    assert math.isfinite(loss.item())
    assert s.grad.isfinite().all()


def test_dist_on_dense_outputs_correlates_sigmoids_level_by_level():
    s, t = (torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in (0, 1))
    head = SoftTargetHead(sources=["dense"], divergence="dist", target_weight=2.0)
    counts = torch.tensor([4, 2])
    (loss,) = head({"dense_logits": s, "dense_counts": counts}, {"dense_logits": t}, Batch([], [])).values()
    expected = 0.0
    for level in (slice(0, 4), slice(4, 6)):
        p, q = (x[:, level].sigmoid().flatten(0, 1) for x in (t, s))
        for weight, dim in ((2.0, 1), (1.0, 0)):
            expected += weight * correlation_loss(q, p, dim=dim).item()
    assert loss.item() == pytest.approx(expected)


# ---- Anchors ----
def focal(s, t):
    """|q - p| BCE(q, p) of two logits."""
    p, q = 1 / (1 + math.exp(-t)), 1 / (1 + math.exp(-s))
    return abs(q - p) * -(p * math.log(q) + (1 - p) * math.log(1 - q))


def test_focal_anchors_of_a_one_stage_detector_are_divided_by_the_labelled_objects():
    s, t = torch.tensor([[[0.0], [1.0], [-2.0], [3.0]]]), torch.tensor([[[1.0], [1.5], [0.5], [-3.0]]])
    student = {"dense_logits": s, "dense_labels": torch.tensor([[0, 1, 0, -1]])}  # Of one class; the last is ignored.
    head = SoftTargetHead(sources=["dense"], anchors="focal")
    (loss,) = head(student, {"dense_logits": t}, Batch([], [])).values()
    assert loss.item() == pytest.approx((focal(0, 1) + focal(1, 1.5) + focal(-2, 0.5)) / 2, rel=1e-5)


def test_focal_anchors_of_an_rpn_are_divided_by_the_objects_that_the_teacher_sees():
    s, t = torch.tensor([[[0.0], [1.0], [-2.0]]]), torch.tensor([[[1.0], [1.5], [-0.5]]])
    head = SoftTargetHead(sources=["rpn"], anchors="focal")
    (loss,) = head({"rpn_logits": s}, {"rpn_logits": t}, Batch([], [])).values()
    assert loss.item() == pytest.approx((focal(0, 1) + focal(1, 1.5) + focal(-2, -0.5)) / 2, rel=1e-5)
    (none,) = head({"rpn_logits": s}, {"rpn_logits": -t.abs()}, Batch([], [])).values()
    assert none.item() == pytest.approx(focal(0, -1) + focal(1, -1.5) + focal(-2, -0.5), rel=1e-5)


SPEC = {
    "roi_logits": ShapeSpec(channels=CLASSES),
    "rpn_logits": ShapeSpec(channels=1),
    "dense_logits": ShapeSpec(channels=2),
}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"DIVERGENCE": "js"}, r"DIVERGENCE: 'js' is not one of kl, dkd, nkd, gdkd, dist"),
        ({"DIVERGENCE": "dkd", "OTHER_WEIGHT": -1.0}, r"OTHER_WEIGHT: must be 0 or more, got -1"),
        ({"DIVERGENCE": "dkd", "ADJUST": "probability_shift"}, r"ADJUST: must be 'none' with DIVERGENCE 'dkd'"),
        ({"DIVERGENCE": "nkd", "DYNAMIC_TEMPERATURE": "flsw"}, r"DYNAMIC_TEMPERATURE: must be 'none' with .*'nkd'"),
        ({"DIVERGENCE": "nkd", "BACKGROUND_WEIGHT": 0.5}, r"BACKGROUND_WEIGHT: must be 1.0 with .*'nkd', got 0.5"),
        ({"DIVERGENCE": "dist", "STANDARDIZE": True}, r"STANDARDIZE: must be False with DIVERGENCE 'dist', got True"),
        ({"DIVERGENCE": "dkd", "SOURCES": ["rpn"]}, r"DIVERGENCE: 'dkd' is for the sources roi, cls, but .*'rpn'"),
        ({"STANDARDIZE": True, "SOURCES": ["rpn"]}, r"STANDARDIZE: True is for the sources roi, cls, but .*'rpn'"),
        ({"DIVERGENCE": "dkd", "SOURCES": ["roi", "dense"]}, r"DIVERGENCE: 'dkd' is not for the source dense"),
        (
            {"DIVERGENCE": "dist", "SOURCES": ["dense"], "ANCHORS": "focal"},
            r"ANCHORS: must be 'weighted' with DIVERGENCE 'dist' of the source dense, .*got 'focal'\.$",
        ),
        ({"ANCHORS": "all"}, r"ANCHORS: 'all' is not one of weighted, focal"),
        ({"DIVERGENCE": "gdkd", "TOP_K": 4}, r"TOP_K: must be above 0 and below the number of logits, 4, got 4"),
        ({"DIVERGENCE": "gdkd", "TOP_K": 0}, r"TOP_K: must be above 0 .*got 0"),
    ],
)
def test_divergences_that_cannot_be(options, message):
    cfg = default_config()
    cfg.KD.HEADS = ["SoftTargetHead"]
    for key, value in options.items():
        cfg.KD.SOFT_TARGET[key] = value
    with pytest.raises(InputError, match=rf"^KD\.SOFT_TARGET\.{message}"):
        build_kd_heads(cfg, SPEC, SPEC)


@pytest.mark.parametrize("divergence", ["dkd", "nkd", "gdkd"])
def test_a_head_that_code_builds_refuses_a_softmax_of_dense_logits(divergence):
    with pytest.raises(InputError, match=f"^KD.SOFT_TARGET.DIVERGENCE: '{divergence}' is not for the source dense"):
        SoftTargetHead(sources=["dense"], divergence=divergence)


@pytest.mark.parametrize("divergence", ["dkd", "nkd", "gdkd", "dist"])
def test_nothing_waits_for_the_gpu(divergence):
    """Tensors without values raise where code asks for one."""
    targets = DividedTargets(divergence, top_k=2)
    with FakeTensorMode():
        logits, labels = torch.zeros(5, 4, requires_grad=True), torch.zeros(5, dtype=torch.int64)
        targets(logits, torch.zeros(5, 4), labels, labels == 0, torch.ones(5)).backward()
        assert logits.grad.shape == (5, 4)


@pytest.mark.parametrize("count", [2, 3])
def test_a_known_number_of_groups_changes_nothing(count):
    """An empty group has no weight."""
    s, t, groups = torch.randn(5, 4), torch.randn(5, 4), torch.tensor([[0, 1, 1, 0]] * 5)
    losses = [between_groups_loss(s, t, groups, temperature=2.0, count=n) for n in (None, count)]
    assert torch.equal(*losses)
