"""The teacher's weights lie in the precision of its forward pass, and folded batch norms compute the same."""

import copy
import re

import pytest
import torch
from detectron2.layers import Conv2d
from helpers import WIDE, build, distilled_cfg, save_teacher, step, tiny_cfg
from torch import nn

from kd_det import InputError, Teacher
from kd_det.config import default_config
from kd_det.config_kinds import check_kinds
from kd_det.teacher import build_teacher, teacher_dtype, teacher_options
from kd_det.teacher_weights import fold_norms

NAMES = ["p2", "p5", "res4", "res4_preact", "rpn_logits", "roi_logits", "roi_features", "mask_logits"]


def layers(model):
    return [x for x in model.modules() if isinstance(x, nn.Conv2d | nn.ConvTranspose2d | nn.Linear)]


@pytest.fixture
def recorded(inputs):
    """The signals of a student, on whose boxes a teacher computes."""
    student = Teacher(build(tiny_cfg()))
    with student.tap.record(NAMES) as signals:
        step(student.model.train(), inputs)
    return signals


def give_statistics(model):
    """Statistics such as training leaves them: those of new batch norms would change nothing."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if hasattr(module, "running_var"):
            for tensor, low in ((module.running_var, 0.5), (module.weight, 0.5), (module.running_mean, -0.5)):
                tensor.data.copy_(low + torch.rand(tensor.shape, generator=generator))
            module.bias.data.copy_(0.2 * torch.rand(module.bias.shape, generator=generator))
    return model


# ---- Precision ----
@pytest.mark.parametrize("family", ["mask_rcnn", "retinanet"])
def test_stored_weights_give_what_autocast_gives(family, inputs, recorded):
    names = NAMES if family == "mask_rcnn" else ["p2", "p5", "dense_logits", "dense_deltas"]
    model = build(tiny_cfg(family, WIDE), seed=1)
    plain, stored = Teacher(copy.deepcopy(model)), Teacher(model, dtype=torch.bfloat16)
    found = stored(inputs, names, recorded)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = plain.tap.compute(inputs, set(names), recorded)
    assert found.keys() == expected.keys() >= set(names)
    assert all(torch.equal(found[name], expected[name]) for name in names)
    assert {x.weight.dtype for x in layers(model)} == {torch.bfloat16}
    assert {x.running_mean.dtype for x in model.modules() if hasattr(x, "running_mean")} == {torch.float32}


def test_weights_that_heads_read_keep_their_digits(inputs, recorded):
    model = build(tiny_cfg(), seed=1)
    before = model.roi_heads.box_predictor.cls_score.weight.clone()
    teacher = Teacher(model, dtype=torch.bfloat16)
    teacher.check({"roi_logits", "roi_logits_weight"})
    found = teacher(inputs, ["roi_logits", "roi_logits_weight"], recorded)
    assert torch.equal(found["roi_logits_weight"], before)
    assert found["roi_logits"].dtype == torch.bfloat16
    assert {x.weight.dtype for x in layers(model.backbone)} == {torch.bfloat16}


def test_until_the_first_step_weights_are_as_given(inputs):
    """``KD.INHERIT`` copies them, and stages compare their hash at any time."""
    model = give_statistics(build(tiny_cfg(), seed=1))
    teacher, plain = Teacher(model, dtype=torch.float16, fold_norm=True), Teacher(copy.deepcopy(model))
    assert {x.weight.dtype for x in layers(model)} == {torch.float32}
    teacher(inputs, ["p2"], {})
    assert {x.weight.dtype for x in layers(model)} == {torch.float16}
    assert teacher.fingerprint() == plain.fingerprint()


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({}, "float32"),
        ({"SOLVER.AMP.ENABLED": True}, "float16"),
        ({"SOLVER.AMP.ENABLED": True, "SOLVER.AMP.DTYPE": "bfloat16"}, "bfloat16"),
        ({"SOLVER.AMP.DTYPE": "bfloat16"}, "float32"),
        ({"SOLVER.AMP.ENABLED": True, "KD.TEACHER.DTYPE": "float32"}, "float32"),
        ({"KD.TEACHER.DTYPE": "bfloat16"}, "bfloat16"),
    ],
)
def test_precision_follows_that_of_the_run(options, dtype):
    assert teacher_dtype(tiny_cfg(options=options)) == getattr(torch, dtype)


def test_precision_of_the_run_that_is_unknown():
    cfg = tiny_cfg(options={"SOLVER.AMP.ENABLED": True, "SOLVER.AMP.DTYPE": "half"})
    with pytest.raises(InputError, match=r"^SOLVER.AMP.DTYPE: got 'half'; allowed are float16, bfloat16\.$"):
        teacher_dtype(cfg)


# ---- Batch norms ----
@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
def test_folded_batch_norms_compute_the_same(norm, inputs, recorded):
    options = WIDE | {"MODEL.RESNETS.NORM": norm, "MODEL.FPN.NORM": norm, "MODEL.ROI_MASK_HEAD.NORM": norm}
    model = give_statistics(build(tiny_cfg(options=options), seed=1))
    plain, folded = Teacher(copy.deepcopy(model)), Teacher(model, fold_norm=True)
    found, expected = (teacher(inputs, NAMES, recorded) for teacher in (folded, plain))
    for name in NAMES:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-4, msg=name)
    assert sum(isinstance(x, Conv2d) and x.norm is not None for x in plain.model.modules()) > 10
    assert not any(hasattr(x, "running_mean") for x in model.modules())


def test_other_norms_are_left_alone(inputs):
    options = WIDE | {"MODEL.RESNETS.NORM": "BN", "MODEL.FPN.NORM": "GN", "MODEL.FPN.OUT_CHANNELS": 32}
    model = give_statistics(build(tiny_cfg(options=options), seed=1)).eval()
    before = model.backbone.fpn_output2.norm
    assert fold_norms(model) > 10
    assert model.backbone.fpn_output2.norm is before
    assert fold_norms(model) == 0


@pytest.mark.parametrize(
    ("head", "options", "message"),
    [
        (
            "OverhaulHead",
            {"KD.OVERHAUL.MARGIN": "batch_norm", "KD.OVERHAUL.IN_FEATURES": ["res3"]},
            "KD.TEACHER.FOLD_NORM: must be False for heads that read res3_norm_bias, res3_norm_weight, which",
        ),
        ("HintHead", {"KD.TEACHER.BATCH_NORM": "train"}, "KD.TEACHER.FOLD_NORM: must be False where KD.TEACHER.BATCH"),
        ("HintHead", {"MODEL.RESNETS.NORM": "GN"}, "KD.TEACHER.FOLD_NORM: must be False for this teacher, none of"),
    ],
)
def test_batch_norms_that_cannot_be_folded(tmp_path, head, options, message):
    wide = {"MODEL.RESNETS.RES2_OUT_CHANNELS": 32, "MODEL.RESNETS.STEM_OUT_CHANNELS": 32}
    norm = {"MODEL.RESNETS.NORM": options.get("MODEL.RESNETS.NORM", "BN")}
    named = save_teacher(tmp_path, tiny_cfg(options=wide | norm), seed=1)
    cfg = distilled_cfg(named, [head], {"KD.TEACHER.FOLD_NORM": True} | options | {"MODEL.RESNETS.NORM": "BN"})
    with pytest.raises(InputError, match=f"^{re.escape(message)}"):
        build(cfg)


# ---- The stream ----
@pytest.mark.parametrize(
    ("device", "value", "used"),
    [
        ("cpu", None, False),
        ("cpu", "auto", False),
        ("cuda", None, True),
        ("cuda:0", "auto", True),
        ("cuda", False, False),
        ("cuda", True, True),
    ],
)
def test_side_stream_is_used_on_a_gpu(device, value, used):
    cfg = tiny_cfg(options={"MODEL.DEVICE": device, "KD.TEACHER.SIDE_STREAM": value})
    check_kinds(cfg, default_config(), "a")
    assert teacher_options(cfg)["side_stream"] is used


def test_side_stream_is_a_switch():
    with pytest.raises(InputError, match=r"^a: KD.TEACHER.SIDE_STREAM: must be True or False, got 'yes'\.$"):
        check_kinds(tiny_cfg(options={"KD.TEACHER.SIDE_STREAM": "yes"}), default_config(), "a")


class FakeStream:
    cuda_stream = 7


def test_memory_of_the_side_stream_is_told_once(teacher, monkeypatch, caplog):
    """No GPU is needed: the allocator's list of segments is made up."""
    segments = [{"stream": stream, "total_size": size * 2**20} for stream, size in ((0, 100), (7, 20), (7, 2))]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    model = build_teacher(distilled_cfg(teacher, ["HintHead"]))
    model.stream = FakeStream()
    with caplog.at_level("INFO"):
        model._log_stream_memory()
        model._log_stream_memory()
    assert len([x for x in caplog.messages if "its own CUDA stream, which holds 22 MB of GPU memory" in x]) == 1
