"""Values of the heads on class logits that a reader can check, or that published code gives."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from classification.models import classifier_cfg, classifier_inputs
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.utils.events import EventStorage
from helpers import build, distilled_cfg, step

from kd_det import Batch, InputError, Teacher, TeacherStudent, add_kd_config, build_kd_heads
from kd_det.heads import BornAgainHead, SoftmaxRegressionHead, SoftTargetHead
from kd_det.registry import config_key
from kd_det.taps import build_tap

from .signals import make_signals, make_spec

BATCH = Batch([], [(8, 8)] * 3)
LOG3 = math.log(3)
# KL of (1/2, 1/2) from (3/4, 1/4) and from (1/4, 3/4), which are the softmax of (0, 0) and of (log 3, 0) or (0, log 3)
KL = 3 / 4 * math.log(3 / 2) + 1 / 4 * math.log(1 / 2)


def classifier(student, teacher, labels):
    own = {"logits": torch.tensor(student, dtype=torch.float64), "labels": torch.tensor(labels)}
    return own, {"logits": torch.tensor(teacher, dtype=torch.float64)}


def boxes(student, teacher, classes):
    own = {"roi_logits": torch.tensor(student), "roi_classes": torch.tensor(classes)}
    return own, {"roi_logits": torch.tensor(teacher)}


def make_head(name, options, specs=None):
    cfg = get_cfg()
    add_kd_config(cfg)
    cfg.KD.HEADS = [name]
    cfg.merge_from_list([part for key, value in options.items() for part in (f"KD.{key}", value)])
    return build_kd_heads(cfg, *(specs or (make_spec(6), make_spec(6))))[name]


# ---- Soft targets: knowledge adjustment and dynamic temperatures ----
# Of these three rows the teacher is wrong about the first and the last.
LESSONS = classifier(
    [[1.0, 0.2, -0.5, 0.3], [0.0, 1.0, 0.5, -1.0], [0.4, 0.1, 0.2, 0.9]],
    [[0.5, 2.0, 0.1, -0.3], [0.1, 1.5, 0.3, 0.2], [0.2, 0.6, 0.3, 1.1]],
    [0, 1, 2],
)
TAUS = {"flsw": [3.4653423603250832, 4.136191692058662, 4.3984659476162555],
        "cwsm": [4.216067637085221, 4.334665724957966, 3.4492665379568133]}  # fmt: skip


def soft_targets(signals=LESSONS, source="cls", **options):
    head = SoftTargetHead(sources=[source], **{"temperature": 4.0, **options})
    return head(*signals, BATCH)[f"loss_kd_soft_target_{source}"].item()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 0.22479386251617384),
        ({"adjust": "probability_shift"}, 0.1569895802367545),
        ({"dynamic_temperature": "flsw", "beta": 2.0, "gamma": 2.0}, 0.2270202417493289),
        ({"dynamic_temperature": "cwsm", "beta": 2.0}, 0.2243761856046442),
        # Without T^2.
        ({"squared_temperature": False}, 0.22479386251617384 / 16),
        ({"dynamic_temperature": "flsw", "beta": 2.0, "squared_temperature": False}, 0.017556209596617755),
    ],
)
def test_reference_values_of_lessons(options, expected):
    assert soft_targets(**options) == pytest.approx(expected, abs=1e-9)


def divergence(target, logits, temperature):
    """KL of a student's softened probabilities from a target, without T^2."""
    return F.kl_div((torch.tensor(logits) / temperature).log_softmax(0), torch.tensor(target), reduction="sum").item()


def test_rows_of_smoothed_labels_go_without_the_squared_temperature():
    """Rows 0 and 2 become 0.9 at the label and 0.1 / 3 elsewhere; row 1, T^2 KL, is as it was."""
    student, teacher = (x["logits"].tolist() for x in LESSONS)
    rest = 0.1 / 3
    smoothed = divergence([0.9, rest, rest, rest], student[0], 4), divergence([rest, rest, 0.9, rest], student[2], 4)
    kept = 16 * divergence((torch.tensor(teacher[1]) / 4).softmax(0).tolist(), student[1], 4)
    assert soft_targets(adjust="label_smoothing") == pytest.approx((sum(smoothed) + kept) / 3, abs=1e-6)
    # With T^2 they would give nearly all of the loss: 9.6167 is the value of code that keeps it.
    assert (16 * sum(smoothed) + kept) / 3 == pytest.approx(9.616719026704216, abs=1e-5)


@pytest.mark.parametrize("kind", TAUS)
def test_adjustment_comes_before_the_temperatures(kind):
    """Temperatures are those of the teacher as it is; the corrected rows are softened by them."""
    student, teacher = (x["logits"] for x in LESSONS)
    shifted = teacher[:, [0, 1, 2, 3]].clone()
    shifted[0, [0, 1]], shifted[2, [2, 3]] = teacher[0, [1, 0]], teacher[2, [3, 2]]
    rows = [
        tau**2 * divergence((t / tau).softmax(0).tolist(), s.tolist(), tau)
        for s, t, tau in zip(student, shifted, TAUS[kind], strict=True)
    ]
    loss = soft_targets(adjust="probability_shift", dynamic_temperature=kind, beta=2.0)
    assert loss == pytest.approx(sum(rows) / 3, abs=1e-6)


@pytest.mark.parametrize(
    ("adjust", "background", "expected"),
    [
        # One class and background, teacher (1/4, 3/4) on all boxes. What is labelled background stays.
        ("none", 0, 4 * KL),
        # The object's row becomes (3/4, 1/4), as far from the student's (1/2, 1/2) as before.
        ("probability_shift", 0, 4 * KL),
        # It becomes (9/10, 1/10).
        ("label_smoothing", 0, 3 * KL + 0.9 * math.log(1.8) + 0.1 * math.log(0.2)),
        ("label_smoothing", 1, 3 * KL + KL),
    ],
)
def test_adjustment_is_for_foreground_boxes(adjust, background, expected):
    signals = boxes([[0.0, 0.0]] * 4, [[0.0, LOG3]] * 4, [background, 1, 1, 1])
    loss = soft_targets(signals, "roi", adjust=adjust, temperature=1.0)
    assert loss == pytest.approx(expected / 4, abs=1e-6)


def test_shifted_boxes_pull_towards_their_label():
    own, other = boxes([[0.0, 0.0]] * 2, [[0.0, LOG3]] * 2, [0, 1])
    own["roi_logits"].requires_grad_()
    head = SoftTargetHead(adjust="probability_shift")
    head(own, other, BATCH)["loss_kd_soft_target_roi"].backward()
    # (q - p) / R: the object from (1/2, 1/2) to (3/4, 1/4), background to (1/4, 3/4)
    np.testing.assert_allclose(own["roi_logits"].grad, [[-1 / 8, 1 / 8], [1 / 8, -1 / 8]], atol=1e-7)


def test_background_boxes_keep_their_temperature():
    """Three objects whose temperatures published code gives, among boxes of background at 4."""
    student, teacher = (x["logits"].tolist() for x in LESSONS)
    extra = [[3.0, -1.0, 0.5, 0.2]], [[-2.0, 0.0, 1.0, 4.0]]
    signals = boxes(extra[0] + student + extra[0], extra[1] + teacher + extra[1], [3, 0, 1, 2, 3])
    alone = 16 * divergence((torch.tensor(extra[1][0]) / 4).softmax(0).tolist(), extra[0][0], 4)
    loss = soft_targets(signals, "roi", dynamic_temperature="flsw", beta=2.0)
    assert loss == pytest.approx((3 * 0.2270202417493289 + 2 * alone) / 5, abs=1e-6)
    foreground = soft_targets(signals, "roi", dynamic_temperature="flsw", beta=2.0, rois="foreground")
    assert foreground == pytest.approx(0.2270202417493289, abs=1e-6)


@pytest.mark.parametrize(("beta", "share"), [(0.0, 0.0), (2.0, 0.0), (20.0, 1 / 3), (1000.0, 1.0)])
def test_share_of_clamped_temperatures_is_logged(beta, share):
    """Within 1 and 8. flsw's weights are 0.476, 0.140, 0.009, their mean 0.209: 20 times the distance is -5.3, 1.4, 4.0
    (to 8.0, just inside)."""
    with EventStorage() as storage:
        soft_targets(dynamic_temperature="flsw", beta=beta)
        assert storage.latest()["kd/dtd_clamped"][0] == pytest.approx(share)
    soft_targets(dynamic_temperature="flsw")  # without a storage there is nothing to log to


def test_no_boxes_have_no_temperatures():
    own, other = boxes([[0.0, 0.0]], [[0.0, LOG3]], [1])
    with EventStorage() as storage:
        loss = soft_targets((own, other), "roi", dynamic_temperature="cwsm", temperature=1.0)
        assert storage.latest()["kd/dtd_clamped"][0] == 0
    assert loss == pytest.approx(KL, abs=1e-6)


# ---- SRRL ----
# Of three channels each the student's connected map and the teacher's pooled feature, and the teacher's classifier.
CONNECTED = [[[[0.0, 0.78], [0.97, 0.43]], [[0.44, 0.98], [0.77, 0.02]], [[0.79, 0.97], [0.41, 0.46]]],
             [[[0.98, 0.76], [0.03, 0.8]], [[0.97, 0.4], [0.47, 0.98]], [[0.75, 0.05], [0.81, 0.96]]]]  # fmt: skip
TEACHER = [[[[0.35, 0.86], [1.16, 1.17]], [[0.89, 0.4], [0.19, 0.73]], [[1.1, 1.2], [1.0, 0.56]]],
           [[[0.02, 0.59], [1.02, 1.2]], [[1.08, 0.7], [0.15, 0.44]], [[0.92, 1.18], [1.14, 0.83]]]]  # fmt: skip
WEIGHT, BIAS = [[0.5, -1.0, 0.25], [1.0, 0.5, -0.5]], [0.1, -0.2]


def regression(in_feature="res4", **options):
    """A head whose connector changes nothing that is positive."""
    prefix = "roi_" if in_feature.startswith("roi_") else ""
    pooled = "roi_box_features" if prefix else "pooled"
    names = (pooled, *(f"{prefix}logits{part}" for part in ("", "_weight", "_bias")))
    head = SoftmaxRegressionHead(
        in_feature=in_feature, in_channels=3, out_channels=3, teacher_signals=names, norm="BN", **options
    )
    head.connector.weight.data = torch.eye(3)[:, :, None, None]
    feature = torch.tensor(TEACHER).mean(dim=(2, 3))
    values = feature, F.linear(feature, torch.tensor(WEIGHT), torch.tensor(BIAS)), torch.tensor(WEIGHT)
    return head.eval(), dict(zip(names, (*values, torch.tensor(BIAS)), strict=True))


@pytest.mark.parametrize(("kind", "expected"), [("mse", 0.04614736328124999), ("ce", 0.6981694834620156)])
def test_reference_values_of_softmax_regression(kind, expected):
    head, teacher = regression(kind=kind, feature_weight=3.0, logit_weight=5.0)
    losses = head({"res4": torch.tensor(CONNECTED)}, teacher, BATCH)
    # Batch norm that has seen nothing divides by the root of 1 + 1e-5.
    assert losses["loss_kd_softmax_regression_feature"].item() == pytest.approx(3 * 0.061277083333333336, abs=1e-5)
    assert losses["loss_kd_softmax_regression_logits"].item() == pytest.approx(5 * expected, abs=1e-5)


def test_the_classifier_passes_gradient_on_and_gets_none():
    head, teacher = regression("roi_box_features", feature_weight=0.0)
    pooled = torch.tensor(CONNECTED).mean(dim=(2, 3)).requires_grad_()
    layer = [teacher[name].requires_grad_() for name in ("roi_logits_weight", "roi_logits_bias")]
    sum(head({"roi_box_features": pooled}, teacher, BATCH).values()).backward()
    expected = [[-0.15484375, 0.076875, 0.015703125], [0.0296875, 0.1640625, -0.07453125]]
    np.testing.assert_allclose(pooled.grad, expected, atol=1e-5)
    assert [x.grad for x in layer] == [None, None]


def test_connector_is_linear_then_norm_then_relu():
    head, _ = regression("roi_box_features")
    head.train()
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    expected = ((x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()).relu()
    torch.testing.assert_close(head.connect(x), expected)


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_boxes_for_a_batch_norm(count):
    """It uses its running statistics then, and leaves them as they are."""
    head, teacher = regression("roi_box_features")
    head.train()
    rows = {name: x[:count] if name in ("roi_box_features", "roi_logits") else x for name, x in teacher.items()}
    losses = head({"roi_box_features": torch.ones(count, 3)}, rows, BATCH)
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in head.parameters())
    assert head.norm.running_mean.tolist() == [0, 0, 0]
    head.connect(torch.ones(2, 3))
    assert head.norm.running_mean.tolist() == pytest.approx([0.1] * 3)


def test_classes_of_student_and_teacher_may_differ():
    other = {**make_spec(9), "roi_logits": ShapeSpec(channels=81), "roi_logits_bias": ShapeSpec(channels=81)}
    assert make_head("SoftmaxRegressionHead", {}, (make_spec(6), other)).connector.weight.shape == (9, 6, 1, 1)


# ---- Born again ----
GENERATIONS = classifier(
    [[0.5, 1.5, -0.5], [1.0, 0.0, 0.2], [0.1, 0.3, 0.7]],
    [[0.2, 3.0, 0.1], [0.9, 0.8, 0.1], [1.2, 0.1, 0.4]],
    [1, 0, 2],
)


def born_again(signals=GENERATIONS, **options):
    head = BornAgainHead(**{"source": "cls", **options})
    return head(*signals, BATCH)["loss_kd_born_again"]


@pytest.mark.parametrize(("kind", "expected"), [("ban", 0.9678547750020711), ("cwtm", 0.5665446220561378)])
def test_reference_values_of_born_again(kind, expected):
    assert born_again(kind=kind).item() == pytest.approx(expected, abs=1e-6)


def test_permuted_dark_knowledge_by_hand():
    """Of (1/2, 1/3, 1/6) the last two change places or do not; the student's log-probabilities are -1, -2 and -4, up to
    a constant: 1/2 + 2/3 + 4/6 or 1/2 + 4/3 + 2/6."""
    constant = math.log(math.exp(-1) + math.exp(-2) + math.exp(-4))
    signals = classifier([[-1.0, -2.0, -4.0]], [np.log([1 / 2, 1 / 3, 1 / 6]).tolist()], [0])
    torch.manual_seed(0)
    head = BornAgainHead(kind="dkpp", source="cls")
    losses = [head(*signals, BATCH)["loss_kd_born_again"].item() - constant for _ in range(20)]
    assert {round(loss, 4) for loss in losses} == {round(11 / 6, 4), round(13 / 6, 4)}  # a fresh one at every step
    # Every row has its own permutation.
    many = [{key: x.expand(40, -1) if x.dim() == 2 else x for key, x in side.items()} for side in signals]
    assert 11 / 6 + 1e-3 < born_again(many, kind="dkpp").item() - constant < 13 / 6 - 1e-3


def test_compiled_dark_knowledge():
    """Of any number of rows, without code generation, which takes a minute."""
    compiled = torch.compile(born_again_of_rows, dynamic=True, backend="eager", fullgraph=True)
    for rows in (2, 5):
        torch.manual_seed(0)
        expected = born_again_of_rows(torch.zeros(rows, 3))
        torch.manual_seed(0)
        assert torch.equal(compiled(torch.zeros(rows, 3)), expected)


def born_again_of_rows(x):
    logits = {"logits": x + torch.tensor([1.0, 2.0, 4.0])}
    return BornAgainHead(kind="dkpp", source="cls")(logits, logits, BATCH)["loss_kd_born_again"]


def test_confidence_is_weighed_among_foreground_boxes():
    """Two objects, of which the teacher is sure by 3/4 and 1/4 + 1/4, and two boxes of background.

    Their cross-entropies are a, b and twice c. The objects' half of the mean goes to them as 0.6 and 0.4."""
    teacher = np.log([[3 / 4, 1 / 8, 1 / 8], [1 / 4, 1 / 2, 1 / 4], [0.01, 0.01, 0.98], [0.01, 0.01, 0.98]])
    student = [[1.0, 0.0, 0.0], [0.0, -1.0, 0.0], [0.0, 0.0, 2.0], [0.0, 0.0, 2.0]]
    a, b = math.log(math.e + 2) - 1, math.log(math.exp(-1) + 2) + 1
    c = math.log(2 + math.exp(2)) - 2
    signals = boxes(student, teacher.tolist(), [0, 1, 2, 2])
    loss = born_again(signals, kind="cwtm", source="roi")
    assert loss.item() == pytest.approx((0.6 * a + 0.4 * b) / 2 + 2 * c / 4, abs=1e-6)
    # A teacher that is equally sure of both leaves the plain mean.
    signals[1]["roi_logits"][:2] = 0.0
    assert born_again(signals, kind="cwtm", source="roi").item() == pytest.approx((a + b + 2 * c) / 4, abs=1e-6)


@pytest.mark.parametrize("kind", ["ban", "cwtm", "dkpp"])
def test_born_again_takes_the_place_of_the_labels(kind, teacher, inputs):
    plain = step(build(distilled_cfg(teacher, [])), inputs)
    for labels in (True, False):
        options = {"KD.BORN_AGAIN.KIND": kind, "KD.BORN_AGAIN.LABELS": labels}
        model = build(distilled_cfg(teacher, ["BornAgainHead"], options))
        losses = step(model, inputs)
        assert losses.pop("loss_kd_born_again") > 0
        assert losses.pop("loss_cls") == (plain["loss_cls"] if labels else 0)
        assert all(torch.equal(loss, plain[key]) for key, loss in losses.items())  # RPN, boxes, masks
        assert set(losses) == set(plain) - {"loss_cls"}


def test_labels_are_back_while_the_head_is_off(teacher, inputs):
    model = build(distilled_cfg(teacher, ["BornAgainHead"], {"KD.BORN_AGAIN.SCHEDULE.START": 5}))
    losses = step(model, inputs)
    assert losses["loss_cls"] > 0
    assert "loss_kd_born_again" not in losses


def test_student_without_the_loss_that_is_to_be_replaced(teacher, inputs):
    cfg = distilled_cfg(teacher, ["BornAgainHead"], {"KD.BORN_AGAIN.LABELS": False}, family="cascade")
    told = "^KD.HEADS: BornAgainHead takes the place of loss_cls, but the student's losses are .*loss_cls_stage0"
    with pytest.raises(InputError, match=told):
        build(cfg)
    cfg.KD.BORN_AGAIN.LABELS = True
    assert step(build(cfg), inputs)["loss_cls_stage2"] > 0


# ---- In training ----
LESSON_OPTIONS = {"KD.SOFT_TARGET.ADJUST": "label_smoothing", "KD.SOFT_TARGET.DYNAMIC_TEMPERATURE": "flsw"}
HEADS = ["SoftTargetHead", "SoftmaxRegressionHead", "BornAgainHead"]


def check_step(model, inputs):
    with EventStorage() as storage:
        losses = model(inputs)
        assert 0 <= storage.latest()["kd/dtd_clamped"][0] <= 1
    assert {f"loss_kd_softmax_regression_{part}" for part in ("feature", "logits")} < losses.keys()
    sum(losses.values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_a_detector_trains_with_all_of_them(teacher, inputs):
    options = LESSON_OPTIONS | {"KD.BORN_AGAIN.KIND": "dkpp"}
    check_step(build(distilled_cfg(teacher, HEADS, options)), inputs)


def test_a_classifier_trains_with_all_of_them():
    """The pooled feature of MobileNet comes from a layer behind its last map; the teacher's classifier takes that."""
    options = {"KD.BORN_AGAIN.SOURCE": "cls", "KD.SOFTMAX_REGRESSION.IN_FEATURE": "res5", "KD.HEADS": HEADS}
    cfg = classifier_cfg("timm", options=options | LESSON_OPTIONS)
    student, other = build(cfg), Teacher(build(classifier_cfg("timm", teacher=True)))
    heads = build_kd_heads(cfg, build_tap(student).spec(), other.tap.spec())
    assert heads["SoftmaxRegressionHead"].connector.out_channels == other.model.linear.in_features
    check_step(TeacherStudent(student=student, teacher=other, heads=heads).train(), classifier_inputs(64))


# ---- Options that cannot be ----
@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("SoftTargetHead", {"ADJUST": "shift"}, r"ADJUST: 'shift' is not one of none, probability_shift, label_sm"),
        ("SoftTargetHead", {"DYNAMIC_TEMPERATURE": "x"}, r"DYNAMIC_TEMPERATURE: 'x' is not one of none, flsw, cwsm\."),
        ("SoftTargetHead", {"CORRECT_PROB": 0.0}, "CORRECT_PROB: must be above 0 and at most 1, got 0.0"),
        ("SoftTargetHead", {"BETA": -1.0}, "BETA: must be 0 or more, got -1.0"),
        ("SoftTargetHead", {"GAMMA": 0.0}, "GAMMA: must be above 0, got 0.0"),
        (
            "SoftTargetHead",
            {"ADJUST": "label_smoothing", "SOURCES": ["rpn"]},
            r"ADJUST: 'label_smoothing' is for the sources roi and cls, but KD.SOFT_TARGET.SOURCES is \['rpn'\]\.",
        ),
        ("SoftmaxRegressionHead", {"IN_FEATURE": "roi_features"}, "IN_FEATURE: 'roi_features' cannot enter a class"),
        ("SoftmaxRegressionHead", {"IN_FEATURE": "p9"}, "IN_FEATURE: 'p9' is not a signal of the student"),
        ("SoftmaxRegressionHead", {"KIND": "kl"}, r"KIND: 'kl' is not one of mse, ce\."),
        ("SoftmaxRegressionHead", {"LOGIT_WEIGHT": -1.0}, "LOGIT_WEIGHT: must be 0 or more, got -1.0"),
        ("BornAgainHead", {"KIND": "BAN"}, r"KIND: 'BAN' is not one of ban, cwtm, dkpp\."),
        ("BornAgainHead", {"SOURCE": "rpn"}, r"SOURCE: 'rpn' is not one of roi, cls\."),
    ],
)
def test_options_that_cannot_be(name, options, told):
    node = config_key(name)
    with pytest.raises(InputError, match=rf"^KD\.{node}\.{told}"):
        make_head(name, {f"{node}.{key}": value for key, value in options.items()})


def test_born_again_needs_equal_classes():
    specs = make_spec(6), {**make_spec(6), "logits": ShapeSpec(channels=7)}
    with pytest.raises(InputError, match=r"^KD.BORN_AGAIN.SOURCE: .* logits has 3 channels in the student and 7 in"):
        make_head("BornAgainHead", {"BORN_AGAIN.SOURCE": "cls"}, specs)


def test_heads_from_the_config_have_its_values():
    options = {"ADJUST": "label_smoothing", "CORRECT_PROB": 0.7, "TEMPERATURE": 2.0, "SQUARED_TEMPERATURE": False}
    head = make_head("SoftTargetHead", {f"SOFT_TARGET.{key}": value for key, value in options.items()})
    student, teacher = (make_signals(make_spec(6), seed=seed) for seed in (0, 1))
    options = {key.lower(): value for key, value in options.items()}
    expected = SoftTargetHead(**options)(student, teacher, BATCH)
    assert head(student, teacher, BATCH) == expected
