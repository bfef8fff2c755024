"""Tests relevance maps against arithmetic, against zennit, and by conservation."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from classification.models import classifier_cfg
from detectron2.layers import FrozenBatchNorm2d
from detectron2.structures import Boxes, pairwise_iou
from helpers import attached, build, tiny_cfg
from torch import nn
from torchvision.models.resnet import BasicBlock
from zennit import rules
from zennit.attribution import Gradient
from zennit.composites import SpecialFirstLayerMapComposite
from zennit.layer import Sum
from zennit.torchvision import ResNetCanonizer
from zennit.types import Activation, AvgPool, Convolution, Linear

from kd_det.analysis.relevance import Composite, Epsilon, Gamma, PixelBox, Zero, ZPlus, explain, relevance_map
from kd_det.errors import InputError
from kd_det.taps import build_tap

BOX = (10, 12, 50, 50)
RULES = {"zero": Zero(), "epsilon": Epsilon(0.1), "gamma": Gamma(0.25), "z_plus": ZPlus()}


def image_of(height: int = 32, width: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.randint(256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def with_statistics(model: nn.Module) -> nn.Module:
    """Gives norms and biases values that a training could have left, so that nothing passes by zeros."""
    generator = torch.Generator().manual_seed(1)
    for name, x in [*model.named_parameters(), *model.named_buffers()]:
        values = torch.randn(x.shape, generator=generator)
        if name.endswith(("bias", "running_mean")):
            x.data.copy_(0.1 * values)
        elif name.endswith("running_var"):
            x.data.copy_(0.5 + values.abs())
        elif name.endswith("weight") and x.dim() == 1:
            x.data.copy_(0.7 + 0.5 * values)
    return model


def without_biases(model: nn.Module) -> nn.Module:
    for name, x in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith(("bias", "running_mean")):
            x.data.zero_()
    return model


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    """Models with their statistics, in training mode."""
    found = {name: build(tiny_cfg(name)) for name in ("mask_rcnn", "c4", "retinanet")}
    found["resnet18"] = build(classifier_cfg("detectron2"))
    found["cifar"] = build(classifier_cfg())
    return {name: with_statistics(model) for name, model in found.items()}


def arguments(name: str) -> dict:
    """The image and the box for a model."""
    if name in ("resnet18", "cifar"):
        return {"image": image_of(), "label": 1}
    return {"image": image_of(64, 90), "label": 1, "box": BOX}


# ---- Values ----
@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("zero", [-2.0, 7.0, 1.5]),
        ("epsilon", [-1.8841232446415375, 6.763326866223209, 1.4224755173688102]),
        ("gamma", [-1.4629662840746054, 6.743633428981348, 1.2193328550932567]),
        ("z_plus", [0.0, 5.777777777777778, 0.7222222222222222]),
    ],
)
@pytest.mark.parametrize("as_convolution", [False, True])
def test_two_layers_by_hand(rule, expected, as_convolution):
    """x = (1, 2, 0.5), two hidden units (1.5, 4) and two logits (3.5, 6.5), of which the second is explained."""
    first = nn.Conv2d(3, 2, 1, bias=False) if as_convolution else nn.Linear(3, 2, bias=False)
    last = nn.Linear(2, 2, bias=False)
    first.weight.data = torch.tensor([[1.0, 0.5, -1.0], [-0.5, 2.0, 1.0]]).view_as(first.weight)
    last.weight.data = torch.tensor([[1.0, 0.5], [-1.0, 2.0]])
    parts = [first, nn.ReLU(inplace=True), nn.Flatten(), last] if as_convolution else [nn.Flatten(), first, nn.ReLU()]
    model = nn.Sequential(*parts, *[] if as_convolution else [last])
    image = torch.tensor([1.0, 2.0, 0.5]).view(3, 1, 1)
    relevance, logit = relevance_map(model, image, label=1, composite=Composite.uniform(RULES[rule]))
    assert logit == 6.5
    torch.testing.assert_close(relevance.flatten(), torch.tensor(expected), atol=1e-6, rtol=0)


class Residual(nn.Module):
    """A convolution, a residual block whose sum is in place, pooling and a linear layer."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.linear = nn.Linear(4, 3, bias=False)

    def forward(self, x):
        shortcut = torch.relu_(self.conv1(x))
        out = self.conv2(shortcut)
        out += shortcut
        return self.linear(nn.functional.relu_(out).mean(dim=(2, 3)))


def dense_matrix(layer: nn.Conv2d, height: int, width: int) -> np.ndarray:
    """The matrix (outputs, inputs) of a convolution on maps of this size."""
    count = layer.in_channels * height * width
    basis = torch.eye(count, dtype=torch.float64).view(count, layer.in_channels, height, width)
    with torch.no_grad():
        return layer(basis).flatten(1).T.numpy()


def propagate(rule: str, weights: np.ndarray, inputs: np.ndarray, relevance: np.ndarray) -> np.ndarray:
    """The relevance of a layer's inputs, contribution by contribution."""
    contributions = weights * inputs
    total = contributions.sum(axis=1, keepdims=True)
    positive, negative = contributions.clip(min=0), contributions.clip(max=0)
    divisor = total
    if rule == "epsilon":
        divisor = total + 0.1 * np.where(total < 0, -1, 1)
    elif rule == "gamma":
        contributions = contributions + 0.25 * np.where(total > 0, positive, negative)
        divisor = contributions.sum(axis=1, keepdims=True)
    elif rule == "z_plus":
        contributions = positive
        divisor = positive.sum(axis=1, keepdims=True)
    return (contributions / divisor * relevance[:, None]).sum(axis=0)


@pytest.mark.parametrize("rule", RULES)
def test_two_convolutions_and_a_residual_sum_by_hand(rule):
    torch.manual_seed(0)
    model = Residual().double()
    image = 255 * torch.rand(3, 4, 5, dtype=torch.float64) - 100
    x = image.flatten().numpy()
    first, second = dense_matrix(model.conv1, 4, 5), dense_matrix(model.conv2, 4, 5)
    shortcut = (first @ x).clip(min=0)
    branch = second @ shortcut
    out = (branch + shortcut).clip(min=0)
    last = np.kron(model.linear.weight.detach().numpy()[2], np.full(20, 1 / 20))
    logit = last @ out
    # The mean over the cells hands relevance on in proportion to their values, as LRP-0 does.
    pooled = out.reshape(4, 20).mean(axis=1)
    of_pooled = propagate(rule, model.linear.weight.detach().numpy()[2:], pooled, np.array([logit]))
    of_out = (out.reshape(4, 20) / 20 * np.divide(of_pooled, pooled, where=pooled != 0)[:, None]).ravel()
    share = np.divide(of_out, branch + shortcut, out=np.zeros(80), where=out > 0)
    of_shortcut = share * shortcut + propagate(rule, second, shortcut, share * branch)
    expected = propagate(rule, first, x, of_shortcut)
    relevance, found = relevance_map(model, image, label=2, composite=Composite.uniform(RULES[rule]))
    assert found == pytest.approx(logit, abs=1e-9)
    np.testing.assert_allclose(relevance.flatten().numpy(), expected, atol=1e-6, rtol=1e-6)
    if rule != "epsilon":
        assert expected.sum() == pytest.approx(logit)


@pytest.mark.parametrize("composite", ["layered", "gamma", "z_plus", "epsilon"])
def test_the_library_zennit_agrees(composite):
    """It has rules for modules, and its canonizer turns the residual sums of torchvision's ResNets into modules."""
    torch.manual_seed(0)
    norm = partial(nn.BatchNorm2d, eps=0)  # The norms that its canonizer leaves behind divide by exactly 1.
    shortcut = nn.Sequential(nn.Conv2d(8, 12, 1, stride=2, bias=False), norm(12))
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, stride=2, bias=False), norm(8), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2)),
        *(BasicBlock(8, 8, norm_layer=norm), BasicBlock(8, 12, stride=2, downsample=shortcut, norm_layer=norm)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5)),
    )
    model = with_statistics(model).double().eval()
    pixels = image_of().double()
    tiny = {"stabilizer": 1e-12}
    pairs = {
        "gamma": (rules.Gamma(0.25, **tiny), Gamma(0.25)),
        "z_plus": (rules.ZPlus(**tiny), ZPlus()),
        "epsilon": (rules.Epsilon(0.1), Epsilon(0.1)),
    }
    theirs, ours = pairs.get(composite, pairs["gamma"])
    is_layered = composite == "layered"
    box = rules.ZBox(torch.zeros(1, 3, 1, 1).double(), torch.full((1, 3, 1, 1), 255).double(), **tiny)
    dense = rules.Epsilon(0.1) if is_layered else theirs
    linear = rules.Norm(**tiny)
    layers = [(Activation, rules.Pass()), (AvgPool, linear), (Sum, linear), (Convolution, theirs), (Linear, dense)]
    first = [(Convolution, box)] if is_layered else []
    chosen = SpecialFirstLayerMapComposite(layer_map=layers, first_map=first, canonizers=[ResNetCanonizer()])
    start = torch.zeros(1, 5).double()
    with Gradient(model=model, composite=chosen) as attributor:
        output, expected = attributor(pixels[None], lambda out: start.index_fill(1, torch.tensor(3), 1) * out.detach())
    rule = Composite(PixelBox(), ours, Epsilon(0.1), Epsilon(0.1)) if is_layered else Composite.uniform(ours)
    relevance, logit = relevance_map(model, pixels, label=3, composite=rule)
    assert logit == pytest.approx(output[0, 3].item())
    torch.testing.assert_close(relevance, expected[0], atol=1e-6 * expected.abs().max().item(), rtol=1e-5)


@pytest.mark.parametrize("name", ["mask_rcnn", "c4", "retinanet", "resnet18"])
def test_lrp_0_is_input_times_gradient(models, name):
    model = copy.deepcopy(models[name]).eval()
    given = arguments(name)
    tap = build_tap(model)
    images = tap.preprocess([{"image": given["image"]}])
    x = getattr(images, "tensor", images).clone().requires_grad_()
    features = model.backbone(x)
    if "box" not in given:
        logit = model.classify(features)[0, 1]
    elif name == "retinanet":
        levels = [features[level] for level in model.head_in_features]
        best = pairwise_iou(Boxes.cat(model.anchor_generator(levels)), Boxes(torch.tensor([BOX]).float())).argmax()
        logits = [each.permute(0, 2, 3, 1).reshape(-1, 3) for each in model.head(levels)[0]]
        logit = torch.cat(logits)[best, 1]
    else:
        with tap.record({"roi_logits"}) as signals:
            tap.run(features, {"roi_logits"}, {"roi_boxes": torch.tensor([[0.0, *BOX]])})
        logit = signals["roi_logits"][0, 1]
    height, width = given["image"].shape[-2:]
    expected = (x * torch.autograd.grad(logit, x)[0])[0, :, :height, :width].detach()
    relevance, found = relevance_map(model, **given, composite="zero")
    assert found == pytest.approx(logit.item(), rel=1e-4, abs=1e-6)
    torch.testing.assert_close(relevance, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize(
    ("name", "composite"),
    [
        *(("mask_rcnn", "layered"), ("mask_rcnn", "zero"), ("mask_rcnn", "gamma"), ("c4", "gamma")),
        *(("retinanet", "layered"), ("retinanet", "zero"), ("resnet18", "layered")),
    ],
)
def test_relevance_is_conserved(models, name, composite):
    """Pixels and biases have the relevance of the logit; without biases, the pixels alone."""
    found = explain(models[name], **arguments(name), composite=composite)
    assert found.relevance.sum() + found.constants == pytest.approx(found.logit, rel=1e-3, abs=1e-5)
    assert found.constants != 0
    unbiased = without_biases(copy.deepcopy(models[name]))
    relevance, logit = relevance_map(unbiased, **arguments(name), composite=composite)
    assert relevance.shape == arguments(name)["image"].shape
    assert relevance.sum().item() == pytest.approx(logit, rel=0.01)


def test_frozen_and_unfrozen_norms_give_the_same_map(models):
    frozen = FrozenBatchNorm2d.convert_frozen_batchnorm(copy.deepcopy(models["cifar"]).eval())
    expected, _ = relevance_map(models["cifar"], **arguments("cifar"))
    relevance, _ = relevance_map(frozen, **arguments("cifar"))
    torch.testing.assert_close(relevance, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


def test_a_norm_counts_as_part_of_its_convolution():
    """Folded by hand, with scales of both signs, the map is the same under every rule."""
    torch.manual_seed(0)
    norm, convolution = nn.BatchNorm2d(6), nn.Conv2d(3, 6, 3, padding=1)
    model = with_statistics(nn.Sequential(convolution, norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    norm.weight.data[::2] *= -1
    folded = nn.Conv2d(3, 6, 3, padding=1)
    scale = norm.weight.data / (norm.running_var + norm.eps).sqrt()
    folded.weight.data = convolution.weight.data * scale.view(-1, 1, 1, 1)
    folded.bias.data = (convolution.bias.data - norm.running_mean) * scale + norm.bias.data
    image = image_of(8, 8)
    for rule in (*RULES.values(), PixelBox()):
        composite = Composite(rule, Gamma(), Zero(), rule if rule != PixelBox() else Zero())
        models = [nn.Sequential(*model, nn.Linear(6, 2)), nn.Sequential(folded, *model[2:], nn.Linear(6, 2))]
        models[1][-1].load_state_dict(models[0][-1].state_dict())
        maps = [relevance_map(each.eval(), image, label=1, composite=composite)[0] for each in models]
        torch.testing.assert_close(*maps, rtol=1e-3, atol=1e-4 * maps[0].abs().max().item())


class InPlace(nn.Module):
    """Changes its tensor by methods whose results it ignores."""

    def forward(self, x):
        x = x.clone()
        x.mul_(3.0)
        x.div_(2.0)
        return x


def test_what_happens_in_place_counts():
    """The clip of a ReLU6 passes relevance on, where a gradient would be 0."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, bias=False), nn.ReLU6(inplace=True), InPlace(), nn.Flatten(), nn.Linear(144, 2, False)]
    for composite in ("zero", "layered"):
        relevance, logit = relevance_map(nn.Sequential(*layers), image_of(8, 8), label=1, composite=composite)
        assert relevance.sum().item() == pytest.approx(logit, rel=1e-3)


# ---- Parts of a feature ----
@pytest.mark.parametrize(("name", "feature"), [("cifar", "res3"), ("mask_rcnn", "p2")])
def test_the_halves_of_a_feature_add_up(models, name, feature):
    channels = build_tap(models[name]).spec()[feature].channels
    whole, first, second = (
        explain(models[name], **arguments(name), feature=feature, channels=chosen)
        for chosen in (None, range(channels // 2), range(channels // 2, channels))
    )
    scale = whole.relevance.abs().max().item()
    torch.testing.assert_close(first.relevance + second.relevance, whole.relevance, rtol=1e-3, atol=1e-4 * scale)
    assert first.start + second.start == pytest.approx(whole.start, rel=1e-3, abs=1e-6)
    assert first.relevance.sum() + first.constants == pytest.approx(first.start, rel=1e-3, abs=1e-5)
    assert not torch.allclose(first.relevance, second.relevance, atol=0.01 * scale)
    if name == "cifar":  # Everything passes through a stage of a network without an FPN.
        everything, _ = relevance_map(models[name], **arguments(name))
        torch.testing.assert_close(whole.relevance, everything, rtol=1e-3, atol=1e-4 * scale)


# ---- The model, and mistakes ----
@pytest.mark.parametrize("name", ["mask_rcnn", "retinanet", "cifar"])
def test_the_model_is_as_before(models, name):
    model = models[name].train()
    model.backbone.eval()
    modes = [module.training for module in model.modules()]
    before = {key: x.clone() for key, x in model.state_dict().items()}
    feature = "res3" if name == "cifar" else "p3"
    with torch.no_grad():
        explain(model, **arguments(name), feature=feature)
    with pytest.raises(InputError):
        explain(model, **arguments(name) | {"label": 3})
    assert [module.training for module in model.modules()] == modes
    assert not attached(model)
    assert not nn.modules.module._global_forward_hooks
    assert not nn.modules.module._global_forward_pre_hooks
    assert all(torch.equal(x, before[key]) for key, x in model.state_dict().items())
    assert all(x.grad is None and x.requires_grad for x in model.parameters())


class Gate(nn.Module):
    def forward(self, x):
        return x * x.sigmoid()


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.GELU(), "no rule of LRP covers gelu in 1 (GELU)"),
        (nn.GroupNorm(2, 4), "covers group_norm in 1 (GroupNorm)"),
        (Gate(), "covers sigmoid in 1 (Gate)"),
        (nn.BatchNorm2d(4, track_running_stats=False), "covers batch_norm with the statistics of the batch in 1"),
    ],
)
def test_a_layer_that_no_rule_covers_is_named(layer, message):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), layer, nn.Flatten(), nn.Linear(4 * 36, 2))
    with pytest.raises(InputError) as error:
        relevance_map(model, image_of(8, 8), label=0)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("cifar", {"label": 3}, "label: must be a class from 0 to 2, got 3."),
        ("mask_rcnn", {"label": -1}, "label: must be a class from 0 to 2, got -1."),
        ("mask_rcnn", {"label": 3}, "label: must be a class from 0 to 2, got 3."),
        ("retinanet", {"label": 3}, "label: must be a class from 0 to 2, got 3."),
        ("mask_rcnn", {"box": None}, "box: a detector needs one"),
        ("cifar", {"box": BOX}, "box: a classifier has no boxes"),
        ("retinanet", {"box": (10, 10, 100, 20)}, "lie in the image of 90 x 64 pixels, got [10.0, 10.0, 100.0, 20.0]"),
        ("mask_rcnn", {"box": (10, 10, 10, 20)}, "box: must have an area"),
        ("mask_rcnn", {"box": (10, 10, float("nan"), 20)}, "box: must be four finite numbers"),
        ("mask_rcnn", {"box": (10, 10, 20)}, "box: must be four finite numbers"),
        ("cifar", {"image": torch.zeros(1, 8, 8)}, "image: must be (3, H, W), got (1, 8, 8)."),
        ("cifar", {"image": torch.full((3, 32, 32), torch.inf)}, "image: has values that are not finite."),
        ("cifar", {"composite": "deep"}, "composite: 'deep' is not one of layered, zero"),
        ("cifar", {"feature": "p9"}, "feature: 'p9' is not one of res2, res3, res4, pooled."),
        ("cifar", {"feature": "res3", "channels": [99]}, "channels: must be from 0 to 31, which res3 has."),
        ("cifar", {"composite": Composite.uniform(PixelBox())}, "PixelBox is a rule for pixels alone"),
    ],
)
def test_mistakes(models, name, changes, message):
    with pytest.raises(InputError) as error:
        relevance_map(models[name], **arguments(name) | changes)
    assert message in str(error.value)


def test_other_detectors_are_refused():
    with pytest.raises(InputError, match="SemanticSegmentor is not supported"):
        relevance_map(build(tiny_cfg("semantic")), image_of(), label=0)
