"""Tests the config of a run: the command line turns any Detectron2 config into one for distillation."""

import re

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data.datasets import register_coco_instances
from detectron2.modeling import build_model
from helpers import build, distilled_cfg, parse, step, tiny_cfg, with_data, write_yaml

from kd_det import InputError, add_kd_config
from kd_det.config import merge_file, student_config
from kd_det.config_files import find_config
from kd_det.engine import import_plugin, setup
from kd_det.engine.run_config import make_config

ZOO = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"
pytestmark = pytest.mark.usefixtures("in_process")


def configure(*arguments, config=ZOO):
    return make_config(parse("--config-file", config, *arguments))


def test_config_is_unchanged_without_arguments():
    plain = get_cfg()
    add_kd_config(plain)
    plain.OUTPUT_DIR = "output/retinanet_R_50_FPN_1x"
    merge_file(plain, find_config(ZOO))
    assert configure() == plain
    assert plain.MODEL.META_ARCHITECTURE == "RetinaNet"


def test_zoo_config_with_teacher_and_heads():
    cfg = configure("--teacher", "t.yaml", "--teacher-weights", "t.pth", "--kd-heads", "ReviewKDHead,SoftTargetHead")
    assert cfg.MODEL.META_ARCHITECTURE == "TeacherStudent"
    assert cfg.KD.STUDENT_ARCHITECTURE == "RetinaNet"
    assert (cfg.KD.TEACHER.CONFIG_FILE, cfg.KD.TEACHER.WEIGHTS) == ("t.yaml", "t.pth")
    assert cfg.KD.HEADS == ["ReviewKDHead", "SoftTargetHead"]
    assert cfg.KD.REVIEW.IN_FEATURES == ["p3", "p4", "p5", "p6", "p7"]
    assert cfg.KD.SOFT_TARGET.SOURCES == ["dense"]
    # The rest of the config is unchanged.
    assert student_config(cfg).MODEL == configure().MODEL


def test_rcnn_keeps_the_default_levels_of_heads():
    cfg = configure(
        "--teacher", "t.yaml", "--kd-heads", "ReviewKDHead", config="COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"
    )
    assert cfg.KD.REVIEW.IN_FEATURES == ["p2", "p3", "p4", "p5", "p6"]
    assert cfg.KD.SOFT_TARGET.SOURCES == ["roi"]


R_CNN, C4 = "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml", "COCO-Detection/faster_rcnn_R_50_C4_1x.yaml"
CLASSIFIER = "Classification/digits_teacher.yaml"
PYRAMID = ["p3", "p4", "p5", "p6", "p7"]


@pytest.mark.parametrize(
    ("head", "config", "expected"),
    [
        ("OverhaulHead", R_CNN, {"OVERHAUL.IN_FEATURES": ["res2", "res3", "res4", "res5"]}),
        ("OverhaulHead", ZOO, {"OVERHAUL.IN_FEATURES": ["res3", "res4", "res5"]}),
        ("OverhaulHead", C4, {"OVERHAUL.IN_FEATURES": ["res4"]}),
        ("ActivationBoundaryHead", CLASSIFIER, {"ACTIVATION_BOUNDARY.IN_FEATURES": ["res2", "res3", "res4"]}),
        ("FactorTransferHead", R_CNN, {"FACTOR_TRANSFER.IN_FEATURES": ["roi_features"]}),
        ("FactorTransferHead", ZOO, {"FACTOR_TRANSFER.IN_FEATURES": PYRAMID}),
        ("InheritExploreHead", CLASSIFIER, {"INHERIT_EXPLORE.IN_FEATURES": ["res2", "res3", "res4"]}),
        ("HintHead", R_CNN, {"HINT.IN_FEATURES": ["p2", "p3", "p4", "p5"]}),
        ("SoftmaxRegressionHead", R_CNN, {"SOFTMAX_REGRESSION.IN_FEATURE": "roi_box_features"}),
        ("SoftmaxRegressionHead", CLASSIFIER, {"SOFTMAX_REGRESSION.IN_FEATURE": "res4"}),
        ("BornAgainHead", CLASSIFIER, {"BORN_AGAIN.SOURCE": "cls"}),
        ("BornAgainHead", R_CNN, {"BORN_AGAIN.SOURCE": "roi"}),
    ],
)
def test_defaults_of_heads_are_adapted_to_the_student(head, config, expected):
    cfg = configure("--teacher", "t.yaml", "--kd-heads", head, config=config)
    for key, value in expected.items():
        node, option = key.split(".")
        assert cfg.KD[node][option] == value


def test_configured_values_of_a_head_stay(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(f"_BASE_: {find_config(R_CNN)}\nKD: {{HINT: {{IN_FEATURES: [res9]}}}}\n")
    cfg = configure("--teacher", "t.yaml", "--kd-heads", "HintHead", config=str(path))
    assert cfg.KD.HINT.IN_FEATURES == ["res9"]


def test_c4_model_has_one_level():
    cfg = configure(
        "--teacher", "t.yaml", "--kd-heads", "HintHead", config="COCO-Detection/faster_rcnn_R_50_C4_1x.yaml"
    )
    assert cfg.KD.HINT.IN_FEATURES == ["res4"]


def test_arguments_override_a_distillation_config(teacher, tmp_path):
    config = write_yaml(tmp_path / "config.yaml", distilled_cfg(teacher, ["HintHead"]))
    cfg = configure("--kd-heads", "ReviewKDHead", config=config)
    assert cfg.KD.HEADS == ["ReviewKDHead"]
    assert teacher["KD.TEACHER.WEIGHTS"] == cfg.KD.TEACHER.WEIGHTS
    cfg = configure("--teacher", "other.yaml", config=config)
    assert (cfg.KD.TEACHER.CONFIG_FILE, cfg.KD.TEACHER.WEIGHTS) == ("other.yaml", "")


def test_overrides_of_a_files_teacher_are_not_those_of_another():
    student, overrides = "Classification/imagenet_resnet18.yaml", ["MODEL.RESNETS.DEPTH", 34]
    assert overrides == configure(config=student).KD.TEACHER.OPTS
    arguments = ["--teacher", student, "--kd-heads", "SoftTargetHead"]
    assert configure(*arguments, config=student).KD.TEACHER.OPTS == []
    given = configure(*arguments, "KD.TEACHER.OPTS", str(overrides), config=student)
    assert overrides == given.KD.TEACHER.OPTS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--teacher", "t.yaml"], f"KD.HEADS: {ZOO} names no distillation heads; name some with --kd-heads"),
        (["--teacher-weights", "x"], f"KD.HEADS: {ZOO} names no distillation heads; name some with --kd-heads"),
        (["--kd-heads", "HintHead"], f"KD.TEACHER.CONFIG_FILE: {ZOO} names no teacher for HintHead; name one with"),
    ],
)
def test_teacher_without_heads_and_heads_without_teacher_are_refused(arguments, message):
    with pytest.raises(InputError, match=f"^{re.escape(message)}"):
        configure(*arguments)


def test_zoo_config_trains(coco_folder, tmp_path, inputs):
    """The zoo's RetinaNet on a data set of one's own, made small from the command line; its twin is the teacher."""
    small = ["MODEL.RESNETS.WIDTH_PER_GROUP", 4, "MODEL.RESNETS.RES2_OUT_CHANNELS", 8, "MODEL.FPN.OUT_CHANNELS", 16]
    small += ["MODEL.RESNETS.STEM_OUT_CHANNELS", 8, "MODEL.RETINANET.NUM_CLASSES", 3, "MODEL.RETINANET.NUM_CONVS", 1]
    small += ["MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu"]
    twin = get_cfg()
    merge_file(twin, find_config(ZOO))
    twin.merge_from_list(small)
    torch.save(build_model(twin).state_dict(), tmp_path / "twin.pth")

    register_coco_instances("own_data", {}, str(coco_folder / "instances.json"), str(coco_folder / "images"))
    overrides = ["DATASETS.TRAIN", "('own_data',)", "DATASETS.TEST", "('own_data',)", "OUTPUT_DIR", tmp_path / "output"]
    overrides += ["KD.REVIEW.MID_CHANNELS", 8, "KD.TEACHER.OPTS", small, "SEED", 1]
    teacher = ["--teacher", ZOO, "--teacher-weights", tmp_path / "twin.pth"]
    heads = ["--kd-heads", "ReviewKDHead,SoftTargetHead"]
    cfg = setup(parse("--config-file", ZOO, *teacher, *heads, *small, *overrides))
    losses = step(build(cfg), inputs)
    assert set(losses) == {"loss_cls", "loss_box_reg", "loss_kd_review", "loss_kd_soft_target_dense"}


def test_machine_without_gpu_uses_the_cpu(coco_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = write_yaml(tmp_path / "c.yaml", with_data(tiny_cfg(options={"MODEL.DEVICE": "cuda"}), coco_folder, tmp_path))
    assert setup(parse("--config-file", path)).MODEL.DEVICE == "cpu"


def test_missing_files_are_refused():
    with pytest.raises(InputError, match=r"^--config-file: there is no such file, and no/such.yaml is not the name"):
        find_config("no/such.yaml")
    with pytest.raises(InputError, match=r"^--plugin: there is no file no/such.py\.$"):
        import_plugin("no/such.py")


@pytest.mark.parametrize("key", ["SOLVER.CHECKPOINT_KEEP", "KD.GENERATIONS"])
def test_negative_counts_are_refused(key):
    with pytest.raises(InputError, match=f"^{key}: must be 0 or more, got -1.$"):
        setup(parse("--config-file", ZOO, key, "-1"))
