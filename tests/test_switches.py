"""What makes a step faster changes no gradient beyond rounding: memory formats, compilation, streams, shared images."""

import functools
import re
from types import SimpleNamespace

import pytest
import torch
from classification.models import classifier_cfg, classifier_inputs
from detectron2.modeling import GeneralizedRCNN
from detectron2.utils.events import EventStorage
from helpers import build, distilled_cfg, save_teacher, step, tiny_cfg, tiny_inputs, with_data

from kd_det import InputError, Teacher
from kd_det.data import register_datasets
from kd_det.engine import Trainer
from kd_det.engine.step_trainer import build_step_trainer
from kd_det.taps import build_tap, preprocess_alike

HEADS = [
    "ReviewKDHead",
    "FactorTransferHead",
    "SoftmaxRegressionHead",
    "OverhaulHead",
    "SoftTargetHead",
    "BoxTargetHead",
]
SOURCES = {"KD.SOFT_TARGET.SOURCES": ["roi", "rpn", "mask"], "KD.OVERHAUL.IN_FEATURES": ["res3", "res4"]}
NAMES = ["p2", "p5", "res4", "rpn_logits", "roi_logits", "roi_features", "mask_logits"]


def gradients(model, batches):
    """Of the student and the heads, for the losses of some batches after one another."""
    for inputs in batches:
        sum(step(model, inputs).values()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def difference(found, expected):
    """Largest distance of a parameter's gradient from what it should be, in relation to its length."""
    assert found.keys() == expected.keys()
    return max(float((found[key] - x).norm() / (x.norm() + 1e-6)) for key, x in expected.items())


def switched(teacher, options, heads=HEADS, *, device="cpu"):
    return build(distilled_cfg(teacher, heads, SOURCES | {"MODEL.DEVICE": device} | options))


@pytest.fixture
def batches():
    return [tiny_inputs(), tiny_inputs(((64, 64), (96, 56)), seed=1)]


# ---- Mixed precision ----
class Loader(list):
    """Batches, as many images in each as a process has per step."""

    batch_sampler = SimpleNamespace(batch_size=2)


def trained(teacher, batches, options, device="cpu"):
    """Gradients of the last step, its losses, and types: of what the student predicts, and of all gradients."""
    cfg = distilled_cfg(teacher, HEADS, SOURCES | {"MODEL.DEVICE": device} | options)
    model, dtypes = build(cfg), set()
    model.student.roi_heads.box_predictor.register_forward_hook(lambda _, args, out: dtypes.add(out[0].dtype))
    trainer = build_step_trainer(cfg, model, Loader(batches), torch.optim.SGD(model.parameters(), 0.0))
    if cfg.SOLVER.AMP.ENABLED:
        # Else it is found in some first steps, whose gradients overflow.
        trainer.grad_scaler.load_state_dict(trainer.grad_scaler.state_dict() | {"scale": 256.0})
    for i in range(len(batches)):
        torch.manual_seed(i)
        with EventStorage(i) as storage:
            trainer.iter = i
            trainer.run_step()
    scale = trainer.grad_scaler.get_scale() if cfg.SOLVER.AMP.ENABLED else 1.0
    losses = {key: value for key, (value, _) in storage.latest().items() if key.startswith("loss_")}
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}, losses, dtypes, scale


@pytest.mark.parametrize(("dtype", "parts"), [("bfloat16", 1), ("bfloat16", 2), ("float16", 1)])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_mixed_precision(teacher, batches, dtype, parts, device):
    options = {"SOLVER.ACCUMULATE": parts}
    full, losses, dtypes, _ = trained(teacher, batches, options, device)
    assert dtypes == {torch.float32}
    options |= {"SOLVER.AMP.ENABLED": True, "SOLVER.AMP.DTYPE": dtype, "KD.TEACHER.DTYPE": dtype}
    found, near, dtypes, scale = trained(teacher, batches, options, device)
    assert dtypes == {getattr(torch, dtype)}
    # Gradients of float16 would be 0 where they are small; those of bfloat16 have the range of float32.
    assert (scale > 1) == (dtype == "float16")
    assert near == pytest.approx(losses, rel=0.1, abs=0.02)
    joined = [torch.cat([grads[key].flatten() for key in full]) for grads in (found, full)]
    assert torch.cosine_similarity(*joined, dim=0) > 0.95


# ---- Memory formats ----
def test_teacher_with_channels_last(teacher, batches):
    off, on = (switched(teacher, {"KD.TEACHER.CHANNELS_LAST": value}) for value in (False, True))
    weights = [x.teacher.model.backbone.fpn_output2.weight for x in (off, on)]
    assert [x.is_contiguous(memory_format=torch.channels_last) for x in weights] == [False, True]
    assert on.teacher.fingerprint() == off.teacher.fingerprint()
    assert difference(gradients(on, batches), gradients(off, batches)) < 1e-4


@pytest.mark.usefixtures("in_process")
def test_student_with_channels_last(teacher, batches, coco_folder, tmp_path):
    found = []
    for value in (False, True):
        cfg = distilled_cfg(teacher, HEADS, SOURCES | {"SOLVER.CHANNELS_LAST": value})
        cfg = with_data(cfg, coco_folder, tmp_path)
        register_datasets(cfg)
        torch.manual_seed(0)
        model = Trainer(cfg).plain_model
        for layer in (model.student.backbone.fpn_output2, model.heads["ReviewKDHead"].fusions["p2"].expand):
            assert layer.weight.is_contiguous(memory_format=torch.channels_last) == value
        found.append(gradients(model, batches))
    assert difference(found[1], found[0]) < 1e-3


# ---- Compilation ----
def test_compiled_teacher(teacher, batches, monkeypatch):
    """Also of signals that no head asked for when it was compiled."""
    # Without code generation, which takes a minute.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    heads = [name for name in HEADS if name != "OverhaulHead"]
    off, on = (switched(teacher, {"KD.TEACHER.COMPILE": value}, heads) for value in (False, True))
    for names in (["p2"], ["res2", "p2"]):
        found, expected = (x.teacher(batches[0], names, {}) for x in (on, off))
        torch.testing.assert_close(found, expected)
    assert difference(gradients(on, batches), gradients(off, batches)) < 1e-4


def test_compiled_heads(teacher, batches, monkeypatch):
    compiled = []

    def compile_without_code(function, **options):
        compiled.append(type(function.__self__).__name__)
        return torch._dynamo.optimize("aot_eager", dynamic=options["dynamic"])(function)

    monkeypatch.setattr(torch, "compile", compile_without_code)
    heads = ["HintHead"]
    off, on = (switched(teacher, {"KD.COMPILE_HEADS": value}, heads) for value in (False, True))
    assert compiled == heads
    assert on.state_dict().keys() == off.state_dict().keys()
    assert difference(gradients(on, batches), gradients(off, batches)) < 1e-4


def test_heads_that_read_what_is_compiled(teacher):
    told = "KD.TEACHER.COMPILE: must be False for heads that read res3_preact, res4_preact, which "
    with pytest.raises(InputError, match=f"^{re.escape(told)}"):
        switched(teacher, {"KD.TEACHER.COMPILE": True})


# ---- The teacher in two parts, and its stream ----
@pytest.mark.parametrize("family", ["mask_rcnn", "c4", "cascade", "retinanet"])
def test_before_and_after_the_student_it_gives_the_same_as_at_once(family, inputs):
    student, teacher = build(tiny_cfg(family)), Teacher(build(tiny_cfg(family), seed=1))
    names = set(teacher.tap.spec())
    started = teacher.start(inputs, names)
    with build_tap(student).record(names) as signals:
        step(student, inputs)
    found, expected = teacher.finish(started, names, signals), teacher(inputs, names, signals)
    assert found.keys() == expected.keys() >= names
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not any(x.requires_grad for x in found.values())


def test_nothing_but_the_backbone_runs_before_the_student(teacher, inputs):
    """And it does so once."""
    model = switched(teacher, {}, ["SoftTargetHead"])
    runs = []
    parts = {"teacher": model.teacher.model.backbone, "student": model.student.backbone}
    parts |= {"boxes": model.teacher.model.roi_heads.box_head, "masks": model.teacher.model.roi_heads.mask_head.deconv}
    for name, module in parts.items():
        module.register_forward_hook(lambda *_, name=name: runs.append(name))
    step(model, inputs)
    assert runs == ["teacher", "student", "masks", "boxes"]


def test_input_gradients_of_the_teacher_need_no_student():
    cfg = classifier_cfg()
    teacher, inputs = Teacher(build(cfg)), classifier_inputs(16)
    found = teacher.start(inputs, ["input_gradient", "logits"])
    student = {"labels": torch.tensor([x["label"] for x in inputs])}
    expected = torch.autograd.functional.jacobian(
        lambda x: torch.nn.functional.cross_entropy(
            teacher.model.classify(teacher.model.backbone(x)), student["labels"], reduction="sum"
        ),
        teacher.model.preprocess_image(inputs),
    )
    torch.testing.assert_close(found["input_gradient"], expected)


def test_without_a_gpu_there_is_no_side_stream(teacher, batches, caplog):
    off, on = (switched(teacher, {"KD.TEACHER.SIDE_STREAM": value}) for value in (False, True))
    assert caplog.messages.count("KD.TEACHER.SIDE_STREAM: has no effect on cpu.") == 1
    assert difference(gradients(on, batches), gradients(off, batches)) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("switch", ["SIDE_STREAM", "CHANNELS_LAST", pytest.param("COMPILE", marks=pytest.mark.slow)])
def test_on_a_gpu(teacher, batches, switch, monkeypatch):
    # Algorithms for other memory formats round differently in TF32, by more than is allowed here.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    heads = [name for name in HEADS if name != "OverhaulHead"]
    off, on = (switched(teacher, {f"KD.TEACHER.{switch}": x}, heads, device="cuda") for x in (False, True))
    assert difference(gradients(on, batches * 5), gradients(off, batches * 5)) < 1e-3


# ---- Images that are preprocessed once ----
def test_images_are_preprocessed_once(teacher, batches, monkeypatch):
    model, other = (switched(teacher, {}) for _ in range(2))
    other.shares_images = False
    assert model.shares_images
    calls = []
    preprocess = GeneralizedRCNN.preprocess_image
    monkeypatch.setattr(GeneralizedRCNN, "preprocess_image", lambda self, x: calls.append(self) or preprocess(self, x))
    found = gradients(model, batches)
    assert calls == [model.student] * 2
    assert difference(found, gradients(other, batches)) == 0
    assert calls[2:] == [other.teacher.model, other.student] * 2


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("mask_rcnn", {"MODEL.PIXEL_MEAN": [1.0, 2.0, 3.0]}),
        ("mask_rcnn", {"MODEL.PIXEL_STD": [1.0, 2.0, 3.0]}),
        ("c4", {}),  # without padding to multiples of 32
        ("retinanet", {}),  # whose method is another
    ],
)
def test_images_that_would_differ_are_not_shared(family, options):
    assert preprocess_alike(build(tiny_cfg()), build(tiny_cfg(), seed=1))
    assert not preprocess_alike(build(tiny_cfg()), build(tiny_cfg(family, options)))


def test_images_of_other_channel_order_are_not_shared(tmp_path):
    model = switched(save_teacher(tmp_path, tiny_cfg(options={"INPUT.FORMAT": "RGB"})), {}, ["HintHead"])
    assert not model.shares_images


def test_preprocessing_that_is_not_known_is_not_shared():
    class Other(GeneralizedRCNN):
        def preprocess_image(self, batched_inputs):
            return super().preprocess_image(batched_inputs)

    one, other = build(tiny_cfg()), build(tiny_cfg())
    one.__class__ = other.__class__ = Other
    assert not preprocess_alike(one, other)
