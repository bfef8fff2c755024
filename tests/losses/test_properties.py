"""What must hold for every loss, and what distinguishes each."""

import math
from functools import partial

import pytest
import torch

from kd_det import losses
from kd_det.losses.numerics import in_float32

LOGITS, MAPS = (4, 5), (2, 3, 4, 6)
MARGIN = torch.tensor([-0.5, -1.0, -0.2])

# name: (loss of student and teacher, shape)
LOSSES = {
    "soft_target": (partial(losses.soft_target_loss, temperature=3.0), LOGITS),
    "soft_target_weighted": (
        lambda s, t: losses.soft_target_loss(s, t, temperature=2.0, weights=torch.linspace(1, 1.5, len(s))),
        LOGITS,
    ),
    "binary_soft_target": (losses.binary_soft_target_loss, LOGITS),
    "mutual": (losses.mutual_loss, LOGITS),
    "softmax_regression_mse": (losses.softmax_regression_loss, LOGITS),
    "softmax_regression_ce": (partial(losses.softmax_regression_loss, kind="ce"), LOGITS),
    "born_again": (losses.born_again_loss, LOGITS),
    "attention_transfer": (losses.attention_transfer_loss, MAPS),
    "attention_transfer_sum": (partial(losses.attention_transfer_loss, reduction="sum_hw"), MAPS),
    "input_gradient": (losses.input_gradient_loss, MAPS),
    "hint": (losses.hint_loss, MAPS),
    "hierarchical_context": (losses.hierarchical_context_loss, MAPS),
    "factor_transfer": (losses.factor_transfer_loss, MAPS),
    "factor_transfer_p2": (partial(losses.factor_transfer_loss, p=2), MAPS),
    "feature_matching": (losses.feature_matching_loss, MAPS),
    "activation_boundary": (losses.activation_boundary_loss, MAPS),
    "overhaul": (partial(losses.overhaul_loss, margin=MARGIN), MAPS),
    **{f"inheritance_{k}": (partial(losses.inheritance_loss, kind=k), MAPS) for k in ("at", "ft", "od")},
    **{f"exploration_{k}": (partial(losses.exploration_loss, kind=k), MAPS) for k in ("at", "ft", "od")},
}
CROSS_ENTROPIES = {"softmax_regression_ce", "born_again"}  # least, but not zero, where student and teacher agree
BOUNDARIES = {"activation_boundary", "overhaul"}  # zero elsewhere: see the golden tests

each_loss = pytest.mark.parametrize(("loss", "shape"), LOSSES.values(), ids=LOSSES)


def pair(shape, dtype=torch.float64, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    return (scale * torch.randn(2, *shape, generator=generator, dtype=torch.float64)).to(dtype)


def test_every_loss_is_in_the_table():
    functions = {
        getattr(loss, "func", loss).__name__ for name, (loss, _) in LOSSES.items() if name != "soft_target_weighted"
    }
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


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in BOUNDARIES])
def test_equal_inputs(name):
    loss, shape = LOSSES[name]
    student = pair(shape)[0].requires_grad_()
    value = loss(student, student.detach().clone())
    value.backward()
    if name in CROSS_ENTROPIES:
        torch.testing.assert_close(student.grad, torch.zeros_like(student), rtol=0, atol=1e-12)
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


def test_margins_of_channels_that_do_not_vary():
    margins = losses.margin_from_batch_norm(torch.zeros(3), torch.tensor([-0.5, 0.0, 2.0]))
    assert margins.tolist() == [-0.5, 0, 0]
