"""A student that begins with the teacher's FPN, proposal network and heads."""

import re

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from helpers import build as build_seeded
from helpers import distilled_cfg, save_teacher, tiny_cfg, with_data, write_yaml

from kd_det import InputError, MutualStudents
from kd_det.data import register_datasets
from kd_det.engine import Trainer
from kd_det.engine.arguments import training_parser
from kd_det.engine.run_config import make_config
from kd_det.engine.summary import log_summary
from kd_det.inherit import inherit
from kd_det.taps import build_tap

DEEPER = {"MODEL.RESNETS.DEPTH": 18}


def build(family="mask_rcnn", options=None, *, seed=0):
    torch.manual_seed(seed)
    return build_tap(build_model(tiny_cfg(family, options)))


@pytest.mark.parametrize("family", ["mask_rcnn", "c4", "cascade", "retinanet"])
def test_everything_after_the_bottom_up_network_is_the_teachers(family):
    student, teacher = build(family), build(family, {} if family == "c4" else DEEPER, seed=1)
    before = {k: v.clone() for k, v in student.model.state_dict().items()}
    inherited = inherit(student, teacher, same_classes=True)
    below = "backbone." if family == "c4" else "backbone.bottom_up."
    expected = {k: v for k, v in teacher.model.state_dict().items() if not k.startswith(below)}
    assert inherited.shapes == {k: v.shape for k, v in expected.items() if "num_batches_tracked" not in k}
    assert not inherited.refused
    for name, tensor in student.model.state_dict().items():
        assert torch.equal(tensor, before[name] if name.startswith(below) else expected[name]), name
    assert any(not torch.equal(before[name], expected[name]) for name in expected)


def test_a_layer_whose_weight_has_another_shape_keeps_its_bias_too():
    student, teacher = build(), build(options={"MODEL.RESNETS.RES2_OUT_CHANNELS": 12}, seed=1)
    before = {k: v.clone() for k, v in student.model.state_dict().items()}
    inherited = inherit(student, teacher, same_classes=True)
    laterals = {f"backbone.fpn_lateral{i}.{key}" for i in range(2, 6) for key in ("weight", "bias")}
    assert set(inherited.refused) == laterals
    assert inherited.refused["backbone.fpn_lateral2.bias"] == "its own: its weight is 16 x 8 x 1 x 1"
    assert str(inherited).startswith(f"{len(inherited.shapes) - 8} of {len(inherited.shapes)} tensors")
    assert all(torch.equal(student.model.state_dict()[name], before[name]) for name in laterals)


def test_the_norm_of_a_convolution_that_is_not_the_teachers_stays_too():
    norm = {"MODEL.FPN.NORM": "BN"}
    student, teacher = build(options=norm), build(options=norm | {"MODEL.RESNETS.RES2_OUT_CHANNELS": 12}, seed=1)
    with torch.no_grad():
        teacher.model.backbone.fpn_lateral2.norm.weight.fill_(7.0)
        teacher.model.backbone.fpn_output2.norm.weight.fill_(7.0)
    inherited = inherit(student, teacher, same_classes=True)
    assert inherited.refused["backbone.fpn_lateral2.norm.weight"] == "its own, as backbone.fpn_lateral2 is"
    assert (student.model.backbone.fpn_lateral2.norm.weight == 1.0).all()
    assert (student.model.backbone.fpn_output2.norm.weight == 7.0).all()
    assert not any("num_batches_tracked" in name for name in inherited.shapes)


BOX = "roi_heads.box_predictor"
MASK = "roi_heads.mask_head.predictor"
CLASS_LAYERS = {
    "mask_rcnn": [f"{BOX}.cls_score", f"{BOX}.bbox_pred", MASK],
    "cascade": [*(f"{BOX}.{i}.cls_score" for i in range(3)), MASK],
    "retinanet": ["head.cls_score"],
}


@pytest.mark.parametrize("family", CLASS_LAYERS)
def test_layers_of_classes_stay_where_the_classes_are_not_the_same(family):
    student, teacher = build(family), build(family, seed=1)
    inherited = inherit(student, teacher, same_classes=False)
    names = {f"{layer}.{key}" for layer in CLASS_LAYERS[family] for key in ("weight", "bias")}
    assert set(inherited.refused) == names
    state = teacher.model.state_dict()
    assert all(not torch.equal(student.model.state_dict()[name], state[name]) for name in names if "weight" in name)


def test_a_teacher_of_another_architecture_leaves_nothing_to_inherit():
    student = build("retinanet")
    with pytest.raises(
        InputError, match=r"KD\.INHERIT: none of the teacher's \d+ tensors .*weight: has no such weight"
    ):
        inherit(student, build("c4"), same_classes=True)


# ---- In a run ----
@pytest.fixture
def run(tmp_path, coco_folder, in_process):
    """Gives the config of a student that inherits from a teacher trained on the same data, with other options."""

    def make(*heads, **options):
        teacher = with_data(tiny_cfg(options=DEEPER), coco_folder, tmp_path / "teacher")
        named = save_teacher(tmp_path, teacher) | {"KD.INHERIT": True}
        cfg = with_data(distilled_cfg(named | options, list(heads)), coco_folder, tmp_path)
        register_datasets(cfg)
        return cfg

    return make


def weights(cfg):
    return torch.load(cfg.KD.TEACHER.WEIGHTS, weights_only=True)["model"]


def test_a_run_begins_with_the_teachers_heads_after_its_own_weights(run, tmp_path, caplog):
    caplog.set_level("INFO", "kd_det.engine.summary")
    torch.save({"model": build_seeded(tiny_cfg(), seed=5).state_dict()}, tmp_path / "student.pth")
    cfg = run("HintHead", **{"MODEL.WEIGHTS": str(tmp_path / "student.pth")})
    trainer = Trainer(cfg)
    trainer.resume_or_load(False)
    given, own = weights(cfg), torch.load(tmp_path / "student.pth", weights_only=True)["model"]
    for name, tensor in trainer.student.state_dict().items():
        assert torch.equal(tensor, (own if name.startswith("backbone.bottom_up.") else given)[name]), name
    log_summary(trainer)
    count = len(trainer.inheritance.shapes)
    assert f"KD.INHERIT: {count} of {count} tensors after the bottom-up network are the teacher's" in caplog.text
    assert re.search(r"roi_heads\.box_predictor\.cls_score\.weight +4 x 24 +the teacher's", caplog.text)


def test_a_resumed_run_keeps_its_weights(run):
    cfg = run("HintHead")
    trainer = Trainer(cfg)
    trainer.resume_or_load(False)
    with EventStorage(0), torch.no_grad():
        trainer.student.roi_heads.box_predictor.cls_score.weight.fill_(0.25)
        trainer.iter = 0
        trainer.checkpointer.save("model_0000000", iteration=0)
    resumed = Trainer(cfg)
    resumed.resume_or_load(True)
    assert resumed.inheritance is None
    assert (resumed.student.roi_heads.box_predictor.cls_score.weight == 0.25).all()


def test_without_heads_the_teacher_gives_its_weights_alone(run):
    cfg = run()
    trainer = Trainer(cfg)
    trainer.resume_or_load(False)
    name = "proposal_generator.rpn_head.conv.weight"
    assert torch.equal(trainer.student.state_dict()[name], weights(cfg)[name])
    assert not trainer.plain_model.heads


def test_class_layers_stay_if_the_teachers_data_are_not_known(run):
    cfg = run("HintHead", **{"KD.TEACHER.OPTS": ["DATASETS.TRAIN", [], "DATASETS.TEST", []]})
    trainer = Trainer(cfg)
    trainer.resume_or_load(False)
    assert {name.rpartition(".")[0] for name in trainer.inheritance.refused} == set(CLASS_LAYERS["mask_rcnn"])


def test_a_plain_config_that_inherits_gets_a_teacher(run, tmp_path):
    cfg = run()
    student = write_yaml(tmp_path / "student.yaml", tiny_cfg())
    arguments = ["--config-file", student, "--teacher", cfg.KD.TEACHER.CONFIG_FILE, "KD.INHERIT", "True"]
    made = make_config(training_parser("").parse_args(arguments))
    assert (made.MODEL.META_ARCHITECTURE, made.KD.STUDENT_ARCHITECTURE) == ("TeacherStudent", "GeneralizedRCNN")
    arguments = ["--config-file", student, "KD.INHERIT", "True"]
    with pytest.raises(InputError, match=r"KD\.TEACHER\.CONFIG_FILE: .* names no teacher for KD\.INHERIT"):
        make_config(training_parser("").parse_args(arguments))


def test_students_without_a_teacher_inherit_nothing():
    cfg = tiny_cfg(options={"KD.INHERIT": True})
    with pytest.raises(InputError, match=r"KD\.INHERIT: must be False for MutualStudents"):
        MutualStudents.from_config(cfg)
