"""The networks: sizes as published, stages as named, and values before the ReLU."""

import pytest
import timm
import torch
import torch.nn.functional as F
from detectron2.modeling import build_model

from kd_det import InputError
from kd_det.classification.cifar import PaddingShortcut
from kd_det.taps import build_tap

from .models import classifier_cfg


def build(options, family="cifar_resnet"):
    return build_model(classifier_cfg(family, options=options))


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("resnet20", 0.28),
        ("resnet32", 0.47),
        ("resnet56", 0.86),
        ("resnet110", 1.74),
        ("resnet8x4", 1.23),
        ("resnet32x4", 7.43),
        ("wrn_16_1", 0.18),
        ("wrn_16_2", 0.70),
        ("wrn_40_1", 0.57),
        ("wrn_40_2", 2.26),
    ],
)
def test_parameter_counts_are_the_published_ones(name, millions):
    """With 100 classes, as Tian et al. (2020) list them."""
    model = build({"MODEL.CIFAR.NAME": name, "MODEL.CLASSIFIER.NUM_CLASSES": 100})
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.0051)


@pytest.mark.parametrize(
    ("name", "thousands"), [("resnet20", 269.7), ("resnet32", 464.2), ("resnet56", 853.0), ("resnet110", 1727.9)]
)
def test_parameter_counts_without_projections(name, thousands):
    """With 10 classes and shortcuts without parameters, as He et al. (2016) have them."""
    model = build({"MODEL.CIFAR.NAME": name, "MODEL.CIFAR.SHORTCUT": "padding", "MODEL.CLASSIFIER.NUM_CLASSES": 10})
    assert sum(p.numel() for p in model.parameters()) / 1e3 == pytest.approx(thousands, abs=0.1)


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_1"])
def test_stages_have_the_shapes_they_tell(name):
    backbone = build({"MODEL.CIFAR.NAME": name}).backbone
    shapes = backbone.output_shape()
    for key, x in backbone(torch.zeros(2, 3, 32, 32)).items():
        assert x.shape[1] == shapes[key].channels
        if shapes[key].stride:
            assert x.shape[2:] == (32 // shapes[key].stride,) * 2


@pytest.mark.parametrize("family", ["cifar_resnet", "wide_resnet", "detectron2"])
def test_preactivation_is_what_enters_the_relu(family):
    model = build({}, family).eval()
    names = [name for name in build_tap(model).spec() if name.endswith("_preact")]
    assert len(names) == (4 if family == "detectron2" else 3)
    stages = [name.removesuffix("_preact") for name in names]
    with build_tap(model).record([*names, *stages, "pooled"]) as signals:
        model([{"image": torch.randint(256, (3, 64, 64)).float()}] * 2)
    assert all((signals[name] < 0).any() for name in names)
    for stage in stages if family != "wide_resnet" else []:
        assert torch.equal(F.relu(signals[f"{stage}_preact"]), signals[stage])
    last = F.relu(signals[names[-1]]).mean(dim=(2, 3))
    torch.testing.assert_close(last, signals["pooled"])


def test_preactivation_carries_gradient():
    model = build({}).train()
    with build_tap(model).record(["res2_preact"]) as signals:
        model([{"image": torch.rand(3, 32, 32), "label": 0}] * 2)
    signals["res2_preact"].square().sum().backward()
    assert model.backbone.res2[0].conv2.weight.grad.any()
    assert model.backbone.res3[0].conv1.weight.grad is None


def test_padding_shortcut_by_hand():
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    out = PaddingShortcut(1, 3, stride=2)(x)
    assert out.tolist() == [[[[0, 0], [0, 0]], [[0, 2], [8, 10]], [[0, 0], [0, 0]]]]


def test_timm_network_gives_what_timm_gives():
    cfg = classifier_cfg("timm")
    model = build_model(cfg).eval()
    reference = timm.create_model(cfg.MODEL.TIMM.NAME, num_classes=3).eval()
    state = {key.removeprefix("backbone.net."): value for key, value in model.state_dict().items()}
    state = {key.replace("linear.", "classifier."): value for key, value in state.items()}
    reference.load_state_dict(state)
    image = torch.randint(256, (3, 64, 64)).float()
    normalised = (image - model.pixel_mean) / model.pixel_std
    expected = reference(normalised[None]).softmax(dim=1)[0]
    torch.testing.assert_close(model([{"image": image}])[0]["scores"], expected)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("MODEL.CIFAR.NAME", "resnet21", "got 'resnet21'; allowed are resnet8, .*wrn_40_2"),
        ("MODEL.CIFAR.SHORTCUT", "pad", "got 'pad'; allowed are projection, padding"),
        ("MODEL.CLASSIFIER.NUM_CLASSES", 1, "must be at least 2, got 1"),
    ],
)
def test_options_that_cannot_be(key, value, message):
    with pytest.raises(InputError, match=f"^{key}: {message}"):
        build({key: value})


def test_timm_name_that_cannot_be():
    with pytest.raises(InputError, match=r"^MODEL.TIMM.NAME: 'resnet_of_mine': Unknown model"):
        build({"MODEL.TIMM.NAME": "resnet_of_mine"}, "timm")
