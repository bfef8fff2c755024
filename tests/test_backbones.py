"""Tests backbones from timm, and ResNets of basic blocks."""

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone
from torch import nn

from kd_det import InputError, add_kd_config
from kd_det.backbones import TimmBackbone


def make_cfg(name, *options):
    cfg = get_cfg()
    add_kd_config(cfg)
    cfg.merge_from_list(["MODEL.BACKBONE.NAME", name, "MODEL.TIMM.PRETRAINED", False, *options])
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES
    return cfg


def make_timm(**changes):
    arguments = {"name": "mobilenetv2_050", "pretrained": False, "norm": "FrozenBN", "in_channels": 3}
    return TimmBackbone(**{**arguments, "out_features": ["res2", "res5"], **changes})


def assert_shapes(backbone, size=(64, 128)):
    """Each feature map has the channels and the stride that output_shape() tells."""
    with torch.no_grad():
        features = backbone(torch.rand(1, 3, *size))
    shapes = backbone.output_shape()
    assert list(features) == list(shapes)
    for name, shape in shapes.items():
        assert features[name].shape == (1, shape.channels, size[0] // shape.stride, size[1] // shape.stride)


@pytest.mark.parametrize("name", ["mobilenetv2_050", "mobilenetv3_small_050", "efficientnet_lite0", "resnet10t"])
def test_timm_stages_are_named_by_their_strides(name):
    backbone = make_timm(name=name, out_features=["res2", "res3", "res4", "res5"])
    assert {key: shape.stride for key, shape in backbone.output_shape().items()} == {
        "res2": 4,
        "res3": 8,
        "res4": 16,
        "res5": 32,
    }
    assert_shapes(backbone)


def test_timm_below_an_fpn():
    cfg = make_cfg("build_timm_fpn_backbone", "MODEL.TIMM.NAME", "mobilenetv2_050", "MODEL.FPN.OUT_CHANNELS", 16)
    backbone = build_backbone(cfg)
    assert backbone.output_shape()["p6"] == ShapeSpec(channels=16, stride=64)
    assert backbone.size_divisibility == 32
    assert_shapes(backbone)


def test_timm_returns_only_the_requested_features():
    assert list(make_timm(out_features=["res3", "res5"]).output_shape()) == ["res3", "res5"]


@pytest.fixture(scope="module")
def trained():
    """A MobileNet whose batch normalisations have seen images: without its activations its output would explode."""
    torch.manual_seed(0)
    backbone = make_timm(norm="BN")
    with torch.no_grad():
        for _ in range(60):
            backbone(torch.rand(4, 3, 64, 64))
    return backbone.eval()


@pytest.mark.parametrize("norm", ["FrozenBN", "SyncBN"])
def test_another_norm_computes_the_same(trained, norm):
    """timm's normalisation layers hold the activations, too: ReLU6 must survive the conversion."""
    other = make_timm(norm=norm).eval()
    unmatched = other.load_state_dict(trained.state_dict(), strict=False)
    assert not unmatched.missing_keys
    assert all(key.endswith("num_batches_tracked") for key in unmatched.unexpected_keys)
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(other(images)["res5"], trained(images)["res5"], rtol=1e-3, atol=1e-3)


def test_frozen_batch_norm_ignores_the_batch(trained):
    frozen = make_timm(norm="FrozenBN").train()
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in frozen.modules())
    frozen.load_state_dict(trained.state_dict(), strict=False)
    state = {key: value.clone() for key, value in frozen.state_dict().items()}
    images = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(frozen(images)["res5"][:1], frozen(images[:1])["res5"], rtol=1e-3, atol=1e-3)
    assert all(torch.equal(value, state[key]) for key, value in frozen.state_dict().items())


def test_batch_norm_uses_the_batch():
    backbone = make_timm(norm="BN").train()
    images = torch.rand(2, 3, 64, 64)
    assert not torch.allclose(backbone(images)["res5"][:1], backbone(images[:1])["res5"], atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "mobilnet"}, r"MODEL\.TIMM\.NAME: 'mobilnet'"),
        ({"norm": "GN"}, r"MODEL\.TIMM\.NORM: got 'GN'; allowed are BN, FrozenBN, SyncBN"),
        (
            {"out_features": ["res2", "res9"]},
            r"MODEL\.FPN\.IN_FEATURES: mobilenetv2_050 has no res9; it has res1",
        ),
    ],
)
def test_wrong_timm_key_is_named(changes, message):
    with pytest.raises(InputError, match=message):
        make_timm(**changes)


@pytest.mark.parametrize("depth", [18, 34])
def test_basic_resnet_of_width_64_is_detectron2s(depth):
    options = ["MODEL.RESNETS.DEPTH", depth, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64, "MODEL.FPN.OUT_CHANNELS", 16]
    ours, theirs = (
        build_backbone(make_cfg(name, *options))
        for name in ("build_basic_resnet_fpn_backbone", "build_resnet_fpn_backbone")
    )
    state = theirs.state_dict()
    assert {key: value.shape for key, value in ours.state_dict().items()} == {k: v.shape for k, v in state.items()}
    assert {key for key, p in ours.named_parameters() if p.requires_grad} == {
        key for key, p in theirs.named_parameters() if p.requires_grad
    }
    ours.load_state_dict(state)
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(ours(images).values(), theirs(images).values(), strict=True))


@pytest.mark.parametrize(("depth", "blocks"), [(10, 4), (18, 8), (34, 16)])
def test_narrow_basic_resnet(depth, blocks):
    options = ["MODEL.RESNETS.STEM_OUT_CHANNELS", 4, "MODEL.RESNETS.RES2_OUT_CHANNELS", 8, "MODEL.FPN.OUT_CHANNELS", 16]
    backbone = build_backbone(
        make_cfg("build_basic_resnet_fpn_backbone", "MODEL.RESNETS.DEPTH", depth, "MODEL.RESNETS.NORM", "BN", *options)
    )
    bottom_up = backbone.bottom_up.output_shape()
    assert [shape.channels for shape in bottom_up.values()] == [8, 16, 32, 64]
    assert sum(key.endswith(".conv2.weight") for key in backbone.state_dict()) == blocks
    assert_shapes(backbone.bottom_up)
    assert_shapes(backbone)


def test_basic_resnet_of_another_depth_is_refused():
    with pytest.raises(InputError, match=r"MODEL\.RESNETS\.DEPTH: got 50; allowed here are 10, 18, 34"):
        build_backbone(make_cfg("build_basic_resnet_fpn_backbone", "MODEL.RESNETS.DEPTH", 50))


def test_timm_networks_may_have_a_fixed_size_and_channels_last():
    """A Swin is made for 224 x 224 pixels, and its maps have their channels last."""
    assert_shapes(make_timm(name="swin_tiny_patch4_window7_224", norm="BN"))


def test_timm_networks_that_take_no_other_size_are_refused():
    with pytest.raises(InputError, match=r"^MODEL.TIMM.NAME: 'levit_128s' does not take images of 64 x 96 pixels: "):
        make_timm(name="levit_128s", out_features=["res4"])
