"""Image classifiers in TeacherStudent: every head, the teacher's own view, and weights for detectors."""

import copy

import pytest
import torch
import torch.nn.functional as F
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from helpers import STOCK_R18, tiny_cfg

from kd_det import InputError, Teacher, TeacherStudent, build_kd_heads
from kd_det.checkpoint import KDCheckpointer, load_strictly
from kd_det.heads.build import teacher_signals
from kd_det.taps import build_tap
from kd_det.taps.classifier import input_gradient

from .models import PAIRS, STAGES, classifier_cfg, classifier_inputs

each_family = pytest.mark.parametrize("family", PAIRS)
HEADS = ["ReviewKDHead", "AttentionTransferHead", "HintHead", "SoftTargetHead"]


def distilled(family, heads, options=None, seed=0):
    torch.manual_seed(seed)
    student = build_model(classifier_cfg(family))
    teacher = Teacher(build_model(classifier_cfg(family, teacher=True)))
    cfg = classifier_cfg(family, options={"KD.HEADS": heads} | (options or {}))
    modules = build_kd_heads(cfg, build_tap(student).spec(), teacher.tap.spec())
    return TeacherStudent(student=student, teacher=teacher, heads=modules).train()


def step(model, inputs):
    with EventStorage(0):
        return model(inputs)


@each_family
def test_model_by_hand(family):
    """Its loss and its scores are those of the linear layer on the pooled feature of normalised images."""
    statistics = {"MODEL.PIXEL_MEAN": [10, 20, 30], "MODEL.PIXEL_STD": [2, 3, 4]}
    model = build_model(classifier_cfg(family, options=statistics)).eval()
    inputs = classifier_inputs(64)
    images = torch.stack([x["image"] for x in inputs]).float()
    images = (images - torch.tensor([10.0, 20, 30]).view(3, 1, 1)) / torch.tensor([2.0, 3, 4]).view(3, 1, 1)
    features = model.backbone(images)
    pooled = features["pooled"] if "pooled" in features else features[STAGES[family][-1]].mean((2, 3))
    logits = model.linear(pooled)
    scores = torch.stack([x["scores"] for x in model(inputs)])
    torch.testing.assert_close(scores, logits.softmax(1))
    model.training = True  # the layers stay in evaluation mode
    expected = F.cross_entropy(logits, torch.tensor([0, 1, 2, 0]))
    torch.testing.assert_close(step(model, inputs), {"loss_cls": expected})


@each_family
def test_heads_train_the_student(family):
    model = distilled(family, HEADS)
    losses = step(model, classifier_inputs(64))
    assert set(losses) == {"loss_cls", "loss_kd_review", "loss_kd_attention_transfer", "loss_kd_hint",
                           "loss_kd_soft_target_cls"}  # fmt: skip
    sum(losses.values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert not any(p.requires_grad for p in model.teacher.model.parameters())


@pytest.mark.parametrize("family", ["cifar_resnet", "wide_resnet"])
def test_published_form_of_reviewkd(family):
    """The pooled feature is the deepest level, and the teacher's features are those before the ReLU."""
    stages = ["res2", "res3", "res4", "pooled"]
    model = distilled(family, ["ReviewKDHead"], {"KD.REVIEW.IN_FEATURES": stages, "KD.REVIEW.TEACHER_PREACT": True})
    head = model.heads["ReviewKDHead"]
    assert teacher_signals(head) == ("res2_preact", "res3_preact", "res4_preact", "pooled")
    assert step(model, classifier_inputs())["loss_kd_review"] > 0


# ---- Gradient-based attention transfer ----
def test_input_gradients_keep_the_digits_of_float64():
    weight = torch.tensor([[0.3, -0.7], [1.1, 0.2]], dtype=torch.float64)
    images = torch.tensor([[0.5, -0.3]], dtype=torch.float64, requires_grad=True)
    found = input_gradient(images @ weight, torch.tensor([1]), images, create_graph=False)
    expected = ((images @ weight).softmax(dim=1) - torch.tensor([[0, 1]])) @ weight.T
    torch.testing.assert_close(found, expected.detach(), rtol=0, atol=1e-12)


def test_input_gradients_are_those_of_autograd():
    model = distilled("cifar_resnet", ["AttentionTransferHead"], {"KD.ATTENTION_TRANSFER.KIND": "gradient"})
    inputs = classifier_inputs()
    student, teacher = model.student.eval(), model.teacher.model
    found = []
    for net in (student, teacher):
        images = net.preprocess_image(inputs).requires_grad_()
        loss = F.cross_entropy(net.classify(net.backbone(images)), torch.tensor([0, 1, 2, 0]), reduction="sum")
        found.append(torch.autograd.grad(loss, images)[0])
    expected = 0.5 * (found[0] - found[1]).flatten(1).norm(dim=1).mean()
    student.training = True
    loss = step(model, inputs)["loss_kd_attention_transfer"]
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert student.backbone.stem.conv1.weight.grad.any()


def test_input_gradients_of_a_teacher_that_sees_other_images_are_those_of_the_students_image():
    """The same function of the pixels, of reversed channels and other statistics, has the same gradients."""
    student = build_model(classifier_cfg()).eval()
    model = copy.deepcopy(student)
    first = model.backbone.stem.conv1
    scale = torch.tensor([0.02, 0.5, 3.0]).view(-1, 1, 1)
    first.weight.data = (first.weight * scale).flip(1)
    model.pixel_std = (student.pixel_std * scale).flip(0)
    model.pixel_mean = student.pixel_mean.flip(0)
    teacher = Teacher(model, flip_channels=True, student_std=student.pixel_std.flatten().tolist())
    student.training = True
    inputs = classifier_inputs()
    with build_tap(student).record({"input_gradient", "logits"}) as signals:
        student(inputs)
    found = teacher(inputs, {"input_gradient", "logits"}, signals)
    torch.testing.assert_close(found["logits"], signals["logits"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["input_gradient"], signals["input_gradient"], rtol=1e-3, atol=1e-6)


def test_input_gradients_are_for_classifiers_only():
    student = build_model(tiny_cfg())
    cfg = tiny_cfg(options={"KD.HEADS": ["AttentionTransferHead"], "KD.ATTENTION_TRANSFER.KIND": "gradient"})
    spec = build_tap(student).spec()
    with pytest.raises(InputError, match=r"^KD.ATTENTION_TRANSFER.KIND: 'gradient' is for image classifiers only"):
        build_kd_heads(cfg, spec, spec)


# ---- The tap ----
@each_family
def test_a_teacher_with_the_students_weights_gives_the_students_signals(family):
    model = build_model(classifier_cfg(family)).eval()
    model.training = True  # the layers stay in evaluation mode
    tap, inputs = build_tap(model), classifier_inputs(64)
    with tap.record(set(tap.spec())) as signals:
        step(model, inputs)
    assert set(signals) == {*tap.spec(), "labels"}
    found = Teacher(copy.deepcopy(model))(inputs, set(tap.spec()), signals)
    for name in tap.spec():
        torch.testing.assert_close(found[name], signals[name].detach(), msg=name)
        assert not found[name].requires_grad


def test_teacher_of_features_runs_no_linear_layer():
    model = build_model(classifier_cfg())
    teacher, runs = Teacher(model), []
    model.linear.register_forward_hook(lambda *_: runs.append(1))
    teacher(classifier_inputs(), {"res3"}, {})
    assert runs == []
    teacher(classifier_inputs(), {"logits"}, {})
    assert runs == [1]


# ---- What does not fit ----
def test_stage_that_does_not_exist():
    with pytest.raises(
        InputError, match=r"^KD.HINT.IN_FEATURES: 'res5' is not a signal of the student, which has res2"
    ):
        distilled("cifar_resnet", ["HintHead"], {"KD.HINT.IN_FEATURES": ["res4", "res5"]})


def test_different_class_counts():
    student = build_model(classifier_cfg())
    other = build_model(classifier_cfg(options={"MODEL.CLASSIFIER.NUM_CLASSES": 5}))
    cfg = classifier_cfg(options={"KD.HEADS": ["SoftTargetHead"]})
    with pytest.raises(InputError, match="logits has 3 channels in the student and 5 in the teacher"):
        build_kd_heads(cfg, build_tap(student).spec(), build_tap(other).spec())


def test_sources_of_detectors():
    with pytest.raises(InputError, match=r"^KD.SOFT_TARGET.SOURCES: 'roi_logits' is not a signal of the student"):
        distilled("cifar_resnet", ["SoftTargetHead"], {"KD.SOFT_TARGET.SOURCES": ["roi"]})


# ---- Weights ----
def test_task_weight_scales_the_students_own_loss():
    model, inputs = distilled("cifar_resnet", ["SoftTargetHead"]), classifier_inputs()
    whole = step(model, inputs)
    model.task_weight = 0.1
    scaled = step(model, inputs)
    torch.testing.assert_close(scaled["loss_cls"], 0.1 * whole["loss_cls"])
    torch.testing.assert_close(scaled["loss_kd_soft_target_cls"], whole["loss_kd_soft_target_cls"])


def test_classifier_is_the_initial_backbone_of_a_detector(tmp_path):
    classifier, detector = build_model(classifier_cfg("detectron2")), build_model(tiny_cfg(options=STOCK_R18))
    KDCheckpointer(classifier, str(tmp_path)).save("model_final")
    KDCheckpointer(detector).load(str(tmp_path / "model_final.pth"), checkpointables=[])
    own, loaded = classifier.backbone.state_dict(), detector.backbone.bottom_up.state_dict()
    assert own.keys() == loaded.keys()
    assert all(torch.equal(own[key], loaded[key]) for key in own)


def test_weights_in_torchvisions_layout(tmp_path):
    """Also as training scripts save them: below "state_dict", from DataParallel."""
    model = build_model(classifier_cfg(options={"MODEL.CIFAR.SHORTCUT": "padding"}))
    names = {"stem.conv1.norm": "bn1", "stem.conv1": "conv1", "linear": "linear"}
    state = {}
    for key, value in model.state_dict().items():
        key = key.removeprefix("backbone.")
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        for i in (2, 3, 4):
            key = key.replace(f"res{i}.", f"layer{i - 1}.")
        for i in (1, 2):
            key = key.replace(f"conv{i}.norm", f"bn{i}")
        state[f"module.{key}"] = value + 1
    assert "module.layer1.0.bn2.running_mean" in state
    torch.save({"state_dict": state, "best_prec1": 91.0}, tmp_path / "theirs.th")
    other = build_model(classifier_cfg(options={"MODEL.CIFAR.SHORTCUT": "padding"}))
    load_strictly(other, str(tmp_path / "theirs.th"), key="KD.TEACHER.WEIGHTS")
    assert all(torch.equal(value + 1, other.state_dict()[key]) for key, value in model.state_dict().items())


def test_stock_checkpointer_reads_the_students_checkpoint(tmp_path):
    model = distilled("cifar_resnet", ["HintHead"])
    KDCheckpointer(model.student, str(tmp_path), kd_heads=model.heads).save("a")
    plain = build_model(classifier_cfg())
    DetectionCheckpointer(plain).load(str(tmp_path / "a.pth"))
    assert all(torch.equal(x, plain.state_dict()[key]) for key, x in model.student.state_dict().items())
