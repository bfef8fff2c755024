"""Taps: what is recorded is what the model computed, rows line up between networks, and nothing runs in vain."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from detectron2.structures import Boxes, ImageList, pairwise_iou
from helpers import FAMILIES, WIDE, attached, build, distilled_cfg, save_teacher, step, tiny_cfg, tiny_inputs
from torch import nn

from kd_det import InputError, Teacher, TeacherStudent
from kd_det.heads import BoxTargetHead, SoftTargetHead
from kd_det.signals import SOURCES
from kd_det.taps import BackboneTap, GeneralizedRCNNTap, RetinaNetTap, build_tap

STAGE = ("", "_preact", "_norm_weight", "_norm_bias")
MAPS = {"p2", "p3", "p4", "p5", "p6", *(f"res{i}{suffix}" for i in range(2, 6) for suffix in STAGE)}
RPN = {"rpn_logits", "rpn_deltas"}
ROI = {"roi_features", "roi_box_features", "roi_logits", "roi_logits_weight", "roi_logits_bias", "roi_deltas",
       "roi_deltas_weight", "roi_deltas_bias"}  # fmt: skip
DENSE = {f"dense_{branch}_hidden_{level}" for branch in ("cls", "box") for level in ("p2", "p3", "p4", "p5")}
DENSE |= {
    f"dense_{layer}_{key}"
    for layer in ("cls_conv1", "box_conv1", "cls_score", "bbox_pred")
    for key in ("weight", "bias")
}
# These come with the signals of a student.
COMPANIONS = {"roi_boxes", "roi_classes", "roi_gt_boxes", "mask_boxes", "mask_classes", "sem_seg_labels"}
COMPANIONS |= {"keypoint_boxes", "keypoint_labels", "roi_counts", "mask_counts", "keypoint_counts"}
COMPANIONS |= {f"{kind}_{what}" for kind in ("rpn", "dense") for what in ("anchors", "labels", "counts")}
COMPANIONS |= {"roi_scales", "rpn_scales", "dense_scales"}
SIGNALS = {
    "mask_rcnn": MAPS | RPN | ROI | {"roi_box_preact", "mask_logits"},
    "c4": {*(f"res4{suffix}" for suffix in STAGE), "mask_logits"} | RPN | ROI,
    "cascade": MAPS | RPN | ROI | {"roi_box_preact", "mask_logits"},
    "retinanet": MAPS | {"dense_logits", "dense_deltas"} | DENSE,
    "keypoint": MAPS | RPN | ROI | {"roi_box_preact", "keypoint_logits"},
    "panoptic": MAPS | RPN | ROI | {"roi_box_preact", "mask_logits", "sem_seg_logits"},
    "semantic": MAPS | {"sem_seg_logits"},
}
# With FrozenBN a model computes the same in training and in evaluation.
SAME_IN_BOTH_MODES = {"MODEL.RESNETS.NORM": "FrozenBN"}
PARTS = ["backbone", "proposal_generator.rpn_head", "roi_heads.box_head", "roi_heads.box_predictor",
         "roi_heads.mask_head.predictor"]  # fmt: skip

each_family = pytest.mark.parametrize("family", FAMILIES)


def make(family, options=None, seed=0):
    model = build(tiny_cfg(family, SAME_IN_BOTH_MODES | (options or {})), seed=seed)
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.running_mean += 0.01  # A trained one has statistics.
    return model


def record(model, inputs, names=None):
    """Signals of a model in training."""
    tap = build_tap(model)
    with tap.record(names or set(tap.spec())) as signals:
        step(model, inputs)
    return signals


def counts(model):
    """Fills with how often each part of a model runs."""
    found = dict.fromkeys(PARTS, 0)
    for name in PARTS:
        part = model.get_submodule(name)

        def count(*_, name=name):
            found[name] += 1

        part.register_forward_hook(count)
    return found


# ---- What a tap tells is what it gives ----
def test_a_frozen_norm_with_folded_statistics_is_none():
    """Margins of OFD computed from it would be wrong; a new one looks the same."""
    spec = build_tap(build(tiny_cfg(options=SAME_IN_BOTH_MODES))).spec()
    assert "res4_preact" in spec
    assert not [name for name in spec if "_norm_" in name]


@each_family
def test_spec_is_what_is_recorded(family, inputs):
    model = make(family)
    spec = build_tap(model).spec()
    assert set(spec) == SIGNALS[family]
    signals = record(model, inputs)
    assert set(signals) - COMPANIONS == set(spec)
    last = ("rpn_logits", "rpn_deltas", "dense_logits", "dense_deltas", "_bias", "_norm_weight")
    for name, shape in spec.items():
        axis = -1 if name.endswith(last) else 1
        assert signals[name].shape[axis] == shape.channels, name
        if shape.stride:
            assert signals[name].shape[2:] == (math.ceil(64 / shape.stride), math.ceil(96 / shape.stride)), name
        if shape.height:
            assert signals[name].shape[2:] == (shape.height, shape.width), name


@each_family
def test_each_signal_alone(family, inputs):
    """A signal is the same whether the others are recorded or not."""
    model = make(family)
    together = record(model, inputs)
    for name in build_tap(model).spec():
        alone = record(model, inputs, {name})
        assert torch.equal(alone[name], together[name]), name
        assert set(alone) - COMPANIONS == {name}


def test_signals_carry_gradient(inputs):
    model = make("mask_rcnn")
    signals = record(model, inputs)
    signals["p2"].sum().backward()
    assert model.backbone.bottom_up.stem.conv1.weight.grad.abs().sum() > 0
    assert not signals["roi_boxes"].requires_grad


# ---- Rows line up ----
@each_family
def test_a_teacher_with_the_students_weights_gives_the_students_signals(family, inputs):
    model = make(family)
    signals = record(model, inputs)
    names = set(build_tap(model).spec())
    teacher = Teacher(copy.deepcopy(model))(inputs, names, signals)
    for name in names:
        torch.testing.assert_close(teacher[name], signals[name].detach(), rtol=1e-5, atol=1e-5, msg=name)
    assert not any(x.requires_grad for x in teacher.values())


@each_family
def test_soft_targets_of_a_copy_are_zero(family, inputs):
    model = make(family)
    sources = [source for source, signal in SOURCES.items() if signal.logits in SIGNALS[family]]
    boxes = [source for source in sources if source in ("roi", "rpn", "dense")]
    heads = {"classes": SoftTargetHead(sources=sources)} | ({"boxes": BoxTargetHead(sources=boxes)} if boxes else {})
    wrapped = TeacherStudent(student=model, teacher=Teacher(copy.deepcopy(model)), heads=heads).train()
    losses = {key: loss for key, loss in step(wrapped, inputs).items() if key.startswith("loss_kd")}
    assert len(losses) == len(sources) + len(boxes)
    assert all(loss.item() == pytest.approx(0, abs=1e-6) for loss in losses.values())


def test_rows_that_are_shuffled_would_be_seen(inputs):
    """That the test above can fail: on other boxes the same network predicts something else."""
    model = make("mask_rcnn")
    signals = record(model, inputs)
    signals["roi_boxes"] = signals["roi_boxes"].flip(0)
    other = Teacher(copy.deepcopy(model))(inputs, {"roi_logits"}, signals)
    assert (other["roi_logits"] - signals["roi_logits"]).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["mask_rcnn", "c4", "cascade"])
def test_classes_and_boxes_are_those_that_the_losses_use(family, inputs, monkeypatch):
    model = make(family)
    tap = build_tap(model)
    used = {}
    losses = tap._predictor.losses
    monkeypatch.setattr(
        tap._predictor, "losses", lambda p, proposals: used.update(roi=proposals) or losses(p, proposals)
    )
    signals = record(model, inputs)
    proposals = used["roi"]
    assert torch.equal(signals["roi_classes"], torch.cat([x.gt_classes for x in proposals]))
    assert torch.equal(signals["roi_boxes"][:, 1:], torch.cat([x.proposal_boxes.tensor for x in proposals]))
    assert signals["roi_boxes"][:, 0].tolist() == [i for i, x in enumerate(proposals) for _ in range(len(x))]
    foreground = signals["roi_classes"] < 3
    assert signals["mask_classes"].tolist() == signals["roi_classes"][foreground].tolist()
    if family != "cascade":  # whose masks are of the first stage's boxes
        assert torch.equal(signals["mask_boxes"], signals["roi_boxes"][foreground])
    assert 0 < foreground.sum() < len(foreground)


def test_classes_are_those_of_the_objects(inputs):
    """Boxes that are an object's own have its class: the proposals contain the objects."""
    signals = record(make("mask_rcnn"), inputs)
    for image, x in enumerate(inputs):
        for box, label in zip(x["instances"].gt_boxes.tensor, x["instances"].gt_classes, strict=True):
            row = (signals["roi_boxes"] == torch.cat([torch.tensor([float(image)]), box])).all(dim=1)
            assert signals["roi_classes"][row].tolist() == [label]


def test_matched_objects_are_those_of_the_labels(inputs):
    """Foreground boxes overlap the object that they are matched with by half at least, and have its class."""
    signals = record(make("mask_rcnn"), inputs)
    foreground = (signals["roi_classes"] < 3).nonzero().flatten().tolist()
    for row in foreground:
        objects = inputs[int(signals["roi_boxes"][row, 0])]["instances"]
        matched = (objects.gt_boxes.tensor == signals["roi_gt_boxes"][row]).all(dim=1)
        assert objects.gt_classes[matched].tolist() == [signals["roi_classes"][row]]
        assert pairwise_iou(Boxes(signals["roi_boxes"][row : row + 1, 1:]), objects.gt_boxes[matched]) >= 0.5


@pytest.mark.parametrize(("family", "kind"), [("retinanet", "dense"), ("mask_rcnn", "rpn")])
def test_anchors_and_labels_are_those_that_the_losses_use(family, kind, inputs, monkeypatch):
    model = make(family)
    part = model if kind == "dense" else model.proposal_generator
    used, losses = {}, part.losses
    monkeypatch.setattr(part, "losses", lambda *args: used.update(args=args) or losses(*args))
    signals = record(model, inputs, {f"{kind}_logits"})
    anchors, _, labels, _, _ = used["args"]
    assert signals[f"{kind}_counts"].tolist() == [16 * 24, 8 * 12, 4 * 6, 2 * 3]
    assert torch.equal(signals[f"{kind}_anchors"], torch.cat([x.tensor for x in anchors]))
    assert torch.equal(signals[f"{kind}_labels"], torch.stack(labels))
    assert signals[f"{kind}_labels"].shape == signals[f"{kind}_logits"].shape[:2]
    assert set(signals[f"{kind}_labels"].unique().tolist()) == ({-1, 0, 1} if kind == "rpn" else {-1, 0, 1, 2, 3})


def test_keypoints_are_those_of_the_objects(inputs):
    """The middle one of five on the diagonal of an object lies in the middle of a proposal that is the object."""
    signals = record(make("keypoint"), inputs)
    side = signals["keypoint_logits"].shape[-1]
    assert signals["keypoint_labels"].shape == signals["keypoint_logits"].shape[:2]
    assert (signals["keypoint_labels"][:, 4] == -1).all()
    for image, x in enumerate(inputs):
        for box in x["instances"].gt_boxes.tensor:
            row = (signals["keypoint_boxes"] == torch.cat([torch.tensor([float(image)]), box])).all(dim=1)
            assert signals["keypoint_labels"][row, 2].tolist() == [side // 2 * side + side // 2]


def test_heatmaps_without_objects():
    signals = record(make("keypoint"), tiny_inputs(empty=(0, 1)))
    assert signals["keypoint_logits"].shape == (0, 5, 16, 16)
    assert signals["keypoint_labels"].shape == (0, 5)
    other = Teacher(make("keypoint", seed=1))(tiny_inputs(empty=(0, 1)), {"keypoint_logits"}, signals)
    assert SoftTargetHead(sources=["keypoint"])(signals, other, None)["loss_kd_soft_target_keypoint"] == 0


@pytest.mark.parametrize("family", ["panoptic", "semantic"])
def test_segments_are_those_of_the_images(family, inputs):
    """Images are padded to 64 x 96 pixels."""
    signals = record(make(family), inputs)
    assert signals["sem_seg_logits"].shape == (2, 4, 16, 24)
    for labels, x in zip(signals["sem_seg_labels"], inputs, strict=True):
        height, width = x["sem_seg"].shape
        assert torch.equal(labels[8:height, :width], x["sem_seg"][8:])
        assert (labels[:8, : width // 2] == -1).all()
        assert (labels[height:] == -1).all()
        assert (labels[:, width:] == -1).all()


def test_the_layers_after_the_hidden_maps_give_the_predictions(inputs):
    model = make("retinanet", {"MODEL.RETINANET.NUM_CONVS": 3})
    torch.nn.init.normal_(model.head.cls_subnet[4].weight)  # Otherwise the maps are next to nothing.
    signals = record(model, inputs)
    for branch, last, output in (("cls", "cls_score", "dense_logits"), ("box", "bbox_pred", "dense_deltas")):
        rows = []
        for level in ("p2", "p3", "p4", "p5"):
            hidden = signals[f"dense_{branch}_hidden_{level}"]
            assert (hidden >= 0).all()
            assert hidden.any()
            for layer in (f"{branch}_conv3", last):
                weight, bias = signals[f"dense_{layer}_weight"], signals[f"dense_{layer}_bias"]
                hidden = F.conv2d(hidden, weight, bias, padding=1).relu() if layer != last else hidden
            out = F.conv2d(hidden, weight, bias, padding=1)
            rows.append(permute_to_N_HWA_K(out, signals[output].shape[-1]))
        torch.testing.assert_close(torch.cat(rows, dim=1), signals[output])
    signals["dense_cls_hidden_p3"].sum().backward()
    assert model.head.cls_subnet[2].weight.grad.abs().sum() > 0
    assert model.head.cls_subnet[4].weight.grad is None


def test_no_hidden_maps_in_branches_with_norms():
    spec = build_tap(make("retinanet", {"MODEL.RETINANET.NORM": "BN"})).spec()
    assert {name for name in spec if name.startswith("dense_")} == {"dense_logits", "dense_deltas"}


# ---- Nothing runs in vain ----
@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ({"p2"}, [1, 0, 0, 0, 0]),
        ({"res5"}, [0, 0, 0, 0, 0]),
        ({"res4_preact", "res5"}, [0, 0, 0, 0, 0]),
        ({"res5", "p2"}, [1, 0, 0, 0, 0]),
        ({"rpn_logits"}, [1, 1, 0, 0, 0]),
        ({"roi_features"}, [1, 0, 0, 0, 0]),
        ({"roi_logits"}, [1, 0, 1, 1, 0]),
        ({"mask_logits"}, [1, 0, 0, 0, 1]),
        ({"p2", "rpn_deltas", "roi_features", "roi_deltas", "mask_logits"}, [1, 1, 1, 1, 1]),
    ],
)
def test_the_teacher_runs_what_is_asked_for(inputs, names, expected):
    student, other = make("mask_rcnn"), make("mask_rcnn", seed=1)
    signals = record(student, inputs)
    found = counts(other)
    assert set(Teacher(other)(inputs, names, signals)) == names
    assert list(found.values()) == expected


def test_the_student_runs_once(inputs, teacher):
    found, model = [], None
    for cfg in (tiny_cfg(), distilled_cfg(teacher, ["HintHead", "SoftTargetHead"])):
        model = build(cfg)
        found.append(counts(getattr(model, "student", model)))
        step(model, inputs)
    assert found[0] == found[1] == dict.fromkeys(PARTS, 1)


def test_the_teachers_head_of_a_dense_detector(inputs):
    student, other = make("retinanet"), make("retinanet", seed=1)
    signals = record(student, inputs)
    ran = []
    other.head.register_forward_hook(lambda *_: ran.append(1))
    Teacher(other)(inputs, {"p3", "dense_cls_score_weight"}, signals)
    assert not ran
    Teacher(other)(inputs, {"dense_logits", "dense_deltas"}, signals)
    assert len(ran) == 1


@pytest.mark.parametrize(
    ("family", "part", "signal"),
    [
        ("keypoint", "roi_heads.keypoint_head.score_lowres", "keypoint_logits"),
        ("panoptic", "sem_seg_head.predictor", "sem_seg_logits"),
        ("semantic", "sem_seg_head.predictor", "sem_seg_logits"),
    ],
)
def test_the_teachers_maps(family, part, signal, inputs):
    signals, other, ran = record(make(family), inputs), make(family, seed=1), []
    other.get_submodule(part).register_forward_hook(lambda *_: ran.append(1))
    Teacher(other)(inputs, {"p3"}, signals)
    assert not ran
    Teacher(other)(inputs, {signal}, signals)
    assert len(ran) == 1
    assert set(attached(other)) == {part}


def test_images_without_objects():
    signals = record(make("mask_rcnn"), tiny_inputs(empty=(0, 1)))
    assert (signals["roi_classes"] == 3).all()
    assert signals["mask_logits"].shape == (0, 3, 8, 8)
    other = Teacher(make("mask_rcnn", seed=1))(tiny_inputs(empty=(0, 1)), {"mask_logits", "roi_logits"}, signals)
    assert other["mask_logits"].shape == (0, 3, 8, 8)
    assert other["roi_logits"].shape == signals["roi_logits"].shape


# ---- What cannot line up is refused when it is built ----
@pytest.mark.parametrize(
    ("options", "source", "told"),
    [
        ({"MODEL.ANCHOR_GENERATOR.SIZES": [[8], [16], [32], [48]]}, "rpn", "strides .4, 8, 16, 32. and"),
        ({"MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [[0.5, 1.0]]}, "rpn", r"anchors per cell \[1, 1, 1, 1\] and \[2, 2"),
        ({"MODEL.RPN.IN_FEATURES": ["p3", "p4", "p5", "p6"]}, "rpn", r"and \[8, 16, 32, 64\]"),
    ],
)
def test_anchors_that_differ(tmp_path, options, source, told):
    named = save_teacher(tmp_path, tiny_cfg(options=WIDE | options))
    with pytest.raises(InputError, match=f"^MODEL.ANCHOR_GENERATOR: must be equal in student and teacher, .*{told}"):
        build(distilled_cfg(named, ["SoftTargetHead"], {"KD.SOFT_TARGET.SOURCES": [source]}))
    build(distilled_cfg(named, ["SoftTargetHead"], {"KD.SOFT_TARGET.SOURCES": ["roi"]}))  # needs no anchors


@pytest.mark.parametrize(
    ("family", "key", "value", "signal"),
    [
        ("keypoint", "MODEL.ROI_KEYPOINT_HEAD.POOLER_RESOLUTION", 6, "keypoint_logits"),
        ("semantic", "MODEL.SEM_SEG_HEAD.COMMON_STRIDE", 2, "sem_seg_logits"),
        ("panoptic", "MODEL.SEM_SEG_HEAD.COMMON_STRIDE", 2, "sem_seg_logits"),
    ],
)
def test_maps_of_other_sizes(family, key, value, signal):
    taps = [build_tap(make(family)), build_tap(make(family, {key: value}))]
    taps[0].check_alignment(taps[1], {"p2"})
    with pytest.raises(
        InputError, match=rf"^{key}: must be equal in student and teacher, since .*; got 4 and {value}\.$"
    ):
        taps[0].check_alignment(taps[1], {signal})


def test_anchors_of_dense_detectors_that_differ(tmp_path):
    named = save_teacher(tmp_path, tiny_cfg("retinanet", {"MODEL.ANCHOR_GENERATOR.SIZES": [[9], [16], [32], [64]]}))
    with pytest.raises(InputError, match=r"^MODEL.ANCHOR_GENERATOR: must be equal in student and teacher"):
        build(distilled_cfg(named, ["SoftTargetHead"], {"KD.SOFT_TARGET.SOURCES": ["dense"]}, "retinanet"))


def test_box_deltas_of_another_scale(tmp_path):
    named = save_teacher(tmp_path, tiny_cfg(options={"MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": (1.0, 1.0, 1.0, 1.0)}))
    with pytest.raises(InputError, match=r"BBOX_REG_WEIGHTS: .*; got \(10.0, 10.0, 5.0, 5.0\) and \(1.0, 1.0, "):
        build(distilled_cfg(named, ["BoxTargetHead"]))


@pytest.mark.parametrize(("family", "node"), [("retinanet", "RETINANET"), ("mask_rcnn", "RPN")])
def test_deltas_of_anchors_of_another_scale(family, node):
    other = make(family, {f"MODEL.{node}.BBOX_REG_WEIGHTS": (2.0, 2.0, 1.0, 1.0)})
    taps, name = [build_tap(make(family)), build_tap(other)], "dense" if node == "RETINANET" else "rpn"
    taps[0].check_alignment(taps[1], {f"{name}_logits"})
    with pytest.raises(InputError, match=rf"^MODEL.{node}.BBOX_REG_WEIGHTS: must be equal in student and teacher"):
        taps[0].check_alignment(taps[1], {f"{name}_deltas"})
    if name == "dense":
        with pytest.raises(InputError, match=r"^MODEL.RETINANET.BBOX_REG_WEIGHTS: must be equal"):
            taps[0].check_alignment(taps[1], {"dense_box_hidden_p2"})


SIGMOID = {"MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE": True}


@pytest.mark.parametrize(("student", "teacher"), [(SIGMOID, {}), ({}, SIGMOID), (SIGMOID, SIGMOID)])
@pytest.mark.parametrize("head", ["SoftTargetHead", "BornAgainHead"])
def test_classes_that_are_no_softmax(tmp_path, student, teacher, head):
    named = save_teacher(tmp_path, tiny_cfg(options=teacher))
    with pytest.raises(InputError, match=r"^MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE: must be False in all networks whose "):
        build(distilled_cfg(named, [head], student))
    build(distilled_cfg(named, ["HintHead"], student))  # compares no classes


# ---- Other models ----
class Pyramid(Backbone):
    """One convolution of stride 4."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 4, stride=4)

    def forward(self, x):
        return {"p2": self.conv(x)}

    def output_shape(self):
        return {"p2": ShapeSpec(channels=5, stride=4)}


class OnlyBackbone(nn.Module):
    """A meta-architecture that no tap knows: its loss is the mean of p2."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    @property
    def device(self):
        return next(self.parameters()).device

    def preprocess_image(self, batched_inputs):
        images = [x["image"].float() / 255 for x in batched_inputs]
        return ImageList.from_tensors(images, self.backbone.size_divisibility)

    def forward(self, batched_inputs):
        return {"loss_mean": self.backbone(self.preprocess_image(batched_inputs).tensor)["p2"].square().mean()}


def test_an_unknown_model_is_distilled_by_its_backbone(inputs):
    torch.manual_seed(0)
    student, other = OnlyBackbone(Pyramid()), OnlyBackbone(Pyramid())
    assert type(build_tap(student)) is BackboneTap
    assert set(build_tap(student).spec()) == set(record(student, inputs)) == {"p2"}
    assert torch.equal(
        Teacher(copy.deepcopy(student))(inputs, {"p2"}, {})["p2"], record(student, inputs)["p2"].detach()
    )
    assert not torch.equal(Teacher(other)(inputs, {"p2"}, {})["p2"], record(student, inputs)["p2"])


def test_an_unknown_model_through_the_config(tmp_path, inputs):
    @META_ARCH_REGISTRY.register()
    class Unheard(OnlyBackbone):
        def __init__(self, cfg):
            super().__init__(build_backbone(cfg))

    try:
        named = save_teacher(tmp_path, tiny_cfg(options=WIDE | {"MODEL.META_ARCHITECTURE": "Unheard"}))
        options = {"KD.STUDENT_ARCHITECTURE": "Unheard"}
        losses = step(build(distilled_cfg(named, ["HintHead"], options)), inputs)
        assert set(losses) == {"loss_mean", "loss_kd_hint"}
        told = r"^KD.SOFT_TARGET.SOURCES: 'roi_logits' is not a signal of the student, which has res2, .*p6\.$"
        with pytest.raises(InputError, match=told):
            build(distilled_cfg(named, ["SoftTargetHead"], options))
    finally:
        META_ARCH_REGISTRY._obj_map.pop("Unheard")


def test_a_subclass_has_the_tap_of_its_base():
    model = make("mask_rcnn")
    model.__class__ = type("Renamed", (type(model),), {})
    assert type(build_tap(model)) is GeneralizedRCNNTap
    assert type(build_tap(make("retinanet"))) is RetinaNetTap
    assert isinstance(build_tap(make("panoptic")), GeneralizedRCNNTap)


def test_a_model_without_backbone():
    with pytest.raises(InputError, match=r"^Linear cannot be distilled: it has no tap \(registered are .*RetinaNetTap"):
        build_tap(nn.Linear(1, 1))


class Square(Pyramid):
    size_divisibility = 32


def test_images_that_are_padded_differently():
    """A teacher's maps are cut to the student's, but students that teach each other must pad alike."""
    taps = [build_tap(OnlyBackbone(Pyramid())), build_tap(OnlyBackbone(Square()))]
    with pytest.raises(
        InputError, match=r"^KD.HEADS: the student pads images to multiples of 0 pixels, the teacher of 32"
    ):
        taps[0].check_padding(taps[1], ["p2"])
    taps[0].check_padding(taps[1], ["roi_logits"])
