"""TeacherStudent: a stock student whose losses gain those of the heads, and a teacher that nothing but they see."""

import math

import pytest
import torch
from detectron2.solver import build_optimizer
from helpers import attached, build, distilled_cfg, step, student_losses, tiny_cfg, tiny_inputs
from torch import nn

from kd_det import InputError, Teacher, TeacherStudent
from kd_det.registry import config_key

HEADS = ["ReviewKDHead", "AttentionTransferHead", "HintHead", "SoftTargetHead", "BoxTargetHead"]
ALL_SOURCES = {"KD.SOFT_TARGET.SOURCES": ["roi", "rpn", "mask"]}


@pytest.fixture
def model(teacher):
    return build(distilled_cfg(teacher, HEADS, ALL_SOURCES))


class Mean(nn.Module):
    """The smallest head: the student's mean p2, times a parameter."""

    signals = ("p2",)

    def __init__(self, name="loss_kd_mean", factor=1.0):
        super().__init__()
        self.name, self.factor = name, factor
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, student, teacher, batch):
        return {self.name: self.factor * self.scale * student["p2"].float().mean()}


def with_heads(heads, schedules=None):
    """A TeacherStudent that is built from its parts, without a config of it."""
    student, other = build(tiny_cfg(), seed=0), build(tiny_cfg(), seed=1)
    return TeacherStudent(student=student, teacher=Teacher(other), heads=heads, schedules=schedules).train()


# ---- The teacher is nobody's part ----
def test_teacher_is_no_part_of_the_module(model):
    own = {id(x) for x in [*model.teacher.model.parameters(), *model.teacher.model.buffers()]}
    assert own.isdisjoint(id(x) for x in [*model.parameters(), *model.buffers()])
    assert all(module is not model.teacher.model for module in model.modules())
    assert {key.split(".")[0] for key in model.state_dict()} == {"student", "heads"}


def test_teacher_is_in_no_optimizer_group(model, teacher):
    optimizer = build_optimizer(distilled_cfg(teacher, HEADS), model)
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in [*model.student.parameters(), *model.heads.parameters()]}


def test_teacher_stays_frozen_and_in_evaluation_mode(model, inputs):
    before = {key: value.clone() for key, value in model.teacher.model.state_dict().items()}
    model.train()
    sum(step(model, inputs).values()).backward()
    assert model.student.training
    assert not any(module.training for module in model.teacher.model.modules())
    assert not any(p.requires_grad or p.grad is not None for p in model.teacher.model.parameters())
    after = model.teacher.model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)  # running statistics among them


# ---- The student is the stock one ----
def test_without_heads_it_is_the_stock_model_bit_for_bit(inputs):
    cfg = distilled_cfg({}, [])
    stock, wrapped = step(build(tiny_cfg()), inputs), step(build(cfg), inputs)
    assert stock.keys() == wrapped.keys()
    assert all(torch.equal(stock[key], wrapped[key]) for key in stock)


def test_with_heads_the_student_draws_the_same_random_numbers(teacher, inputs):
    runs = []
    for cfg in (tiny_cfg(), distilled_cfg(teacher, HEADS, ALL_SOURCES)):
        model = build(cfg)
        after_building = torch.get_rng_state()
        losses = student_losses(step(model, inputs))
        runs.append((losses, after_building, torch.get_rng_state()))
    (stock, *stock_states), (distilled, *states) = runs
    assert stock.keys() == distilled.keys()
    assert all(torch.equal(stock[key], distilled[key]) for key in stock)
    assert all(torch.equal(a, b) for a, b in zip(stock_states, states, strict=True))


def test_inference_is_the_students(model, inputs):
    model.eval()
    own, stock = model(inputs), model.student(inputs)
    assert all(
        torch.equal(a["instances"].pred_boxes.tensor, b["instances"].pred_boxes.tensor)
        for a, b in zip(own, stock, strict=True)
    )


def test_every_parameter_learns(model, inputs):
    sum(step(model, inputs).values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


# ---- Nothing remains attached ----
def test_nothing_is_attached_after_a_step(model, inputs):
    step(model, inputs)
    assert attached(model) == attached(model.teacher.model) == {}


@pytest.mark.parametrize("where", ["student", "teacher", "head"])
def test_nothing_is_attached_after_an_exception(model, inputs, where):
    def fail(*_):
        raise RuntimeError("made up")

    # Of each the part that runs last, when all hooks are in place.
    last = {
        "student": model.student.roi_heads.mask_head.predictor,
        "teacher": model.teacher.model.roi_heads.mask_head.predictor,
        "head": model.heads["SoftTargetHead"],
    }
    handle = last[where].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="made up"):
        step(model, inputs)
    handle.remove()
    assert attached(model) == attached(model.teacher.model) == {}


def test_a_method_that_was_replaced_before_stays_replaced(model, inputs):
    layers = model.student.roi_heads.mask_head.layers
    model.student.roi_heads.mask_head.layers = replacement = lambda x: layers(x)
    step(model, inputs)
    assert vars(model.student.roi_heads.mask_head)["layers"] is replacement


# ---- Weights and schedules ----
@pytest.mark.parametrize(("weight", "factor"), [(1.0, 1), (2.0, 2), (0.25, 0.25)])
def test_weight_scales_the_losses(teacher, inputs, weight, factor):
    once = step(build(distilled_cfg(teacher, ["HintHead"], {"KD.HINT.WEIGHT": 1.0})), inputs)
    scaled = step(build(distilled_cfg(teacher, ["HintHead"], {"KD.HINT.WEIGHT": weight})), inputs)
    assert torch.equal(scaled["loss_kd_hint"], factor * once["loss_kd_hint"])  # powers of two: exact
    assert all(torch.equal(scaled[key], value) for key, value in student_losses(once).items())


def test_schedule_removes_the_losses_outside_of_its_span(teacher, inputs):
    options = {"KD.HINT.SCHEDULE.START": 10, "KD.HINT.SCHEDULE.STOP": 20, "SOLVER.MAX_ITER": 100}
    model = build(distilled_cfg(teacher, ["HintHead", "AttentionTransferHead"], options))
    present = {i: "loss_kd_hint" in step(model, inputs, iteration=i) for i in (0, 9, 10, 19, 20)}
    assert present == {0: False, 9: False, 10: True, 19: True, 20: False}


def test_warm_up_scales_the_losses(teacher, inputs):
    model = build(distilled_cfg(teacher, ["HintHead"], {"KD.HINT.SCHEDULE.WARMUP": 3}))
    losses = [step(model, inputs, iteration=i)["loss_kd_hint"].item() for i in range(4)]
    assert [loss / losses[-1] for loss in losses] == pytest.approx([1 / 4, 2 / 4, 3 / 4, 1])


def test_weight_zero_removes_the_losses_and_the_teacher_does_not_run(teacher, inputs):
    model = build(distilled_cfg(teacher, HEADS, {f"KD.{config_key(name)}.WEIGHT": 0.0 for name in HEADS}))
    model.teacher.model.backbone.register_forward_pre_hook(lambda *_: pytest.fail("the teacher ran"))
    losses = step(model, inputs)
    assert set(losses) - set(student_losses(losses)) == {"loss_kd_idle"}


def test_idle_heads_stay_in_the_graph_with_zero_gradient(teacher, inputs):
    """DDP without find_unused_parameters needs a gradient for every parameter."""
    model = build(distilled_cfg(teacher, ["HintHead", "ReviewKDHead"], {"KD.HINT.SCHEDULE.START": 5}))
    losses = step(model, inputs)
    assert losses["loss_kd_idle"] == 0
    sum(losses.values()).backward()
    gradients = [p.grad for p in model.heads["HintHead"].parameters()]
    assert gradients
    assert all((gradient == 0).all() for gradient in gradients)


def test_a_head_without_schedule_has_weight_one(inputs):
    plain = step(with_heads({"a": Mean()}), inputs)
    doubled = step(with_heads({"a": Mean()}, {"a": lambda iteration: 2.0}), inputs)
    assert torch.equal(2 * plain["loss_kd_mean"], doubled["loss_kd_mean"])


# ---- Losses that cannot be ----
@pytest.mark.parametrize("name", ["loss_kd_mean", "loss_cls"])
def test_a_repeated_name_is_an_error(inputs, name):
    with pytest.raises(InputError, match=rf"^KD.HEADS: b gives {name}, which exists already\.$"):
        step(with_heads({"a": Mean(), "b": Mean(name)}), inputs)


@pytest.mark.filterwarnings("error:Converting a tensor")
@pytest.mark.parametrize(("factor", "told"), [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "inf")])
def test_a_loss_that_is_not_finite_stops_the_run(inputs, factor, told):
    with pytest.raises(FloatingPointError, match=rf"^iteration 41: loss_kd_mean is -?{told}$"):
        step(with_heads({"a": Mean(factor=factor)}), inputs, iteration=41)


def test_losses_are_float32_under_autocast(model, inputs):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = step(model, inputs)
    kd = {key: loss.dtype for key, loss in losses.items() if key.startswith("loss_kd_")}
    assert set(kd.values()) == {torch.float32}
    assert len(kd) == 7


# ---- Batches without objects ----
@pytest.mark.parametrize("empty", [(0,), (0, 1)])
def test_images_without_objects_train_on(model, empty):
    losses = step(model, tiny_inputs(empty=empty))
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    if len(empty) == 2:
        assert losses["loss_kd_soft_target_mask"] == losses["loss_kd_box_target_roi"] == 0
