"""The teacher sees what it would see alone, and a teacher that cannot be is refused in one line."""

import re

import pytest
import torch
from helpers import WIDE, build, distilled_cfg, save_teacher, step, tiny_cfg, write_yaml

from kd_det import InputError, Teacher, build_teacher
from kd_det.teacher import load_teacher_config

NAMES = ["p2", "p5", "res4", "rpn_logits", "roi_logits", "roi_features", "mask_logits"]


def save_other(folder, options, seed=1):
    return save_teacher(folder, tiny_cfg(options=WIDE | options), seed=seed)


@pytest.mark.parametrize("formats", [("RGB", "BGR"), ("BGR", "RGB"), ("BGR", "BGR")])
def test_sees_what_it_would_see_alone(tmp_path, inputs, formats):
    """Published code normalises with the student's statistics and does not flip."""
    own_statistics = {"MODEL.PIXEL_MEAN": [100.0, 120.0, 140.0], "MODEL.PIXEL_STD": [40.0, 50.0, 60.0]}
    named = save_other(tmp_path, {"INPUT.FORMAT": formats[1], **own_statistics})
    cfg = distilled_cfg(named, ["HintHead"], {"INPUT.FORMAT": formats[0], "MODEL.PIXEL_MEAN": [1.0, 2.0, 3.0]})
    model = build(cfg)
    with model.tap.record(NAMES) as student:
        step(model, inputs)
    together = model.teacher(inputs, NAMES, student)

    alone = build(tiny_cfg(options=WIDE | own_statistics), seed=1).eval()  # the weights that `save_other` wrote
    images = [x["image"].flip(0) if formats[0] != formats[1] else x["image"] for x in inputs]
    normalised = [(x - alone.pixel_mean) / alone.pixel_std for x in images]
    padded = torch.zeros(2, 3, 64, 96)
    for i, image in enumerate(normalised):
        padded[i, :, : image.shape[1], : image.shape[2]] = image
    with torch.no_grad():
        expected = alone.backbone(padded)
    assert torch.equal(together["p2"], expected["p2"])
    assert torch.equal(together["p5"], expected["p5"])
    # and all the rest, from the stock tap on flipped images
    flipped = [{**x, "image": image} for x, image in zip(inputs, images, strict=True)]
    other = Teacher(alone)(flipped, NAMES, student)
    assert other.keys() == together.keys()
    assert all(torch.equal(other[name], together[name]) for name in other)


def test_the_batch_itself_is_left_alone(tmp_path, inputs):
    model = build(distilled_cfg(save_other(tmp_path, {"INPUT.FORMAT": "RGB"}), ["HintHead"]))
    before = [x["image"].clone() for x in inputs]
    step(model, inputs)
    assert model.teacher.flip_channels
    assert all(torch.equal(x["image"], image) for x, image in zip(inputs, before, strict=True))


def test_batch_norms_with_the_statistics_of_the_batch(tmp_path, inputs):
    """The features are those of training mode, and no statistic of the teacher changes."""
    norm = {"MODEL.RESNETS.NORM": "BN", "MODEL.FPN.NORM": "BN", "MODEL.BACKBONE.FREEZE_AT": 0}
    named = save_other(tmp_path, norm)
    found = {}
    for mode in ("eval", "train"):
        model = build(distilled_cfg(named, ["HintHead"], {"KD.TEACHER.BATCH_NORM": mode}))
        before = {key: x.clone() for key, x in model.teacher.model.state_dict().items()}
        model.train()
        step(model, inputs)
        found[mode] = model.teacher(inputs, ["p2"], {})["p2"]
        assert all(torch.equal(x, before[key]) for key, x in model.teacher.model.state_dict().items())
    alone = build(tiny_cfg(options=WIDE | norm), seed=1).train()
    with torch.no_grad():
        expected = alone.backbone(alone.preprocess_image(inputs).tensor)["p2"]
    torch.testing.assert_close(found["train"], expected)
    assert not torch.allclose(found["eval"], expected, rtol=0.1)


@pytest.mark.parametrize(
    ("mode", "told"),
    [("train", "is 'train', but the teacher has no batch norm"), ("on", "got 'on'; allowed are eval, t")],
)
def test_statistics_of_the_batch_without_batch_norms(tmp_path, mode, told):
    named = save_other(tmp_path, {"MODEL.RESNETS.NORM": "FrozenBN", "MODEL.FPN.NORM": ""})
    with pytest.raises(InputError, match=f"^KD.TEACHER.BATCH_NORM: {told}"):
        build(distilled_cfg(named, ["HintHead"], {"KD.TEACHER.BATCH_NORM": mode}))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_dtype_is_that_of_the_teachers_forward_alone(teacher, inputs, dtype):
    model = build(distilled_cfg(teacher, ["HintHead"], {"KD.TEACHER.DTYPE": dtype}))
    with model.tap.record(["p2"]) as student:
        losses = step(model, inputs)
    assert model.teacher(inputs, ["p2"], student)["p2"].dtype == getattr(torch, dtype)
    assert student["p2"].dtype == losses["loss_kd_hint"].dtype == torch.float32


def test_options_override_the_teachers_config(teacher):
    cfg = distilled_cfg(teacher, ["HintHead"], {"KD.TEACHER.OPTS": ["MODEL.PIXEL_STD", [2.0, 2.0, 2.0]]})
    assert build_teacher(cfg).model.pixel_std.flatten().tolist() == [2.0, 2.0, 2.0]
    assert cfg.MODEL.PIXEL_STD != [2.0, 2.0, 2.0]


def test_weights_are_those_of_its_config_if_none_are_named(teacher, tmp_path):
    config = tiny_cfg(options=WIDE | {"MODEL.WEIGHTS": teacher["KD.TEACHER.WEIGHTS"]})
    named = {"KD.TEACHER.CONFIG_FILE": write_yaml(tmp_path / "teacher.yaml", config), "KD.TEACHER.WEIGHTS": ""}
    saved = torch.load(teacher["KD.TEACHER.WEIGHTS"], weights_only=True)["model"]
    loaded = build_teacher(distilled_cfg(named, ["HintHead"])).model.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in saved.items())


def test_a_zoo_config_has_the_zoos_weights():
    named = {"KD.TEACHER.CONFIG_FILE": "COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml"}
    cfg, weights = load_teacher_config(distilled_cfg(named, ["HintHead"]))
    assert cfg.MODEL.RESNETS.DEPTH == 101
    assert weights.endswith("model_final_f6e8b1.pkl")


def test_a_distilled_model_can_be_the_teacher(teacher, tmp_path, inputs):
    """Its config says TeacherStudent; its checkpoint's "model" is the plain student."""
    cfg = distilled_cfg(teacher, ["HintHead"])
    torch.save({"model": build(cfg).student.state_dict()}, tmp_path / "model_final.pth")
    named = {
        "KD.TEACHER.CONFIG_FILE": write_yaml(tmp_path / "config.yaml", cfg),
        "KD.TEACHER.WEIGHTS": str(tmp_path / "model_final.pth"),
    }
    assert "loss_kd_hint" in step(build(distilled_cfg(named, ["HintHead"])), inputs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"KD.TEACHER.CONFIG_FILE": ""}, "KD.TEACHER.CONFIG_FILE: no teacher is named"),
        ({"KD.TEACHER.CONFIG_FILE": "no/such.yaml"}, "KD.TEACHER.CONFIG_FILE: there is no such file, and no/such.yaml"),
        ({"KD.TEACHER.WEIGHTS": "/no/such.pth"}, "KD.TEACHER.WEIGHTS: there is no file /no/such.pth."),
        ({"KD.TEACHER.WEIGHTS": ""}, "KD.TEACHER.WEIGHTS: no file is named, and MODEL.WEIGHTS of "),
        ({"KD.TEACHER.DTYPE": "int8"}, "KD.TEACHER.DTYPE: got 'int8'; allowed are float32, float16, bfloat16."),
        ({"KD.TEACHER.OPTS": ["MODEL.DEPHT", 50]}, "KD.TEACHER.OPTS: Non-existent key: MODEL.DEPHT"),
        ({"INPUT.FORMAT": "L"}, "INPUT.FORMAT: the student reads L, the teacher BGR; only RGB and BGR convert."),
    ],
)
def test_a_teacher_that_cannot_be(teacher, options, message):
    with pytest.raises(InputError, match=f"^{re.escape(message)}") as error:
        build(distilled_cfg(teacher | options, ["HintHead"]))
    assert "\n" not in str(error.value)


def test_a_student_of_a_run_with_a_plugin_can_be_the_teacher(teacher, tmp_path):
    """Its ``config.yaml`` has the keys of a head that is not registered here."""
    (tmp_path / "a.yaml").write_text(
        f"_BASE_: {teacher['KD.TEACHER.CONFIG_FILE']}\nKD: {{CHANNEL_MEAN: {{WEIGHT: 2.0}}}}"
    )
    options = {"KD.TEACHER.CONFIG_FILE": str(tmp_path / "a.yaml")}
    assert build_teacher(distilled_cfg(teacher | options, ["HintHead"])).model is not None
    with pytest.raises(InputError, match=r"Non-existent key: KD\.CHANNEL"):
        build_teacher(distilled_cfg(teacher | options | {"KD.TEACHER.OPTS": ["KD.CHANNEL", 1]}, ["HintHead"]))
