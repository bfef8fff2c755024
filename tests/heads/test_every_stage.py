"""What must hold for every registered head of which a stage before the run trains a part."""

import pytest
import torch

from kd_det import InputError, build_kd_heads
from kd_det.heads.build import freeze_pretrained
from kd_det.registry import config_key

from .cases import ENDED_CASES, STAGE_CASES, STUDENT, TEACHER, each, make_cfg
from .cases import make_head as make
from .test_every_head import (
    LAYERS,
    ONE_CELL,
    NoSinglePrecision,
    check_losses,
    depends_on_padding,
    lack_of,
    one_cell,
    pair,
    total,
)


def trained_by_stage(head):
    """Names of the parameters in the submodules that the stage trains."""
    return {key for key, _ in head.named_parameters() if key.startswith(tuple(f"{name}." for name in head.pretrained))}


@each(STAGE_CASES)
def test_losses(name, options, batch):
    losses = make(name, options).pretrain(*pair(), batch)
    check_losses(name, options, losses)
    assert min(losses.values()) > 0


@each(STAGE_CASES)
def test_one_image_of_one_cell(name, options):
    losses = make(name, options).pretrain(*one_cell(), ONE_CELL)
    total(losses).backward()
    assert all(loss.isfinite() for loss in losses.values())


@each(STAGE_CASES)
def test_gradients_reach_what_the_stage_trains_and_nothing_else(name, options, batch):
    head, (student, teacher) = make(name, options), pair()
    total(head.pretrain(student, teacher, batch)).backward()
    reached = {key for key, p in head.named_parameters() if p.grad is not None}
    assert reached == trained_by_stage(head) != set()
    assert [key for key in reached if not head.get_parameter(key).grad.any()] == []
    assert {key for key, x in student.items() if x.grad is not None} == (
        set(head.pretrain_signals) if head.pretrains_student else set()
    )
    assert [key for key, x in teacher.items() if x.grad is not None] == []


@each(STAGE_CASES)
def test_it_learns(name, options, batch):
    head, (student, teacher) = make(name, options), pair()
    optimizer = torch.optim.Adam([p for key, p in head.named_parameters() if key in trained_by_stage(head)], lr=1e-3)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = total(head.pretrain(student, teacher, batch))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@each(STAGE_CASES)
def test_needs_no_more_than_its_signals(name, options, batch):
    head, (student, teacher) = make(name, options), pair()
    own = {key: x for key, x in student.items() if key in head.pretrain_signals}
    other = {key: x for key, x in teacher.items() if key in head.pretrain_teacher_signals}
    assert total(head.pretrain(own, other, batch)).isfinite()


# Without the classifiers' wide features, whose convolutions in half precision take seconds on a CPU.
@each([case for case in STAGE_CASES if case[1] != "classifier"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision(name, options, batch, dtype, autocast):
    """Under AMP signals are of half precision; without it a teacher of half precision still may be."""
    head, (student, teacher) = make(name, options), pair()
    teacher = {key: (x if key in LAYERS else 200 * x).to(dtype) for key, x in teacher.items()}
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        losses = head.pretrain({key: x.to(dtype) if autocast else x for key, x in student.items()}, teacher, batch)
    assert all(loss.isfinite() and loss.dtype == torch.float32 for loss in losses.values())
    total(losses).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in head.parameters())


@each(STAGE_CASES)
def test_double_precision(name, options, batch):
    """In float64 it computes the same, with more digits."""
    sides = pair()
    doubled = [{key: x.double() if x.is_floating_point() else x for key, x in side.items()} for side in sides]
    losses, more = make(name, options).pretrain(*sides, batch), make(name, options).double()
    with NoSinglePrecision():
        again = more.pretrain(*doubled, batch)
    assert again.keys() == losses.keys()
    for key, loss in again.items():
        assert loss.item() == pytest.approx(losses[key].item(), rel=1e-3)
        assert loss.dtype == torch.float64


@each(STAGE_CASES)
def test_state_dict_round_trip(name, options, batch):
    student, teacher = pair()
    first, second = make(name, options, seed=0), make(name, options, seed=1)
    second.load_state_dict(first.state_dict(), strict=True)
    losses, again = (head.pretrain(student, teacher, batch) for head in (first, second))
    assert losses.keys() == again.keys()
    assert all(torch.equal(losses[key], again[key]) for key in losses)


@each([case for case in STAGE_CASES if any(TEACHER[x].stride for x in make(case[0], case[2]).pretrain_teacher_signals)])
def test_what_the_teacher_has_in_masked_padding_does_not_matter(name, options):
    student, teacher = pair()
    assert depends_on_padding(lambda *x: make(name, options).pretrain(student, *x), teacher, mask_padding=False)
    assert not depends_on_padding(lambda *x: make(name, options).pretrain(student, *x), teacher, mask_padding=True)


@each(STAGE_CASES)
def test_padding_and_boxes_may_be_missing(name, options, batch):
    head, sides = make(name, options), pair()
    masked = type(batch)(batch.inputs, batch.image_sizes, mask_padding=True)
    empty = [
        {key: x[:0] if key.startswith("roi_") and key not in LAYERS else x for key, x in side.items()} for side in sides
    ]
    for signals, seen in ((sides, masked), (empty, batch)):
        loss = total(head.pretrain(*signals, seen))
        assert loss.isfinite()
        head.zero_grad()
        loss.backward()
        assert {key for key, p in head.named_parameters() if p.grad is not None} == trained_by_stage(head)
    assert all(x.isfinite().all() for x in head.state_dict().values())


@each(STAGE_CASES)
def test_the_run_leaves_it_alone(name, options, batch):
    """Without gradient, in evaluation mode even after train(), and with the same running statistics."""
    head, (student, teacher) = make(name, options), pair()
    before = {key: x.clone() for key, x in head.state_dict().items()}
    freeze_pretrained(head)
    head.train()
    for part in head.pretrained:
        assert not any(module.training for module in head.get_submodule(part).modules())
        assert not any(p.requires_grad for p in head.get_submodule(part).parameters())
    losses = head(student, teacher, batch)
    if losses:
        total(losses).backward()
    frozen = {key for key in before if key.startswith(tuple(f"{part}." for part in head.pretrained))}
    assert all(torch.equal(head.state_dict()[key], before[key]) for key in frozen)
    assert not any(p.grad is not None for key, p in head.named_parameters() if key in frozen)
    assert head.training


@each(ENDED_CASES)
def test_heads_whose_work_ends_with_the_stage(name, options, batch):
    head = make(name, options)
    assert head.signals == ()
    assert head.pretrains_student
    assert head({}, {}, batch) == {}
    cfg = make_cfg(name, options)
    cfg.KD[config_key(name)].WEIGHT *= 3
    torch.manual_seed(0)
    heavy = build_kd_heads(cfg, STUDENT, TEACHER)[name]
    light, heavy = (total(x.pretrain(*pair(), batch)).item() for x in (head, heavy))
    assert heavy == pytest.approx(3 * light, rel=1e-5)


@each(STAGE_CASES)
def test_a_signal_that_a_side_lacks(name, options):
    head = make(name, options)
    needed = {"student": head.pretrain_signals[-1:], "teacher": head.pretrain_teacher_signals[-1:]}
    for side, signals in needed.items():
        for signal in signals:
            specs = {"student": STUDENT, "teacher": TEACHER}
            specs[side] = {key: shape for key, shape in specs[side].items() if key != signal}
            with pytest.raises(InputError, match=f"^KD.*: {lack_of(signal, side)}"):
                build_kd_heads(make_cfg(name, options), *specs.values())
