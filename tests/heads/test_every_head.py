"""What must hold for every registered head."""

from contextlib import nullcontext

import pytest
import torch
from detectron2.layers import ShapeSpec
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kd_det import Batch, InputError, build_kd_heads
from kd_det.heads.build import freeze_pretrained, teacher_signals
from kd_det.registry import config_key
from kd_det.signals import BOX_SIGNALS

from .cases import CASES, NAMES, STUDENT, TEACHER, VARIANTS, build, each, make_cfg, make_head, own_options
from .signals import make_input, make_signals

# Parameters of a layer: they have no row per box, and are not large where activations are.
LAYERS = {name for name in STUDENT if name.endswith(("_weight", "_bias"))}
# Neither these nor layers have a row per image or per box.
NO_ROWS = LAYERS | {f"{kind}_{what}" for kind in ("rpn", "dense") for what in ("anchors", "counts")}
NO_ROWS |= {f"{kind}_scales" for kind in ("roi", "rpn", "dense")}


def make(name, options, seed=0):
    """A head as in the run: what a stage before it trains is frozen."""
    head = make_head(name, options, seed)
    freeze_pretrained(head)
    return head.train()


def pair(dtype=torch.float32):
    """Signals of both sides; gradient is asked of all that floats."""
    sides = [make_signals(spec, seed=seed, dtype=dtype) for seed, spec in enumerate((STUDENT, TEACHER))]
    for signals in sides:
        for name, x in signals.items():
            x.requires_grad_(x.is_floating_point() and not name.endswith(("_boxes", "_anchors", "_scales")))
    return sides


ONE_CELL = Batch.from_inputs([make_input(4, 4, [0, 0, 3, 2])])


def one_cell():
    """Signals of both sides for that one image, whose maps have one cell, and of one box."""
    sides = [make_signals(spec, seed=seed, size=(4, 4)) for seed, spec in enumerate((STUDENT, TEACHER))]
    sides = [{key: x if key in NO_ROWS else x[:1] for key, x in signals.items()} for signals in sides]
    for x in sides[0].values():
        x.requires_grad_(x.is_floating_point())
    return sides


class NoSinglePrecision(TorchDispatchMode):
    """No operation inside gives a tensor in float32, which would cost digits."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        assert all(x.dtype != torch.float32 for x in tree_leaves(result) if isinstance(x, torch.Tensor)), function
        return result


def total(losses):
    return sum(losses.values())


def check_losses(name, options, losses):
    """Of noise on both sides a head gives finite scalars in float32, above 0 but for the negated distances."""
    prefix = f"loss_kd_{config_key(name).lower()}"
    assert losses
    for key, loss in losses.items():
        assert key == prefix or key.startswith(f"{prefix}_"), key
        assert loss.shape == ()
        assert loss.dtype == torch.float32
        assert loss.isfinite()
        negated = key.endswith("_explore") and options.get("DISTANCE") != "cosine"
        assert loss < 0 if negated else loss > 0


@pytest.mark.parametrize("name", NAMES)
def test_every_option_of_a_head_has_a_variant(name):
    tried = [{**own_options(name), **options} for options in VARIANTS.get(name, {}).values()]
    for key, default in own_options(name).items():
        assert any(options[key] != default for options in tried), (
            f"no variant of {name} in VARIANTS of tests/heads/cases.py has another KD.{config_key(name)}.{key} than "
            f"{default!r}; add one"
        )


@each(CASES)
def test_losses(name, options, batch):
    check_losses(name, options, make(name, options)(*pair(), batch))


@each(CASES)
def test_gradients(name, options, batch):
    head, (student, teacher) = make(name, options), pair()
    for p in head.parameters():
        if not p.any():  # A layer that begins at zero passes no gradient on.
            torch.nn.init.normal_(p)
    total(head(student, teacher, batch)).backward()
    trained = {key: p for key, p in head.named_parameters() if p.requires_grad}
    assert [key for key, p in trained.items() if p.grad is None or not p.grad.any()] == []
    for signal in head.signals:
        if name != "BoxTargetHead" or signal.endswith("_deltas"):  # Classes only weight the boxes.
            assert student[signal].grad.abs().sum() > 0, signal
    assert [key for key, x in teacher.items() if x.grad is not None] == []


@each(CASES)
def test_needs_no_more_than_its_signals(name, options, batch):
    """It takes what it has named, and the boxes and classes that come with it."""
    head, (student, teacher) = make(name, options), pair()
    families = {signal.split("_")[0] for signal in head.signals} | {"sem_seg"}
    kinds = ("boxes", "classes", "gt_boxes", "anchors", "labels", "counts", "scales")
    companions = {f"{family}_{kind}" for family in families for kind in kinds} | {"labels"}
    own = {key: x for key, x in student.items() if key in {*head.signals, *companions}}
    other = {key: x for key, x in teacher.items() if key in teacher_signals(head)}
    assert total(head(own, other, batch)).isfinite()


@each(CASES)
def test_state_dict_round_trip(name, options, batch):
    student, teacher = pair()
    first, second = make(name, options, seed=0), make(name, options, seed=1)
    second.load_state_dict(first.state_dict(), strict=True)
    torch.manual_seed(0)
    losses = first(student, teacher, batch)
    torch.manual_seed(0)
    again = second(student, teacher, batch)
    assert losses.keys() == again.keys()
    assert all(torch.equal(losses[key], again[key]) for key in losses)


@each(CASES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(name, options, batch, dtype):
    """As under AMP: signals of half precision, 200 times as large; the head's own layers under autocast.

    Sums over a map have gradients that need their small weight to be finite in float16.
    """
    head, sides = make(name, options), pair(dtype)
    weight = min(make_cfg(name, options).KD[config_key(name)].WEIGHT, 1.0)
    large = [
        {key: 200 * x if x.is_floating_point() and key not in LAYERS else x for key, x in signals.items()}
        for signals in sides
    ]
    with torch.autocast("cpu", dtype=dtype):
        losses = head(*large, batch)
    assert all(loss.isfinite() and loss.dtype == torch.float32 for loss in losses.values())
    (weight * total(losses)).backward()
    assert all(p.grad.isfinite().all() for p in head.parameters() if p.requires_grad)


@each(CASES)
def test_half_precision_without_autocast(name, options, batch):
    losses = make(name, options)(*pair(torch.float16), batch)
    check_losses(name, options, losses)
    total(losses).backward()


@each(CASES)
def test_double_precision(name, options, batch):
    """In float64 it computes the same, with more digits; Detectron2's anchors are always float32."""
    head, sides = make(name, options), pair()
    torch.manual_seed(0)
    losses = head(*sides, batch)
    more = make(name, options).double()
    doubled = [{key: x.double() if x.is_floating_point() else x for key, x in side.items()} for side in sides]
    torch.manual_seed(0)
    with nullcontext() if name == "FineGrainedHead" else NoSinglePrecision():
        again = more(*doubled, batch)
    assert again.keys() == losses.keys()
    for key, loss in again.items():
        assert loss.item() == pytest.approx(losses[key].item(), rel=1e-3)
        assert loss.dtype == torch.float64


@each(CASES)
def test_masking_of_padding_keeps_the_gradients(name, options, batch):
    masked = type(batch)(batch.inputs, batch.image_sizes, mask_padding=True)
    head, (student, teacher) = make(name, options), pair()
    losses = head(student, teacher, masked)
    assert all(loss.isfinite() for loss in losses.values())
    total(losses).backward()
    assert [key for key, p in head.named_parameters() if p.requires_grad and p.grad is None] == []


def change_padding(teacher):
    """Changes what lies beyond the second image, of 32 x 64 in 64 x 128 pixels; at each stride it ends with a cell."""
    changed = {key: x.detach().clone() for key, x in teacher.items()}
    for name, shape in TEACHER.items():
        if shape.stride and shape.stride <= 32:
            changed[name][1, :, 32 // shape.stride :] = 1000.0
            changed[name][1, :, :, 64 // shape.stride :] = -1000.0
    return changed


def depends_on_padding(compute, teacher, *, mask_padding):
    """Reports whether any loss of ``compute(teacher, batch)`` depends on what the teacher has in the padding."""
    inputs = [make_input(64, 128, [3, 9, 50, 33], [70, 2, 75, 60]), make_input(32, 64, [30, 10, 64, 32])]
    batch = Batch.from_inputs(inputs, mask_padding=mask_padding)
    losses = []
    for signals in (teacher, change_padding(teacher)):
        torch.manual_seed(0)
        losses.append({key: loss.item() for key, loss in compute(signals, batch).items()})
    return losses[0] != losses[1]


@each([case for case in CASES if any(TEACHER[x].stride for x in teacher_signals(make(case[0], case[2])))])
def test_what_the_teacher_has_in_masked_padding_does_not_matter(name, options):
    """Although encoders look at neighbouring cells."""
    student, teacher = pair()
    assert depends_on_padding(lambda *x: make(name, options)(student, *x), teacher, mask_padding=False)
    assert not depends_on_padding(lambda *x: make(name, options)(student, *x), teacher, mask_padding=True)


@each(CASES)
def test_batch_without_boxes_and_objects(name, options):
    head, batch = make(name, options), Batch.from_inputs([make_input(64, 128), make_input(40, 96)])
    sides = [
        {key: x[:0] if key.startswith(BOX_SIGNALS) and key not in NO_ROWS else x for key, x in signals.items()}
        for signals in pair()
    ]
    losses = head(*sides, batch)
    assert all(loss.isfinite() for loss in losses.values())
    total(losses).backward()


@each(CASES)
def test_one_image_of_one_cell(name, options):
    """As each process has it with small batches; a batch norm in training has one value per channel."""
    head = make(name, options)
    losses = head(*one_cell(), ONE_CELL)
    assert all(loss.isfinite() for loss in losses.values())
    total(losses).backward()
    assert all(p.grad.isfinite().all() for p in head.parameters() if p.grad is not None)


def lack_of(signal, side):
    """What is told, as a regular expression."""
    if signal.endswith("_preact"):
        return f"there is no ReLU at the end of the {side}'s '{signal.removesuffix('_preact')}', "
    return f"'{signal}' is not a signal of the {side}, which has p2, .*dense"


@each(CASES)
def test_a_signal_that_a_side_lacks(name, options):
    if options.get("KIND") == "gradient":
        pytest.skip("no detector has it, so it has an error of its own")
    head = make(name, options)
    for side, signal in (("student", head.signals[-1]), ("teacher", teacher_signals(head)[-1])):
        specs = {"student": STUDENT, "teacher": TEACHER}
        specs[side] = {key: shape for key, shape in specs[side].items() if key != signal}
        with pytest.raises(InputError, match=f"^KD.*: {lack_of(signal, side)}"):
            build(name, options, *specs.values())


@each(CASES)
def test_strides_that_differ(name, options):
    head = make(name, options)
    pairs = [x for x in zip(head.signals, teacher_signals(head), strict=False) if STUDENT[x[0]].stride]
    if not pairs:
        pytest.skip("compares no maps")
    for signal, teachers in pairs:
        other = {**TEACHER, teachers: ShapeSpec(channels=32, stride=2)}
        told = f"^KD.*: '{signal}' has stride {STUDENT[signal].stride} in the student but 2 in the teacher; "
        with pytest.raises(InputError, match=told):
            build(name, options, STUDENT, other)


def test_unknown_head():
    with pytest.raises(InputError, match=r"^KD.HEADS: 'ReviewHead' is not a .* registered are .*ReviewKDHead"):
        build_kd_heads(_named(["ReviewHead"]), STUDENT, TEACHER)


def test_head_named_twice():
    with pytest.raises(InputError, match=r"^KD.HEADS: 'HintHead' is named twice; a head may stand there once"):
        build_kd_heads(_named(["HintHead", "HintHead"]), STUDENT, TEACHER)


def test_heads_come_in_the_order_of_the_config():
    names = ["SoftTargetHead", "HintHead", "AttentionTransferHead"]
    assert list(build_kd_heads(_named(names), STUDENT, TEACHER)) == names


def _named(names):
    cfg = make_cfg("HintHead", {})
    cfg.KD.HEADS = names
    return cfg
