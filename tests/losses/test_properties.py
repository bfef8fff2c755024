"""What must hold for every loss, and what distinguishes each."""

import functools
import math
from functools import partial

import pytest
import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from torch.utils.flop_counter import FlopCounterMode

from kd_det import losses
from kd_det.losses.numerics import in_float32

LOGITS, BOXES, MAPS = (4, 5), (4, 4), (2, 3, 4, 6)
MARGIN = torch.tensor([-0.5, -1.0, -0.2])


def of_pair(loss, **options):
    """A loss as a function of student and teacher alone; options that are functions are computed from the student."""

    @functools.wraps(loss)
    def compare(s, t):
        return loss(s, t, **{key: value(s) if callable(value) else value for key, value in options.items()})

    return compare


def some_classes(s):
    """Another pair of the classes for each row, as a mask."""
    return torch.eye(len(s), 5).bool() | torch.eye(len(s), 5).roll(1, dims=1).bool()


def some_cells(s):
    return torch.ones(len(s), 1, *s.shape[2:]).cumsum(dim=3) % 3 > 0


def of_boxes(s, t):
    """The overlap of boxes whose corners are in order, whatever the numbers."""
    s, t = (torch.cat((x[:, :2], x[:, :2] + x[:, 2:].abs() + 1), dim=1) for x in (s, t))
    return losses.box_overlap_loss(s, t, weights=torch.ones(len(s)), normalizer=2.0)


# name: (loss of student and teacher, shape)
LOSSES = {
    "soft_target": (of_pair(losses.soft_target_loss, temperature=3.0), LOGITS),
    "soft_target_weighted": (
        of_pair(losses.soft_target_loss, temperature=2.0, weights=lambda s: torch.linspace(1, 1.5, len(s))),
        LOGITS,
    ),
    "binary_soft_target": (losses.binary_soft_target_loss, LOGITS),
    "focal_soft_target": (of_pair(losses.focal_soft_target_loss, normalizer=3.0), LOGITS),
    "focal_soft_target_weighted": (
        of_pair(losses.focal_soft_target_loss, beta=2, weights=lambda s: torch.arange(len(s)), normalizer=3.0),
        LOGITS,
    ),
    "within_group": (of_pair(losses.within_group_loss, mask=some_classes, temperature=2.0), LOGITS),
    "between_groups": (
        of_pair(losses.between_groups_loss, groups=lambda s: some_classes(s).long(), temperature=2.0),
        LOGITS,
    ),
    "target_class": (of_pair(losses.target_class_loss, labels=lambda s: torch.arange(len(s))), LOGITS),
    "correlation_of_rows": (of_pair(losses.correlation_loss, dim=1), LOGITS),
    "correlation_of_columns": (of_pair(losses.correlation_loss, dim=0), LOGITS),
    "mutual": (losses.mutual_loss, LOGITS),
    "softmax_regression_mse": (losses.softmax_regression_loss, LOGITS),
    "softmax_regression_ce": (of_pair(losses.softmax_regression_loss, kind="ce"), LOGITS),
    "born_again": (losses.born_again_loss, LOGITS),
    "box_overlap": (functools.wraps(losses.box_overlap_loss)(of_boxes), BOXES),
    "bounded_regression": (of_pair(losses.bounded_regression_loss, targets=torch.zeros_like), BOXES),
    "distance_relation": (losses.distance_relation_loss, LOGITS),
    "angle_relation": (losses.angle_relation_loss, LOGITS),
    "similarity_gram": (losses.similarity_loss, MAPS),
    "similarity_cosine": (of_pair(losses.similarity_loss, kind="cosine"), MAPS),
    "node": (losses.node_loss, MAPS),
    "edge": (losses.edge_loss, MAPS),
    "channel_wise": (of_pair(losses.channel_wise_loss, temperature=2.0), MAPS),
    "pearson": (losses.pearson_loss, MAPS),
    "pearson_masked": (of_pair(losses.pearson_loss, mask=some_cells), MAPS),
    "focal": (of_pair(losses.focal_loss, weight=lambda s: s.new_ones(len(s), *s.shape[2:])), MAPS),
    "attention": (losses.attention_loss, MAPS),
    "relation": (functools.wraps(losses.relation_loss)(lambda s, t: losses.relation_loss(s, t.detach())), MAPS),
    "region": (of_pair(losses.region_loss, mask=some_cells), MAPS),
    "masked_generation": (losses.masked_generation_loss, MAPS),
    "attention_transfer": (losses.attention_transfer_loss, MAPS),
    "attention_transfer_sum": (of_pair(losses.attention_transfer_loss, reduction="sum_hw"), MAPS),
    "input_gradient": (losses.input_gradient_loss, MAPS),
    "hint": (losses.hint_loss, MAPS),
    "hierarchical_context": (losses.hierarchical_context_loss, MAPS),
    "factor_transfer": (losses.factor_transfer_loss, MAPS),
    "factor_transfer_p2": (of_pair(losses.factor_transfer_loss, p=2), MAPS),
    "feature_matching": (losses.feature_matching_loss, MAPS),
    "activation_boundary": (losses.activation_boundary_loss, MAPS),
    "overhaul": (of_pair(losses.overhaul_loss, margin=MARGIN), MAPS),
    **{f"inheritance_{k}": (of_pair(losses.inheritance_loss, kind=k), MAPS) for k in ("at", "ft", "od")},
    **{f"exploration_{k}": (of_pair(losses.exploration_loss, kind=k), MAPS) for k in ("at", "ft", "od")},
}
CROSS_ENTROPIES = {"softmax_regression_ce", "born_again"}  # least, but not zero, where student and teacher agree
ELSEWHERE = {"activation_boundary", "overhaul", "target_class"}  # zero elsewhere: see the golden tests
CORRELATIONS = {"correlation_of_rows", "correlation_of_columns"}  # zero but for the eps in the divisor

each_loss = pytest.mark.parametrize(("loss", "shape"), LOSSES.values(), ids=LOSSES)


def pair(shape, dtype=torch.float64, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    return (scale * torch.randn(2, *shape, generator=generator, dtype=torch.float64)).to(dtype)


def test_every_loss_is_in_the_table():
    functions = {loss.__name__ for loss, _ in LOSSES.values()}
    assert functions == {name for name in losses.__all__ if name.endswith("_loss")}


@each_loss
def test_gradcheck(loss, shape):
    student, teacher = pair(shape)
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher), student.requires_grad_())


@each_loss
def test_teacher_gets_no_gradient(loss, shape):
    student, teacher = (x.clone().requires_grad_() for x in pair(shape))
    loss(student, teacher).backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in ELSEWHERE])
def test_equal_inputs(name):
    loss, shape = LOSSES[name]
    student = pair(shape)[0].requires_grad_()
    value = loss(student, student.detach().clone())
    value.backward()
    if name in CROSS_ENTROPIES:
        torch.testing.assert_close(student.grad, torch.zeros_like(student), rtol=0, atol=1e-12)
    elif name in CORRELATIONS:
        torch.testing.assert_close(
            (value, student.grad), (torch.zeros_like(value), torch.zeros_like(student)), rtol=0, atol=1e-7
        )
    else:
        assert value == 0
        assert student.grad.isfinite().all()


@each_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_computes_in_float32_at_least(loss, shape, dtype):
    student, teacher = (x.clone().requires_grad_() for x in pair(shape, dtype, scale=400))  # 400^2 is inf in float16
    value = loss(student, teacher)
    value.backward()
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert value.shape == ()
    assert value.isfinite()
    assert student.grad.dtype == dtype


@each_loss
def test_autocast_changes_nothing(loss, shape):
    student, teacher = pair(shape, torch.float32)
    outside = loss(student, teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss(student, teacher), outside)


def test_decorator_switches_autocast_off():
    x = pair((3, 3), torch.float32)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
        assert in_float32(torch.matmul)(x, x).dtype == torch.float32
        assert in_float32(torch.matmul)(input=x.half(), other=x).dtype == torch.float32


@each_loss
def test_no_rois_give_zero_with_gradient(loss, shape):
    student, teacher = torch.zeros(0, *shape[1:], requires_grad=True), torch.zeros(0, *shape[1:])
    value = loss(student, teacher)
    assert value == 0
    assert value.grad_fn is not None
    value.backward()


def test_no_rows_in_targets():
    probs, labels = torch.zeros(0, 5), torch.zeros(0, dtype=torch.long)
    assert losses.adjust_probability_shift(probs, labels).shape == (0, 5)
    assert losses.adjust_label_smoothing(probs, labels).shape == (0, 5)
    assert losses.permute_dark_knowledge(probs).shape == (0, 5)
    assert losses.confidence_weights(probs).shape == (0,)
    assert losses.dynamic_temperature(probs, probs, base=4.0, beta=1.0).shape == (0,)
    assert losses.attention_map(torch.zeros(0, 3, 4, 6)).shape == (0, 24)


def test_temperature_squared_keeps_the_gradient():
    student, teacher = pair(LOGITS)
    # T^2 KL(softmax(t / T), softmax(s / T)): scaling logits and temperature alike scales the loss by the square
    torch.testing.assert_close(
        losses.soft_target_loss(5 * student, 5 * teacher, temperature=5.0),
        25 * losses.soft_target_loss(student, teacher, temperature=1.0),
    )
    # for high temperatures the gradient tends to (s - t) / (N K) with centred logits, whatever T
    student.requires_grad_()
    centred = (student - student.mean(1, True) - teacher + teacher.mean(1, True)).detach() / student.numel()
    for temperature in (1e3, 1e4):
        (gradient,) = torch.autograd.grad(losses.soft_target_loss(student, teacher, temperature=temperature), student)
        torch.testing.assert_close(gradient, centred, rtol=0, atol=1e-3)


@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
def test_a_small_divergence_keeps_its_digits_in_float32(temperature):
    """High temperatures make all probabilities nearly equal, and the terms of the divergence cancel each other."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        s, t = torch.randn(2, 16, 10, generator=generator)
        expected = losses.soft_target_loss(s.double(), t.double(), temperature=temperature)
        found = losses.soft_target_loss(s, t, temperature=temperature).double()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_a_small_binary_divergence_keeps_its_digits_in_float32():
    s = 3 * torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
    t = s + 0.01 * torch.randn(s.shape, generator=torch.Generator().manual_seed(1))
    for own, other in zip(s, t, strict=True):
        expected = losses.binary_soft_target_loss(own.double(), other.double())
        torch.testing.assert_close(losses.binary_soft_target_loss(own, other).double(), expected, rtol=1e-4, atol=0)


def test_a_divergence_is_never_negative():
    s, t = 1e-3 * torch.randn(2, 100, 3, generator=torch.Generator().manual_seed(0))
    for own, other in zip(s, t, strict=True):
        assert losses.soft_target_loss(own[None], other[None], temperature=4.0) >= 0
        assert losses.binary_soft_target_loss(own, other) >= 0


def test_classes_that_the_teacher_rules_out():
    """0 * log 0 is 0, also beside a student that is far away or rules them out as well."""
    teacher = torch.tensor([[0.0, 0.0, -torch.inf, -1e4]], dtype=torch.float64)
    student = torch.tensor([[0.0, 200.0, 3.0, -torch.inf]], dtype=torch.float64, requires_grad=True)
    loss = losses.soft_target_loss(student, teacher, temperature=1.0)
    torch.testing.assert_close(loss.item(), 100 - math.log(2))
    loss.backward()
    torch.testing.assert_close(student.grad[0], torch.tensor([-0.5, 0.5, 0.0, 0.0], dtype=torch.float64))


def test_attention_ignores_positive_scale():
    student, teacher = pair(MAPS)
    assert losses.attention_transfer_loss(7 * student, 0.1 * student) < 1e-12
    torch.testing.assert_close(
        losses.attention_transfer_loss(7 * student, 0.1 * teacher), losses.attention_transfer_loss(student, teacher)
    )
    torch.testing.assert_close(losses.attention_map(student).norm(dim=1), torch.ones(2, dtype=torch.float64))


def test_inheritance_and_exploration_are_opposite():
    student, teacher = pair(MAPS)
    for kind in ("at", "ft", "od"):
        assert losses.exploration_loss(student, teacher, kind=kind) == -losses.inheritance_loss(
            student, teacher, kind=kind
        )


MASKED = {
    "hint": losses.hint_loss,
    "attention": losses.attention_transfer_loss,
    "attention_sum": partial(losses.attention_transfer_loss, reduction="sum_hw"),
    "hierarchical_context": partial(losses.hierarchical_context_loss, levels=(1,)),  # finer grids fall on other cells
    "channel_wise": losses.channel_wise_loss,
    "pearson": losses.pearson_loss,
    "masked_generation": losses.masked_generation_loss,
    "masked_generation_mean": partial(losses.masked_generation_loss, reduction="mean"),
}


@pytest.mark.parametrize("loss", MASKED.values(), ids=MASKED)
def test_masked_loss_is_the_loss_of_the_cropped_map(loss):
    student, teacher = pair((2, 3, 5, 8))
    mask = torch.zeros(2, 1, 5, 8, dtype=torch.bool)
    mask[..., :4, :6] = True
    cropped = loss(student[..., :4, :6], teacher[..., :4, :6])
    torch.testing.assert_close(loss(student * mask, teacher * mask, mask=mask), cropped)
    torch.testing.assert_close(loss(student, teacher, mask=mask), cropped)  # whatever lies outside


@pytest.mark.parametrize("loss", [*MASKED.values(), losses.hierarchical_context_loss])
def test_full_and_empty_masks(loss):
    student, teacher = pair((2, 3, 5, 8))
    mask = torch.ones(2, 1, 5, 8, dtype=torch.bool)
    torch.testing.assert_close(loss(student, teacher, mask=mask), loss(student, teacher))
    value = loss(student.requires_grad_(), teacher, mask=~mask)
    assert value == 0
    value.backward()
    assert student.grad.eq(0).all()


def test_weights_of_zero():
    student, teacher = pair(LOGITS)
    value = losses.binary_soft_target_loss(student.requires_grad_(), teacher, weights=torch.zeros(LOGITS))
    assert value == 0
    assert value.grad_fn is not None


def test_permuted_dark_knowledge():
    probs = pair((50, 6))[0].softmax(dim=1)
    first, again = (losses.permute_dark_knowledge(probs, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, losses.permute_dark_knowledge(probs))
    assert torch.equal(first.max(dim=1).values, probs.max(dim=1).values)
    assert torch.equal(first.argmax(dim=1), probs.argmax(dim=1))
    assert torch.equal(first.sort(dim=1).values, probs.sort(dim=1).values)


def test_adjusted_targets_are_new_distributions():
    probs, labels = pair(LOGITS)[0].softmax(dim=1), torch.tensor([0, 1, 2, 3])
    before = probs.clone()
    for adjusted in (
        losses.adjust_probability_shift(probs, labels),
        losses.adjust_label_smoothing(probs, labels, correct_prob=0.9),
    ):
        assert torch.equal(probs, before)
        assert torch.equal(adjusted.argmax(dim=1), labels)
        torch.testing.assert_close(adjusted.sum(dim=1), torch.ones(4, dtype=torch.float64))
        right = probs.argmax(dim=1) == labels
        assert torch.equal(adjusted[right], probs[right])


@pytest.mark.parametrize("kind", ["flsw", "cwsm"])
def test_dynamic_temperatures_stay_in_bounds(kind):
    student, teacher = pair(LOGITS, scale=3)
    settings = {"kind": kind, "base": 4.0}
    free = losses.dynamic_temperature(student.requires_grad_(), teacher, beta=0.5, bounds=(0.1, 99), **settings)
    torch.testing.assert_close(free.mean(), torch.tensor(4.0, dtype=torch.float64))
    assert not free.requires_grad
    wild = losses.dynamic_temperature(student, teacher, beta=1e3, **settings)
    assert wild.min() == 1
    assert wild.max() == 8


def test_relation_loss_trains_both_blocks():
    student, teacher = (x.requires_grad_() for x in pair(MAPS))
    losses.relation_loss(student, teacher).backward()
    assert student.grad.abs().sum() > 0
    torch.testing.assert_close(teacher.grad, -student.grad)


def test_channels_without_variance_or_rows_without_direction():
    """Where a formula divides 0 by 0 the loss and the gradient stay finite and of moderate size."""
    student = torch.zeros(3, 4, 1, 2, requires_grad=True)
    teacher = torch.randn(3, 4, 1, 2, generator=torch.Generator().manual_seed(0))
    for loss in (losses.distance_relation_loss, losses.angle_relation_loss, losses.similarity_loss, losses.edge_loss):
        (gradient,) = torch.autograd.grad(loss(student, teacher), student)
        assert gradient.abs().max() < 10
    for loss in (losses.angle_relation_loss, losses.similarity_loss, losses.edge_loss):
        (gradient,) = torch.autograd.grad(loss(student + 1e-30 * teacher, teacher), student)
        assert gradient.abs().max() < 10
    (gradient,) = torch.autograd.grad(losses.pearson_loss(student, teacher), student)
    assert gradient.isfinite().all()
    logits = torch.ones(2, 3, requires_grad=True)
    assert losses.standardize_logits(logits).eq(0).all()
    assert losses.standardize_logits(logits[:, :1]).eq(0).all()


@pytest.mark.parametrize("name", ["channel_wise", "pearson", "attention", "focal"])
def test_maps_of_one_cell(name):
    student, teacher = pair((1, 3, 1, 1), torch.float32)
    value = LOSSES[name][0](student.requires_grad_(), teacher)
    value.backward()
    assert value.isfinite()
    assert student.grad.isfinite().all()
    if name in ("channel_wise", "pearson"):
        assert value == 0


def test_one_row():
    student, teacher = pair((1, 5), torch.float32)
    for loss in (losses.distance_relation_loss, losses.angle_relation_loss, losses.similarity_loss):
        assert loss(student, teacher) == 0
    assert losses.correlation_loss(student.softmax(1), teacher.softmax(1), dim=0) == 1  # the rows do not vary


def test_very_sure_students():
    """The logarithm of a sum of probabilities would be infinite in float32, and its gradient NaN."""
    student = torch.tensor([[200.0, 0.0, -1.0]], requires_grad=True)
    teacher = torch.tensor([[1.0, 2.0, 0.0]])
    target = torch.tensor([[True, False, False]])
    value = losses.between_groups_loss(student, teacher, target.long(), temperature=1.0)
    other = 1 / (1 + 1 / (math.exp(1) + math.exp(-1)))  # the teacher's probability of both other classes
    expected = other * (200 - math.log(1 + math.exp(-1))) + other * math.log(other) + (1 - other) * math.log(1 - other)
    assert value.item() == pytest.approx(expected, rel=1e-6)
    value += losses.within_group_loss(student, teacher, ~target, temperature=1.0)
    value += losses.target_class_loss(student, teacher, torch.tensor([1]))
    value += losses.focal_soft_target_loss(student, teacher, normalizer=1)
    value += losses.channel_wise_loss(student.view(1, 1, 1, 3), teacher.view(1, 1, 1, 3))
    value.backward()
    assert value.isfinite()
    assert student.grad.isfinite().all()


def test_parts_of_a_divergence_add_up():
    """DKD's identity: KL is the divergence between the groups, plus that within each, weighted by the teacher."""
    student, teacher = pair(LOGITS)
    mask = some_classes(student)
    share = (teacher / 2).softmax(dim=1).masked_fill(~mask, 0).sum(dim=1)
    parts = (
        losses.between_groups_loss(student, teacher, mask.long(), temperature=2.0)
        + losses.within_group_loss(student, teacher, mask, temperature=2.0, weights=share)
        + losses.within_group_loss(student, teacher, ~mask, temperature=2.0, weights=1 - share)
    )
    torch.testing.assert_close(parts, losses.soft_target_loss(student, teacher, temperature=2.0))


def test_groups_of_one_class_or_none():
    student, teacher = pair(LOGITS)
    nothing = torch.zeros(LOGITS, dtype=torch.bool)
    one = nothing.clone()
    one[:, 2] = True
    for mask in (nothing, one):
        value = losses.within_group_loss(student.requires_grad_(), teacher, mask, temperature=0.1)
        assert value == 0
        assert torch.autograd.grad(value, student)[0].eq(0).all()
    each = torch.arange(5).expand(LOGITS)
    torch.testing.assert_close(
        losses.between_groups_loss(student, teacher, each + 3, temperature=0.5),  # the groups 0 to 2 are empty
        losses.soft_target_loss(student, teacher, temperature=0.5),
    )


def test_pearson_ignores_affine_changes_of_the_teacher():
    student, teacher = pair(MAPS)
    changed = teacher * torch.tensor([3.0, 0.1, 7.0]).view(1, 3, 1, 1) - 5
    torch.testing.assert_close(
        losses.pearson_loss(student, changed, eps=0), losses.pearson_loss(student, teacher, eps=0)
    )
    # (M - 1) / M (1 - r) over M = N H W values of each channel
    channels = torch.stack((student, teacher)).transpose(0, 2).transpose(1, 2).flatten(2)
    expected = sum(1 - torch.corrcoef(both)[0, 1] for both in channels) / 3 * 47 / 48
    torch.testing.assert_close(losses.pearson_loss(student, teacher, eps=0), expected)


@pytest.mark.parametrize("loss", [losses.distance_relation_loss, losses.angle_relation_loss, losses.edge_loss])
def test_relations_do_not_depend_on_scale_or_width(loss):
    student, teacher = pair(LOGITS)
    wider = torch.cat((3 * student, torch.zeros(4, 7)), dim=1)
    torch.testing.assert_close(loss(wider, teacher), loss(student, teacher))


def test_decoded_boxes_are_those_of_detectron2():
    deltas, anchors = pair(BOXES, torch.float32)
    anchors = torch.cat((anchors[:, :2], anchors[:, :2] + anchors[:, 2:].abs() + 1), dim=1)
    deltas[0, 2] = 50  # beyond the bound
    weights = (10.0, 10.0, 5.0, 2.0)
    expected = Box2BoxTransform(weights).apply_deltas(deltas, anchors)
    torch.testing.assert_close(losses.decode_boxes(deltas, anchors, weights=weights), expected)
    assert losses.decode_boxes(deltas.double(), anchors.double(), weights=weights).dtype == torch.float64
    assert losses.decode_boxes(deltas[:0], anchors[:0], weights=weights).shape == (0, 4)


def test_boxes_without_area():
    boxes = torch.tensor([[3.0, 3.0, 3.0, 3.0], [1.0, 1.0, 4.0, 1.0]], requires_grad=True)
    value = losses.box_overlap_loss(boxes, boxes.detach().flip(0), weights=torch.ones(2), normalizer=1)
    value.backward()
    assert value.isfinite()
    assert boxes.grad.isfinite().all()


def test_margins_of_channels_that_do_not_vary():
    margins = losses.margin_from_batch_norm(torch.zeros(3), torch.tensor([-0.5, 0.0, 2.0]))
    assert margins.tolist() == [-0.5, 0, 0]


def test_the_backward_pass_of_cosines_is_one_matrix_product():
    """Forward there is one for either side. The gradient is that of both factors of a cosine."""
    s, t = torch.randn(6, 50, dtype=torch.float64, requires_grad=True), torch.randn(6, 50, dtype=torch.float64)
    with FlopCounterMode(display=False) as counter:
        losses.edge_loss(s, t).backward()
    assert counter.get_total_flops() == 3 * 2 * 6 * 6 * 50
    assert torch.autograd.gradcheck(lambda x: losses.edge_loss(x, t), s)
