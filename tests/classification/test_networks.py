"""The networks: sizes as published, stages as named, and values before the ReLU."""

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from detectron2.modeling import build_model

from kd_det import InputError
from kd_det.classification.cifar import PaddingShortcut
from kd_det.formats import fit_names
from kd_det.taps import build_tap

from .models import classifier_cfg

LAYERS = {"MODEL.BACKBONE.NAME": "build_fully_connected_backbone"}
WITH_LAYERS = LAYERS | {"INPUT.CLASSIFICATION.SIZE": 224}
PERCEPTRON = LAYERS | {"MODEL.FULLY_CONNECTED.NAME": "perceptron", "INPUT.CLASSIFICATION.SIZE": 28}


def build(options, family="cifar_resnet"):
    return build_model(classifier_cfg(family, options=options))


def build_on_meta(options):
    """A model without memory, of which only shapes are known."""
    with torch.device("meta"):
        return build({"MODEL.DEVICE": "meta"} | options)


def count(model):
    return sum(p.numel() for p in model.parameters())


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
    model = build_on_meta({"MODEL.CIFAR.NAME": name, "MODEL.CLASSIFIER.NUM_CLASSES": 100})
    assert count(model) / 1e6 == pytest.approx(millions, abs=0.0051)


@pytest.mark.parametrize(
    ("name", "millions"),
    [("densenet_112_33", 6.3), ("densenet_90_60", 16.1), ("densenet_80_80", 22.4), ("densenet_80_120", 50.4)],
)
def test_parameter_counts_of_born_again_networks(name, millions):
    """With 10 classes, as Furlanello et al. (2018) list them, to half a percent."""
    model = build_on_meta({"MODEL.CIFAR.NAME": name, "MODEL.CLASSIFIER.NUM_CLASSES": 10})
    assert count(model) / 1e6 == pytest.approx(millions, rel=0.005)


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("nin_thin", 0.2),
        ("nin_wide", 1.0),
        ("wrn_16_1", 0.2),
        ("wrn_16_2", 0.7),
        ("wrn_40_1", 0.6),
        ("wrn_40_2", 2.2),
        ("wrn_16_4", 2.7),
    ],
)
def test_parameter_counts_of_attention_transfer(name, millions):
    """With 10 classes, as Zagoruyko & Komodakis (2016, 2017) list them."""
    model = build_on_meta({"MODEL.CIFAR.NAME": name, "MODEL.CLASSIFIER.NUM_CLASSES": 10})
    assert count(model) / 1e6 == pytest.approx(millions, abs=0.0501)


@pytest.mark.parametrize(("depth", "width"), [(10, 1), (10, 4), (22, 4)])
def test_parameters_of_wide_resnets_by_hand(depth, width):
    """3x3 convolutions, a 1x1 shortcut where the channels change, two numbers per channel and batch norm."""
    expected, before = 27 * 16, 16
    for channels in (16 * width, 32 * width, 64 * width):
        for _ in range((depth - 4) // 6):
            shortcut = before * channels if before != channels else 0
            expected += 9 * channels * (before + channels) + shortcut + 2 * (before + channels)
            before = channels
    expected += 2 * before + 10 * before + 10
    model = build_on_meta({"MODEL.CIFAR.NAME": f"wrn_{depth}_{width}", "MODEL.CLASSIFIER.NUM_CLASSES": 10})
    assert count(model) == expected


@pytest.mark.parametrize("name", ["vgg11", "vgg16", "vgg19", "alexnet"])
def test_parameter_counts_are_those_that_torchvision_publishes(name):
    model = build_on_meta(WITH_LAYERS | {"MODEL.FULLY_CONNECTED.NAME": name, "MODEL.CLASSIFIER.NUM_CLASSES": 1000})
    (weights, *_) = torchvision.models.get_model_weights(name)
    assert count(model) == weights.meta["num_params"]
    assert all(model.backbone.output_shape()[layer].channels == 4096 for layer in ("fc6", "fc7", "pooled"))


@pytest.mark.parametrize(("units", "expected"), [(1200, 2395210), (800, 1276810)])
def test_parameter_counts_of_hintons_perceptrons(units, expected):
    """784 pixels and 10 classes."""
    options = PERCEPTRON | {"MODEL.FULLY_CONNECTED.UNITS": [units] * 2, "MODEL.CLASSIFIER.NUM_CLASSES": 10}
    assert count(build_on_meta(options)) == expected == 785 * units + (units + 1) * units + (units + 1) * 10


@pytest.mark.parametrize(
    ("name", "thousands"), [("resnet20", 269.7), ("resnet32", 464.2), ("resnet56", 853.0), ("resnet110", 1727.9)]
)
def test_parameter_counts_without_projections(name, thousands):
    """With 10 classes and shortcuts without parameters, as He et al. (2016) have them."""
    model = build({"MODEL.CIFAR.NAME": name, "MODEL.CIFAR.SHORTCUT": "padding", "MODEL.CLASSIFIER.NUM_CLASSES": 10})
    assert sum(p.numel() for p in model.parameters()) / 1e3 == pytest.approx(thousands, abs=0.1)


@pytest.mark.parametrize(
    "name", ["resnet8", "wrn_16_1", "nin_thin", "densenet_112_33", "densenet_90_60", "vgg11", "vgg19", "alexnet"]
)
def test_stages_have_the_shapes_they_tell(name):
    """AlexNet pads less than its strides need, so that its maps are a cell smaller."""
    layers = name in torchvision.models.list_models()
    options = WITH_LAYERS | {"MODEL.FULLY_CONNECTED.NAME": name} if layers else {"MODEL.CIFAR.NAME": name}
    backbone = build_on_meta(options).backbone
    shapes = backbone.output_shape()
    outputs = backbone(torch.zeros(2, 3, 224, 224, device="meta") if layers else torch.zeros(2, 3, 32, 32).to("meta"))
    assert outputs.keys() == shapes.keys()
    if name == "alexnet":
        assert [outputs[key].shape[2] for key in ("res2", "res3", "res4")] == [55, 27, 13]
        return
    for key, x in outputs.items():
        assert x.shape[1] == shapes[key].channels
        if shapes[key].stride:
            assert x.shape[2:] == ((224 if layers else 32) // shapes[key].stride,) * 2


@pytest.mark.parametrize("name", ["nin_thin", "densenet_112_33", "densenet_90_60"])
def test_preactivations_of_other_networks_enter_the_relu(name):
    """The pooled feature is the mean of the last ReLU, unless the channels are halved behind that."""
    model = build({"MODEL.CIFAR.NAME": name}).eval()
    names = [f"{stage}_preact" for stage in ("res2", "res3", "res4")]
    with build_tap(model).record([*names, "res4", "pooled"]) as signals:
        model([{"image": torch.randint(256, (3, 16, 16)).float()}] * 2)
    assert all((signals[key] < 0).any() for key in names)
    if name == "nin_thin":
        assert torch.equal(F.relu(signals["res4_preact"]), signals["res4"])
    if name != "densenet_90_60":
        torch.testing.assert_close(F.relu(signals["res4_preact"]).mean(dim=(2, 3)), signals["pooled"])


def test_alexnet_gives_what_torchvision_gives():
    """With weights of torchvision's names; its hidden layers are signals, before and after the ReLU."""
    reference = torchvision.models.alexnet(num_classes=3).eval()
    model = build(LAYERS | {"MODEL.FULLY_CONNECTED.NAME": "alexnet", "INPUT.CLASSIFICATION.SIZE": 64}).eval()
    state = fit_names({"model": reference.state_dict()}, model.state_dict(), "alexnet.pth")["model"]
    model.load_state_dict(state)
    image = torch.randint(256, (3, 64, 64)).float()
    names = ["res2", "res3_preact", "fc6", "fc6_preact", "fc7", "pooled"]
    with build_tap(model).record(names) as signals:
        scores = model([{"image": image}])[0]["scores"]
    images = ((image - model.pixel_mean) / model.pixel_std)[None]
    torch.testing.assert_close(scores, reference(images).softmax(dim=1)[0])
    pooled = reference.avgpool(reference.features(images)).flatten(1)
    torch.testing.assert_close(signals["fc6_preact"], reference.classifier[1](pooled))
    assert torch.equal(signals["fc6"], F.relu(signals["fc6_preact"]))
    assert torch.equal(signals["fc7"], signals["pooled"])
    assert (signals["res3_preact"] < 0).any()
    torch.testing.assert_close(signals["res2"], reference.features[:2](images))


@pytest.mark.parametrize("name", ["vgg11", "alexnet"])
def test_every_weight_of_torchvision_has_a_place(name):
    with torch.device("meta"):
        state = torchvision.models.get_model(name, num_classes=3).state_dict()
    model = build_on_meta(WITH_LAYERS | {"MODEL.FULLY_CONNECTED.NAME": name}).state_dict()
    fitted = fit_names({"model": state}, model, "weights.pth")["model"]
    assert {key: x.shape for key, x in fitted.items()} == {key: x.shape for key, x in model.items()}


def test_perceptron_by_hand():
    """One pixel of 2 and 4 and 6, whose mean is 4; dropout leaves the signals of the hidden layers as they are."""
    options = {"MODEL.FULLY_CONNECTED.UNITS": [1, 1], "MODEL.FULLY_CONNECTED.DROPOUT": 0.99}
    model = build(PERCEPTRON | options | {"INPUT.CLASSIFICATION.SIZE": 1, "MODEL.PIXEL_MEAN": [0.0] * 3}).train()
    for p in model.backbone.parameters():
        torch.nn.init.constant_(p, 0.5)
    torch.manual_seed(0)
    outputs = model.backbone(torch.tensor([2.0, 4.0, 6.0]).view(1, 3, 1, 1))
    assert outputs["fc1"].item() == 2.5
    assert outputs["fc2"].item() == 0.5  # The only unit below it is dropped.
    assert outputs["pooled"].item() == 0
    with build_tap(model.eval()).record(["fc1_preact", "fc2", "pooled"]) as signals:
        model([{"image": torch.full((3, 1, 1), 4.0)}])
    assert torch.equal(signals["fc2"], signals["pooled"])


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
        ("MODEL.CIFAR.NAME", "densenet_112_34", "got 'densenet_112_34'; allowed are .*, nin_wide, densenet_112_33"),
        ("MODEL.CIFAR.SHORTCUT", "pad", "got 'pad'; allowed are projection, padding"),
        ("MODEL.CLASSIFIER.NUM_CLASSES", 1, "must be at least 2, got 1"),
    ],
)
def test_options_that_cannot_be(key, value, message):
    with pytest.raises(InputError, match=f"^{key}: {message}"):
        build({key: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"MODEL.FULLY_CONNECTED.NAME": "vgg12"}, "MODEL.FULLY_CONNECTED.NAME: 'vgg12' is not one of vgg11, vgg16, "),
        ({"INPUT.CLASSIFICATION.SIZE": 31}, "INPUT.CLASSIFICATION.SIZE: vgg16 needs 32 pixels or more, got 31"),
        (
            {"MODEL.FULLY_CONNECTED.NAME": "alexnet", "INPUT.CLASSIFICATION.SIZE": 62},
            "INPUT.CLASSIFICATION.SIZE: alexnet needs 63 pixels or more, got 62",
        ),
        ({"MODEL.PIXEL_MEAN": [0.0]}, "MODEL.FULLY_CONNECTED.NAME: vgg16 takes images of three channels, not of 1"),
        (
            {"MODEL.FULLY_CONNECTED.NAME": "perceptron", "MODEL.FULLY_CONNECTED.UNITS": []},
            r"MODEL.FULLY_CONNECTED.UNITS: must name the units of a layer or more, got \[\]",
        ),
    ],
)
def test_options_of_fully_connected_networks_that_cannot_be(options, message):
    with pytest.raises(InputError, match=f"^{message}"):
        build(LAYERS | options)


def test_norms_that_torchvisions_densenet_does_not_have():
    with pytest.raises(InputError, match=r"^MODEL.RESNETS.NORM: got 'GN'; of densenet_90_60 only BN is allowed"):
        build({"MODEL.CIFAR.NAME": "densenet_90_60", "MODEL.RESNETS.NORM": "GN"})


def test_timm_name_that_cannot_be():
    with pytest.raises(InputError, match=r"^MODEL.TIMM.NAME: 'resnet_of_mine': Unknown model"):
        build({"MODEL.TIMM.NAME": "resnet_of_mine"}, "timm")
