"""A teacher of other classes: which classes it is taken to know, in whole models and runs, and mistakes."""

import re

import pytest
import torch
from classification.models import classifier_cfg, classifier_inputs
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from helpers import CLASSES, WIDE, build, distilled_cfg, save_teacher, step, tiny_cfg, tiny_inputs, write_yaml

from kd_det import Batch, InputError
from kd_det.class_partition import ClassPartition
from kd_det.config import merge_file, read_config
from kd_det.engine.stages import generation_config
from kd_det.engine.teacher_check import check_class_order, have_same_classes
from kd_det.heads import SoftTargetHead
from kd_det.heads.build import student_signals, teacher_signals
from kd_det.teacher_classes import divide_classes

COUNTS = {
    "mask_rcnn": "MODEL.ROI_HEADS.NUM_CLASSES",
    "retinanet": "MODEL.RETINANET.NUM_CLASSES",
    "classifier": "MODEL.CLASSIFIER.NUM_CLASSES",
}
# The tiny student has a square, a triangle and a bar; these teachers are a superset, a subset, another order, and one
# that knows one class less and another one more.
TEACHERS = {
    "superset": ["disc", "bar", "square", "ring", "triangle"],
    "subset": ["bar", "square"],
    "permuted": ["bar", "square", "triangle"],
    "mixed": ["bar", "disc"],
}


def named(cfg, names, name="mine"):
    """The config with a data set, which need not exist, of these classes."""
    if names:
        cfg.DATASETS.VOC_FORMAT[name] = CfgNode({"ROOT": "/no", "SPLIT": "train", "CLASSES": list(names)})
        cfg.DATASETS.TRAIN = (name,)
    else:
        cfg.DATASETS.TRAIN = ()
    cfg.DATASETS.TEST = ()
    return cfg


def keys(**options):
    return {f"KD.TEACHER.{key}": value for key, value in options.items()}


@pytest.fixture
def make_cfg(tmp_path):
    """Makes the config of a student of squares, triangles and bars, and a teacher of `count` classes, maybe named."""

    def make(count, heads=("SoftTargetHead",), options=None, *, family="mask_rcnn", own=CLASSES, names=()):
        teacher = tiny_cfg(family, {COUNTS[family]: count} | (WIDE if family == "mask_rcnn" else {}))
        files = save_teacher(tmp_path / "teacher", named(teacher, names, "theirs"))
        return named(distilled_cfg(files, list(heads), options, family), own)

    return make


# ---- Whole models ----
@pytest.mark.parametrize("names", TEACHERS.values(), ids=TEACHERS)
@pytest.mark.parametrize(
    ("family", "heads", "options"),
    [
        (
            "mask_rcnn",
            ["SoftTargetHead", "BoxTargetHead", "SoftmaxRegressionHead", "InstanceGraphHead", "HintHead"],
            {
                "KD.SOFT_TARGET.SOURCES": ["roi", "rpn", "mask"],
                "KD.BOX_TARGET.SOURCES": ["roi", "rpn"],
                "KD.BOX_TARGET.KIND": "giou",
                "KD.SOFTMAX_REGRESSION.NORM": "LN",
            },
        ),
        (
            "retinanet",
            ["SoftTargetHead", "BoxTargetHead", "CrossHead"],
            {
                "KD.SOFT_TARGET.SOURCES": ["dense"],
                "KD.SOFT_TARGET.ANCHORS": "focal",
                "KD.BOX_TARGET.SOURCES": ["dense"],
                "MODEL.RETINANET.NUM_CONVS": 2,
                "KD.CROSS.HIDDEN": 1,
                "KD.TEACHER.OPTS": ["MODEL.RETINANET.NUM_CONVS", 2],
            },
        ),
    ],
    ids=["mask_rcnn", "retinanet"],
)
def test_every_kind_of_head_teaches(make_cfg, tmp_path, family, heads, options, names):
    cfg = make_cfg(len(names), heads, options | keys(CLASSES=names), family=family)
    if family == "retinanet":
        teacher = tiny_cfg(family, {COUNTS[family]: len(names), "MODEL.RETINANET.NUM_CONVS": 2})
        torch.save({"model": build_model(teacher).state_dict()}, cfg.KD.TEACHER.WEIGHTS)
    model = build(cfg)
    losses = step(model, tiny_inputs())
    distilled = {key: value for key, value in losses.items() if key.startswith("loss_kd")}
    assert len(distilled) >= len(heads)
    sum(distilled.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert any(p.grad.abs().sum() > 0 for p in model.student.backbone.parameters() if p.grad is not None)


def test_losses_of_a_whole_model_are_those_of_the_mapped_logits(make_cfg):
    """Student: square, triangle, bar; teacher: bar, disc. Shared are bars; the rest is everything else in both."""
    model, seen = build(make_cfg(2, options=keys(CLASSES=["bar", "disc"]))), {}

    def forwards(batched_inputs, names, teacher_names):
        losses, seen["student"], teachers = own(batched_inputs, names, teacher_names)
        seen.update(teachers)
        return losses, seen["student"], teachers

    own, model._forwards = model._forwards, forwards
    loss = step(model, tiny_inputs())["loss_kd_soft_target_roi"]
    student, teacher = (seen[side]["roi_logits"].detach().softmax(1) for side in ("student", "teacher"))
    assert student.shape[1] == 4
    assert teacher.shape[1] == 3
    q, p = student[:, 2], teacher[:, 0]
    expected = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("names", [["bar", "square"], ["bar", "disc", "square", "triangle"]], ids=["fewer", "more"])
def test_images(tmp_path, names):
    teacher = classifier_cfg(options={"MODEL.CLASSIFIER.NUM_CLASSES": len(names)})
    options = save_teacher(tmp_path / "teacher", teacher) | keys(CLASSES=names) | {"KD.HEADS": ["SoftTargetHead"]}
    options |= {"MODEL.META_ARCHITECTURE": "TeacherStudent", "KD.STUDENT_ARCHITECTURE": "ImageClassifier"}
    model = build(named(classifier_cfg(options=options), CLASSES))
    loss = step(model, classifier_inputs())["loss_kd_soft_target_cls"]
    assert loss.isfinite()
    assert loss > 0


def test_head_without_class_predictions_sees_everything(make_cfg):
    """It does not matter to it that no class is shared, and nothing is computed or printed."""
    cfg = make_cfg(2, ["HintHead"], keys(CLASSES=["disc", "ring"]))
    model = build(cfg)
    assert model.classes is None
    assert any(key.startswith("loss_kd_hint") for key in step(model, tiny_inputs()))
    assert len(model.describe(cfg)) == 1


# ---- Where the classes are the same ----
@pytest.mark.parametrize(
    ("names", "options"),
    [((), {}), (CLASSES, {}), ((), {"CLASSES": list(CLASSES)}), (("Square", "triangle", "bar"), {})],
    ids=["unknown", "same data", "same list", "similar data"],
)
def test_equal_classes_are_compared_as_they_are(make_cfg, names, options):
    """To the last digit: heads get the very tensors."""
    cfg = make_cfg(3, options=keys(**options), names=names)
    model, plain = build(cfg), build(make_cfg(3))
    assert model.classes is None
    losses, expected = step(model, tiny_inputs()), step(plain, tiny_inputs())
    assert {key: x.item() for key, x in losses.items()} == {key: x.item() for key, x in expected.items()}


# ---- Names ----
def divide(cfg, student=3, teacher=2):
    return divide_classes(cfg, student, teacher)


def test_names_of_the_teachers_data_sets(make_cfg):
    assert divide(make_cfg(2, names=["bar", "disc"])) == ClassPartition(CLASSES, ("bar", "disc"))


def test_model_of_the_zoo_knows_coco(make_cfg):
    """Its config may name other data sets, or none."""
    cfg = make_cfg(2, own=["person", "pallet", "dog"])
    cfg.KD.TEACHER.CONFIG_FILE = "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"
    for opts in ([], ["DATASETS.TRAIN", [], "DATASETS.TEST", []]):
        cfg.KD.TEACHER.OPTS = opts
        classes = divide(cfg, 3, 80)
        assert classes.teacher == tuple(MetadataCatalog.get("coco_2017_val").thing_classes)
        assert (classes.shared, classes.only_student, len(classes.only_teacher)) == (("person", "dog"), ("pallet",), 78)


def test_synonyms(make_cfg):
    options = keys(CLASSES=["disc", "rod"], SYNONYMS=CfgNode({"rod": "bar"}))
    classes = divide(make_cfg(2, options=options))
    assert classes.teacher == ("disc", "bar")
    assert classes.shared == ("bar",)


def test_synonyms_alone_make_classes_be_compared_by_name(make_cfg):
    names, synonyms = ["rod", "square", "triangle"], CfgNode({"rod": "bar"})
    assert divide(make_cfg(3, options=keys(SYNONYMS=synonyms), names=names), 3, 3).teacher[0] == "bar"


def test_synonyms_in_a_file(make_cfg, tmp_path):
    cfg = make_cfg(2, options=keys(CLASSES=["disc", "rod"]))
    (tmp_path / "more.yaml").write_text("KD: {TEACHER: {SYNONYMS: {rod: bar}}}")
    merge_file(cfg, str(tmp_path / "more.yaml"))
    read = read_config(write_yaml(tmp_path / "config.yaml", cfg))
    assert divide(cfg).shared == divide(read).shared == ("bar",)


def test_inherited_layers_of_classes(make_cfg):
    assert have_same_classes(make_cfg(3, names=CLASSES))
    assert not have_same_classes(make_cfg(3, names=TEACHERS["permuted"]))
    assert have_same_classes(make_cfg(3, options=keys(CLASSES=list(CLASSES)), names=TEACHERS["permuted"]))
    assert not have_same_classes(make_cfg(3, options=keys(CLASSES=TEACHERS["permuted"]), names=CLASSES))


def test_data_sets_in_another_order_are_fine_if_classes_are_named(make_cfg):
    cfg = make_cfg(3, options=keys(CLASSES=TEACHERS["permuted"]), names=TEACHERS["permuted"])
    check_class_order(cfg, {"SoftTargetHead": SoftTargetHead()})


def test_next_generation_has_the_students_classes(make_cfg):
    cfg = make_cfg(2, options=keys(CLASSES=["disc", "rod"], SYNONYMS=CfgNode({"rod": "bar"})))
    first, second = (generation_config(cfg, i).KD.TEACHER for i in (1, 2))
    assert first.CLASSES == ["disc", "rod"]
    assert (second.CLASSES, second.SYNONYMS) == ([], {})


def test_summary_has_a_table_of_the_classes(make_cfg):
    cfg = make_cfg(2, options=keys(CLASSES=["bar", "disc"]))
    (_, table) = build(cfg).describe(cfg)
    assert [line.split()[-1] for line in table.splitlines()[2:]] == ["bar", "triangle", "disc"]


# ---- Mistakes ----
@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"CLASSES": ["bar", "bar"]}, r"KD\.TEACHER\.CLASSES: class 'bar' is named twice"),
        (
            {"CLASSES": ["bar"]},
            r"KD\.TEACHER\.CLASSES: .* but KD\.TEACHER\.CLASSES names 1 classes \(bar\) and the teacher predicts 2\.",
        ),
        (
            {"SYNONYMS": {"rod": "bar"}},
            r"KD\.TEACHER\.SYNONYMS: .* but the teacher's data sets name no classes and the teacher predicts 2\.",
        ),
        (
            {"CLASSES": ["disc", "rod"], "SYNONYMS": {"rode": "bar"}},
            r"KD\.TEACHER\.SYNONYMS: 'rode' in rode: bar is not a class of the teacher, which has disc, rod;",
        ),
        (
            {"CLASSES": ["disc", "rod"], "SYNONYMS": {"rod": "baar"}},
            r"KD\.TEACHER\.SYNONYMS: 'baar' in rod: baar is not a class of the student, which has square, triangle, b",
        ),
        (
            {"CLASSES": ["bar", "rod"], "SYNONYMS": {"rod": "bar"}},
            r"KD\.TEACHER\.SYNONYMS: class 'bar' is named twice",
        ),
        (
            {"CLASSES": ["disc", "ring"]},
            r"KD\.TEACHER\.CLASSES: SoftTargetHead .* share none; the student's are square, triangle, bar, the "
            "teacher's are disc, ring",
        ),
    ],
    ids=str,
)
def test_mistakes(make_cfg, options, told):
    options = {key: CfgNode(x) if isinstance(x, dict) else x for key, x in options.items()}
    with pytest.raises(InputError, match=f"^{told}"):
        build(make_cfg(2, options=keys(**options)))


def test_student_whose_names_are_not_known_or_too_few(make_cfg):
    with pytest.raises(InputError, match=r"but the student's data sets name no classes and the student predicts 3\.$"):
        build(make_cfg(2, options=keys(CLASSES=["bar", "disc"]), own=()))
    with pytest.raises(InputError, match=r"data sets name 2 classes \(bar, disc\) and the student predicts 3\.$"):
        build(make_cfg(2, options=keys(CLASSES=["bar", "disc"]), own=["bar", "disc"]))


def test_unknown_names_of_other_classes(make_cfg):
    with pytest.raises(InputError, match=r"4 channels in the student and 3 .* List the teacher's in KD\.TEACHER\.CLAS"):
        build(make_cfg(2))


def test_student_that_would_learn_a_class_from_nothing(make_cfg):
    options = keys(CLASSES=["bar", "square"])
    with pytest.raises(
        InputError, match=r"^KD\.HEADS: BornAgainHead takes the place of loss_cls, .* not know triangle"
    ):
        build(make_cfg(2, ["BornAgainHead"], options))
    assert build(make_cfg(2, ["BornAgainHead"], options | {"KD.BORN_AGAIN.LABELS": True})).classes.shared


@pytest.mark.parametrize(
    ("signals", "options", "told"),
    [
        (("input_gradient",), {}, "compares input_gradient, which depend on all classes"),
        (("logits",), {"reads_labels": True}, "but the teacher does not know b;"),
        (("logits",), {"reads_labels": False}, None),
    ],
)
def test_heads_that_need_the_same_classes(signals, options, told):
    head = torch.nn.Identity()
    head.signals = signals
    vars(head).update(options)
    arguments = head, "AHead", student_signals(head), teacher_signals(head)
    classes = ClassPartition(("a", "b"), ("a",))
    if told is None:
        classes.check_head(*arguments)
        return
    with pytest.raises(InputError, match=rf"^KD\.HEADS: AHead .*{re.escape(told)}"):
        classes.check_head(*arguments)


def test_recorded_signals_are_not_changed():
    student = {"roi_logits": torch.zeros(2, 3), "roi_classes": torch.tensor([1, 2])}
    before = dict(student)
    classes = ClassPartition(("a", "b"), ("b",))
    SoftTargetHead()(*classes.align(student, {"roi_logits": torch.zeros(2, 2)}, "shared"), Batch([], []))
    assert all(student[name] is before[name] for name in before)
