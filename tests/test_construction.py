"""Tests that a value which a constructor rejects is a user's mistake, and that defects keep their traceback."""

import re

import pytest
import torch
from detectron2.modeling import BACKBONE_REGISTRY
from helpers import tiny_cfg

from kd_det import InputError
from kd_det.construction import build_network, naming_config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"MODEL.ROI_HEADS.IN_FEATURES": ["p2", "p9"]},
            "KeyError: p9; see MODEL.ROI_HEADS.IN_FEATURES (the backbone gives p2, p3, p4, p5, p6).",
        ),
        (
            {"MODEL.FPN.IN_FEATURES": ["res2", "res9"]},
            "MODEL.FPN.IN_FEATURES: got ['res2', 'res9']; allowed here are stem",
        ),
        ({"MODEL.RESNETS.NORM": "GN"}, " must be divisible by num_groups (32); see MODEL.RESNETS.NORM."),
        ({"MODEL.ROI_BOX_HEAD.NAME": ""}, "cannot be built: KeyError: No object named '' found in 'ROI_BOX_HEAD'"),
        ({"MODEL.RPN.IOU_THRESHOLDS": [0.7, 0.3]}, "cannot be built: AssertionError: assert all("),
        ({"MODEL.DEVICE": "meta:9x"}, "cannot be built: RuntimeError: "),
    ],
)
def test_values_that_a_constructor_rejects_end_in_one_line(options, message):
    with pytest.raises(InputError, match=re.escape(message)) as error:
        build_network(tiny_cfg(options=options), "a.yaml")
    assert str(error.value).startswith(("a.yaml: GeneralizedRCNN cannot be built: ", "MODEL."))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("module", ["kd_det.backbones", "kd_det_plugin_mine"])
def test_defects_keep_their_traceback(module, monkeypatch):
    code = compile("def build(cfg, input_shape):\n    raise KeyError('a defect')", "x.py", "exec")
    names = {"__name__": module}
    exec(code, names)
    monkeypatch.setitem(BACKBONE_REGISTRY._obj_map, "defective", names["build"])
    with pytest.raises(KeyError, match="a defect"):
        build_network(tiny_cfg(options={"MODEL.BACKBONE.NAME": "defective"}), "a.yaml")


def test_other_errors_pass_unchanged():
    for error in (OSError("full"), KeyboardInterrupt(), InputError("KD: x")):
        with pytest.raises(type(error)), naming_config(tiny_cfg(), "a.yaml"):
            raise error
    with pytest.raises(InputError, match="cannot be built: RuntimeError: "), naming_config(tiny_cfg(), "a.yaml"):
        torch.nn.Conv2d(3, -1, 1)
