"""CrossKD, with numbers that a reader can check."""

import math

import pytest
import torch
from detectron2.layers import ShapeSpec
from helpers import build, tiny_cfg
from test_taps import make, record

from kd_det import Batch, InputError, Teacher, build_kd_heads
from kd_det.heads import CrossHead
from kd_det.heads.cross import align
from kd_det.taps import build_tap

from .cases import make_cfg
from .signals import make_spec

NO_BATCH = Batch([], [(8, 8)])
LOG3 = math.log(3)


def test_alignment_by_hand():
    """0 and 2 have the mean 1, the others 30 and 10, so that 0 becomes 20 and 2 becomes 40; a single value is taken."""
    x = torch.tensor([[[[0.0, 2.0]], [[5.0, 5.0]]]])
    like = torch.tensor([[[[20.0, 40.0]], [[6.0, 8.0]]]])
    torch.testing.assert_close(align(x, like), torch.tensor([[[[20.0, 40.0]], [[7.0, 7.0]]]]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(align(x[..., :1], like[..., :1]), like[..., :1])


def signals(maps, layers, **more):
    """Signals of heads of two convolutions, all of 1 x 1 and of one channel: weight and bias of each layer."""
    hidden = {f"dense_{x}_hidden_p3": torch.tensor(maps).view(1, 1, 1, -1) for x in ("cls", "box")}
    parameters = {
        f"dense_{name}_{kind}": torch.tensor(x)
        for name, (weight, bias) in layers.items()
        for kind, x in (("weight", weight), ("bias", bias))
    }
    return hidden | parameters | more


def test_losses_by_hand():
    """One class, three cells with one anchor of 4 x 4 each, the last one left out; the student has a flat map.

    So it gets the mean of the teacher's map in each cell, 1, of which conv2 makes -LOG3 and its ReLU 0; the class is
    the bias 0 and the box that of the anchor. The teacher itself has LOG3 there, and boxes moved by half a width, whose
    GIoU with the anchors is 1/3.
    """
    layers = {
        "cls_conv2": ([[[[-LOG3]]]], [0.0]),
        "cls_score": ([[[[1.0]]]], [0.0]),
        "box_conv2": ([[[[-1.0]]]], [0.0]),
        "bbox_pred": ([[[[1.0]]]] * 4, [0.0] * 4),
    }
    teacher = signals(
        [0.0, 1.0, 2.0],
        layers,
        dense_logits=torch.full((1, 3, 1), LOG3),
        dense_deltas=torch.tensor([[[5.0, 0, 0, 0]] * 3]),
    )
    student = signals(
        [7.0] * 3,
        {},
        dense_labels=torch.tensor([[0, 1, -1]]),
        dense_anchors=torch.tensor([[4.0 * i, 0.0, 4.0 * i + 4, 4.0] for i in range(3)]),
        dense_scales=torch.tensor([10.0, 10.0, 5.0, 5.0]),
    )
    losses = CrossHead(levels=["p3"], hidden=1, class_weight=2.0, box_weight=3.0)(student, teacher, NO_BATCH)
    assert losses["loss_kd_cross_cls"].item() == pytest.approx(2 * 2 * (3 / 4 - 1 / 2) * math.log(2), rel=1e-5)
    assert losses["loss_kd_cross_box"].item() == pytest.approx(3 * 2 * 3 / 4 * (1 - 1 / 3), rel=1e-5)


def test_a_student_like_its_teacher_has_no_loss(inputs):
    """Its maps stay what they are, so that the teacher's layers make of them what the teacher predicts."""
    model = make("retinanet", {"MODEL.RETINANET.NUM_CONVS": 2})
    for x in model.head.parameters():
        x.data *= 10  # Maps of a new head are so small that the divisor's 1e-6 would matter.
    spec = build_tap(model).spec()
    head = build_kd_heads(make_cfg("CrossHead", {"HIDDEN": 1}), spec, spec)["CrossHead"]
    student = record(model, inputs, set(head.signals))
    teacher = Teacher(model)(inputs, set(head.teacher_signals), student)
    crossed = head._cross("cls", student, teacher, channels=model.num_classes)
    torch.testing.assert_close(crossed, teacher["dense_logits"], rtol=1e-4, atol=1e-4)
    assert all(loss.item() == pytest.approx(0, abs=1e-4) for loss in head(student, teacher, NO_BATCH).values())


# ---- What is refused when it is built ----
def specs(**options):
    """The signals of a RetinaNet with other options."""
    return build_tap(build(tiny_cfg("retinanet", {f"MODEL.RETINANET.{key}": x for key, x in options.items()}))).spec()


def refusal(student, teacher, **options):
    with pytest.raises(InputError) as error:
        build_kd_heads(make_cfg("CrossHead", options), student, teacher)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_heads_that_do_not_fit():
    spec = specs(NUM_CONVS=2)
    assert "CrossHead is for RetinaNets, and the teacher is none" in refusal(spec, {"p3": spec["p3"]}, HIDDEN=1)
    told = refusal(spec, specs(NUM_CONVS=2, NORM="BN"), HIDDEN=1)
    assert "without norms (MODEL.RETINANET.NORM ''), which the teacher does not have" in told
    assert "heads with 2 convolutions or more" in refusal(spec, specs(NUM_CONVS=1), HIDDEN=1)
    told = refusal(spec, specs(NUM_CONVS=3), HIDDEN=1)
    assert told.startswith("KD.CROSS.HIDDEN: must be 2, one less than the convolutions in the teacher's head")
    assert refusal(spec, spec).startswith("KD.CROSS.HIDDEN: must be 1, one less than the convolutions in the student's")
    assert "must know the same classes" in refusal(spec, specs(NUM_CLASSES=9, NUM_CONVS=2), HIDDEN=1)
    wide = {name: ShapeSpec(channels=99) if "_hidden_" in name else x for name, x in spec.items()}
    assert "equally many channels, but the student's has" in refusal(spec, wide, HIDDEN=1)


@pytest.mark.parametrize("weights", [(0.0, 0.0), (-1.0, 1.0)])
def test_weights_that_are_refused(weights):
    told = refusal(make_spec(6), make_spec(6), CLASS_WEIGHT=weights[0], BOX_WEIGHT=weights[1])
    assert told.startswith("KD.CROSS.CLASS_WEIGHT, KD.CROSS.BOX_WEIGHT: must be 0 or more, and one of them above 0")
