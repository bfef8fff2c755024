"""Values of the heads with adapters and stages that a reader can check, or that published code gives."""

import json
import math
from pathlib import Path

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.utils.events import EventStorage
from helpers import build, distilled_cfg, step
from torch import nn

from kd_det import Batch, InputError, add_kd_config, build_kd_heads
from kd_det.heads import ActivationBoundaryHead, FactorTransferHead, HintHead, InheritExploreHead, OverhaulHead
from kd_det.heads import inherit_explore as inherit_explore_module
from kd_det.heads import overhaul as overhaul_module
from kd_det.heads.build import freeze_pretrained
from kd_det.heads.coders import Feature, first_boxes
from kd_det.heads.inherit_explore import coder

from .signals import make_signals, make_spec

GOLDEN = json.loads((Path(__file__).parents[1] / "losses" / "golden.json").read_text())


def golden(function, name):
    """Student's and teacher's tensor of a case of the losses."""
    case = next(case for case in GOLDEN if (case["function"], case["name"]) == (function, name))
    return [torch.tensor(x, dtype=torch.float64) for x in case["inputs"]]


def make_batch(sizes, *, mask_padding=False):
    return Batch([], sizes, mask_padding)


NO_BATCH = make_batch([(8, 8), (8, 8)])


def maps(*shape, channels=3, seed=0):
    return torch.randn(2, channels, *shape, generator=torch.Generator().manual_seed(seed))


def without_encoders(head):
    """Factors are the features themselves."""
    for modules in head.modules():
        if isinstance(modules, nn.ModuleDict):
            for name in [name for name, module in modules.items() if not isinstance(module, nn.ModuleDict)]:
                modules[name] = nn.Identity()
                modules[name].encoder = nn.Identity()
    return head


class Factor(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return self.factor * x


# ---- Factor transfer ----
def factor_transfer(student=2, teacher=2, factor=2, **options):
    return FactorTransferHead(features={"p2": Feature(student, teacher, factor, 4)}, **options)


# 2 channels on 2x2 cells: 8 elements
@pytest.mark.parametrize(
    ("scale", "expected"), [("code", 0.2789477196020565), ("map_invariant", 0.2789477196020565 * math.sqrt(8))]
)
def test_factor_transfer_gives_what_published_code_gives(scale, expected):
    student, teacher = golden("factor_transfer_loss", "p=1")
    head = without_encoders(factor_transfer(scale=scale))
    losses = head({"p2": student}, {"p2": teacher}, NO_BATCH)
    assert losses["loss_kd_factor_transfer"].item() == pytest.approx(expected, rel=1e-5)


def test_factor_transfer_of_larger_maps():
    """Repeated maps have the same distance; as published it is halved with twice the rows and columns."""
    student, teacher = golden("factor_transfer_loss", "p=1")
    values = {}
    for scale in ("code", "map_invariant"):
        head = without_encoders(factor_transfer(scale=scale))
        sides = [{"p2": x.repeat(1, 1, n, n)} for n in (1, 2) for x in (student, teacher)]
        pairs = (sides[:2], sides[2:])
        values[scale] = [head(*pair, NO_BATCH)["loss_kd_factor_transfer"].item() for pair in pairs]
    assert values["code"][1] == pytest.approx(values["code"][0] / 2, rel=1e-5)
    assert values["map_invariant"][1] == pytest.approx(values["map_invariant"][0], rel=1e-5)


def test_first_boxes_of_each_image():
    boxes = torch.tensor([[image, 0.0, 0.0, 8.0, 8.0] for image in (0, 0, 0, 2, 3, 3)])
    student = {"roi_boxes": boxes, "roi_features": torch.arange(6.0), "p3": torch.zeros(4)}
    teacher = {"roi_features": 10 + torch.arange(6.0)}
    own, other = first_boxes(2, student, teacher)
    assert own["roi_features"].tolist() == [0, 1, 3, 4, 5]
    assert other["roi_features"].tolist() == [10, 11, 13, 14, 15]
    assert own["p3"] is student["p3"]
    assert first_boxes(0, student, teacher) == [student, teacher]


@pytest.mark.parametrize("name", ["FactorTransferHead", "InheritExploreHead"])
def test_other_boxes_have_no_part(name):
    spec = make_spec(6), make_spec(32)
    cfg = get_cfg()
    add_kd_config(cfg)
    cfg.KD.HEADS = [name]
    cfg.KD.FACTOR_TRANSFER.BOXES = cfg.KD.INHERIT_EXPLORE.BOXES = 2
    head = build_kd_heads(cfg, *spec)[name].eval()
    student, teacher = make_signals(spec[0], seed=0), make_signals(spec[1], seed=1)
    batch = Batch(inputs=[{}, {}], image_sizes=[(64, 128)] * 2)
    before = head(student, teacher, batch)
    changed = student["roi_features"].clone()
    changed[[2, 5]] += 1  # The third box of each image.
    assert head(student | {"roi_features": changed}, teacher, batch) == before
    changed[4] += 1
    after = head(student | {"roi_features": changed}, teacher, batch)
    assert all(after[key] != before[key] for key in before)


def test_paraphraser_and_translator_as_published():
    head = factor_transfer(3, 6, 2)
    paraphraser = head.paraphrasers["p2"]
    widths = [
        [(tuple(m.weight.shape), type(m)) for m in part if hasattr(m, "weight")]
        for part in (paraphraser.encoder, paraphraser.decoder, head.translators["p2"])
    ]
    conv, deconv = nn.Conv2d, nn.ConvTranspose2d
    assert widths[0] == [((6, 6, 3, 3), conv), ((2, 6, 3, 3), conv), ((2, 2, 3, 3), conv)]
    assert widths[1] == [((2, 2, 3, 3), deconv), ((2, 6, 3, 3), deconv), ((6, 6, 3, 3), deconv)]
    assert widths[2] == [((3, 3, 3, 3), conv), ((2, 3, 3, 3), conv), ((2, 2, 3, 3), conv)]
    # behind the last layer, too, there is a leaky ReLU of slope 0.1
    for part in (paraphraser.encoder, paraphraser.decoder, head.translators["p2"]):
        nn.init.zeros_(part[-2].weight)
        nn.init.constant_(part[-2].bias, -1.0)
    assert torch.equal(paraphraser(maps(4, 5, channels=6)), torch.full((2, 6, 4, 5), -0.1))
    assert torch.equal(head.translators["p2"](maps(4, 5)), torch.full((2, 2, 4, 5), -0.1))


# By default as the published code of factor transfer, and as the paper of inherit and explore.
@pytest.mark.parametrize(
    ("head_class", "options", "expected"),
    [
        (FactorTransferHead, {}, 3.0),
        (FactorTransferHead, {"reconstruction": "l2"}, 9.0),
        (InheritExploreHead, {}, 9.0),
        (InheritExploreHead, {"reconstruction": "l1"}, 3.0),
    ],
)
def test_reconstruction_by_hand(head_class, options, expected):
    """Of 3 the auto-encoder makes 6. In two features, one of which is right, the mean of each counts."""
    head = head_class(features={"p2": Feature(2, 1, 1, 4), "roi_features": Feature(2, 1, 1, None)}, **options)
    (part,) = head.pretrained
    parts = getattr(head, part)
    parts["p2"], parts["roi_features"] = Factor(2.0), Factor(1.0)
    teacher = {"p2": torch.full((2, 1, 3, 3), 3.0), "roi_features": torch.full((5, 1, 2, 2), 7.0)}
    (loss,) = head.pretrain({}, teacher, NO_BATCH).values()
    assert loss.item() == pytest.approx(expected)


# ---- Inherit and explore ----
def inherit_explore(channels=4, kind="ft", teacher=2, factor=2, **options):
    return InheritExploreHead(features={"p2": Feature(channels, teacher, factor, 4)}, kind=kind, **options)


def golden_halves(kind):
    """The student's two halves, one after the other, and the teacher's factor."""
    inherit, factor = golden("inheritance_loss", kind)
    explore, _ = golden("exploration_loss", kind)
    return {"p2": torch.cat([inherit, explore], dim=1)}, {"p2": factor}


# ft has 8 elements, of attention maps there are 4
@pytest.mark.parametrize(
    ("kind", "inherit", "explore", "elements"),
    [
        ("ft", 0.15894883459180986, -0.4047565686962579, 8),
        ("at", 0.17565366848347977, -0.3167565425508455, 4),
        ("od", 0.8144880195949251, None, 1 / 8),
    ],
)
@pytest.mark.parametrize("scale", ["code", "map_invariant"])
def test_inherit_and_explore_give_what_published_code_gives(kind, inherit, explore, elements, scale):
    head = without_encoders(inherit_explore(kind=kind, scale=scale, inherit_weight=2.0, explore_weight=50.0))
    losses = head(*golden_halves(kind), NO_BATCH)
    factor = 1 if scale == "code" else math.sqrt(elements)
    assert losses["loss_kd_inherit_explore_inherit"].item() == pytest.approx(2 * factor * inherit, abs=1e-9)
    if explore:
        assert losses["loss_kd_inherit_explore_explore"].item() == pytest.approx(50 * factor * explore, abs=1e-9)


@pytest.mark.parametrize("scale", ["code", "map_invariant"])
def test_other_distances_give_what_published_code_gives(scale):
    """The cosine has no scale."""
    values = []
    for distance in ("l2", "cosine"):
        head = without_encoders(inherit_explore(distance=distance, scale=scale))
        losses = head(*golden_halves("ft"), NO_BATCH)
        values += [losses[f"loss_kd_inherit_explore_{part}"].item() for part in ("inherit", "explore")]
    factor = 1 if scale == "code" else math.sqrt(8)
    expected = [0.20168885204364898, -0.5086696285819461]
    assert values[:2] == pytest.approx([factor * x for x in expected], abs=1e-9)
    assert values[2:] == pytest.approx([0.1627135721547397, 0.0805896125913797], abs=1e-9)


@pytest.mark.parametrize("length", [1.0, 1e6])
def test_exploration_of_rectified_factors_by_hand(length):
    """Teacher (3, 4, -9), of length 5. An orthogonal factor is sqrt(50) away, however long it is; an equal one is 0."""
    teacher = torch.tensor([3.0, 4.0, -9.0]).view(1, 3, 1, 1)
    head = without_encoders(inherit_explore(6, "od", 3, 3, scale="code"))
    for explore, expected in (([-5.0, 0.0, 1.0], -math.sqrt(50)), ([3.0, 4.0, -1.0], 0.0)):
        half = length * torch.tensor(explore).view(1, 3, 1, 1)
        with EventStorage() as storage:
            losses = head({"p2": torch.cat([teacher, half], dim=1)}, {"p2": teacher}, make_batch([(4, 4)]))
        assert losses["loss_kd_inherit_explore_explore"].item() == pytest.approx(expected, abs=1e-5)
        assert storage.latest()["kd/ie_od_distance/p2"][0] == pytest.approx(-expected / 5, abs=1e-6)
        assert losses["loss_kd_inherit_explore_inherit"].item() == 0


@pytest.mark.parametrize("kind", ["ft", "at", "od"])
def test_training_draws_one_half_near_and_pushes_the_other_away(kind):
    torch.manual_seed(0)
    head, teacher = inherit_explore(kind=kind), {"p2": maps(8, 8, channels=2, seed=1)}
    feature = maps(8, 8, channels=4).requires_grad_()
    optimizer = torch.optim.Adam([feature, *head.encoders.parameters()], lr=0.01)
    values = []
    for _ in range(30):
        losses = head({"p2": feature}, teacher, NO_BATCH)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        values.append([losses[f"loss_kd_inherit_explore_{part}"].item() for part in ("inherit", "explore")])
    distances = [(inherit, -explore) for inherit, explore in values]
    assert distances[-1][0] < 0.9 * distances[0][0]
    assert distances[-1][1] > 1.02 * distances[0][1]


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0)])
def test_a_half_that_is_left_out(weights):
    head = inherit_explore(inherit_weight=weights[0], explore_weight=weights[1])
    part = "inherit" if weights[0] else "explore"
    losses = head({"p2": maps(8, 8, channels=4)}, {"p2": maps(8, 8, channels=2)}, NO_BATCH)
    assert list(losses) == [f"loss_kd_inherit_explore_{part}"]
    assert list(head.encoders) == [part]


def test_a_random_encoder_keeps_its_weights_and_passes_gradients_to_the_student():
    """It computes the same in training and in evaluation, and a checkpoint holds it."""
    torch.manual_seed(0)
    head, feature = inherit_explore(encoder="random").train(), maps(8, 8, channels=4).requires_grad_()
    freeze_pretrained(head)
    frozen, other = head.encoders["explore"]["p2"], inherit_explore(encoder="random")
    before = {key: x.clone() for key, x in head.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in head.parameters() if p.requires_grad], lr=0.1)
    losses = head({"p2": feature}, {"p2": maps(8, 8, channels=2, seed=1)}, NO_BATCH)
    losses["loss_kd_inherit_explore_explore"].backward(retain_graph=True)
    assert feature.grad[:, 2:].any()
    losses["loss_kd_inherit_explore_inherit"].backward()
    optimizer.step()
    changed = {key for key, x in head.state_dict().items() if not torch.equal(x, before[key])}
    assert changed
    assert {key for key in changed if not key.startswith("encoders.inherit.")} == set()
    x = maps(8, 8)[:, :2]
    training = frozen(x)
    head.eval()
    other.load_state_dict(head.state_dict())
    assert torch.equal(frozen(x), training)
    assert torch.equal(other.encoders["explore"]["p2"](x), training)


@pytest.mark.parametrize("kind", ["ft", "at", "od"])
def test_noise_in_the_place_of_the_teachers_factor(kind):
    """The exploring half's loss is that of new noise at each call; the inheriting half sees the teacher."""
    student, teacher = golden_halves(kind)
    losses = [
        without_encoders(inherit_explore(kind=kind, explore_target=target))(student, teacher, NO_BATCH)
        for target in ("teacher", "noise", "noise")
    ]
    parts = [f"loss_kd_inherit_explore_{part}" for part in ("inherit", "explore")]
    inherit, explore = ([x[part].item() for x in losses] for part in parts)
    assert inherit[0] == inherit[1] == inherit[2]
    assert len(set(explore)) == 3


def test_noise_has_the_length_of_the_teachers_factor_and_none_in_the_padding(monkeypatch):
    """The rectified factors (3, 4) of the first image and (0, 12) of the second have the lengths 5 and 12."""
    torch.manual_seed(0)
    targets = []
    monkeypatch.setattr(
        inherit_explore_module, "exploration_loss", lambda half, target, **_: targets.append(target) or target.sum()
    )
    teacher = torch.zeros(2, 8, 2, 2)
    teacher[0, :2, 0, 0], teacher[1, :2, 0, 0] = torch.tensor([3.0, 4.0]), torch.tensor([-9.0, 12.0])
    for kind in ("od", "ft"):
        head = without_encoders(inherit_explore(kind=kind, explore_target="noise"))
        head({"p2": torch.ones(2, 16, 2, 2)}, {"p2": teacher}, make_batch([(8, 8), (4, 4)], mask_padding=True))
    rectified, plain = targets
    assert rectified.flatten(1).norm(dim=1).tolist() == pytest.approx([5, 12])
    assert plain.flatten(1).norm(dim=1).tolist() == pytest.approx([5, 15])
    assert (rectified >= 0).all()
    assert (plain < 0).any()
    assert [noise.count_nonzero() for noise in plain] == [32, 8]  # Only the first cell of the second image counts.
    assert rectified[1].count_nonzero() <= 8


def test_attention_maps_need_no_stage():
    head = inherit_explore(kind="at")
    assert head.pretrained == ()
    assert list(head.parameters()) == []


def test_encoders_as_published():
    layers = coder(6, 2)
    assert [type(layer).__name__ for layer in layers] == ["LeakyReLU", *["Conv2d", "BatchNorm2d", "LeakyReLU"] * 3]
    assert [tuple(layer.weight.shape) for layer in layers if isinstance(layer, nn.Conv2d)] == [
        (6, 6, 3, 3),
        (2, 6, 3, 3),
        (2, 2, 3, 3),
    ]
    assert {layer.negative_slope for layer in layers if isinstance(layer, nn.LeakyReLU)} == {0.1}
    # normal, of variance 2 / (9 * 64)
    assert coder(64, 8)[1].weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 64)), rel=0.05)


def halves_of(head, x):
    return [without_encoders(head).halves({"p2": x}, NO_BATCH)[part]["p2"] for part in ("inherit", "explore")]


def test_natural_division():
    x = torch.arange(6.0).view(1, 6, 1, 1)
    assert [half.flatten().tolist() for half in halves_of(inherit_explore(6), x)] == [[0, 1, 2], [3, 4, 5]]


def test_random_division():
    """It is one half and the other, the same on every process, another by another seed, and kept in a checkpoint."""
    x, found = torch.arange(64.0).view(1, 64, 1, 1), {}
    for seed in (0, 1):
        torch.manual_seed(seed + 5)
        again = inherit_explore(64, divide="random", seed=seed)
        torch.manual_seed(seed)
        head = inherit_explore(64, divide="random", seed=seed)
        found[seed] = [half.flatten().tolist() for half in halves_of(head, x)]
        assert [half.flatten().tolist() for half in halves_of(again, x)] == found[seed]
        assert sorted([*found[seed][0], *found[seed][1]]) == list(range(64))
    assert found[0] != found[1]
    other = inherit_explore(64, divide="random", seed=1)
    other.load_state_dict(inherit_explore(64, divide="random", seed=0).state_dict())
    assert [half.flatten().tolist() for half in halves_of(other, x)] == found[0]


def test_halves_and_teachers_factors():
    head = inherit_explore(4, teacher=6, factor=3).eval()
    student, teacher = maps(8, 8, channels=4), maps(8, 8, channels=6)
    halves = head.halves({"p2": student}, NO_BATCH)
    torch.testing.assert_close(halves["inherit"]["p2"], head.encoders["inherit"]["p2"](student[:, :2]))
    torch.testing.assert_close(halves["explore"]["p2"], head.encoders["explore"]["p2"](student[:, 2:]))
    factor = head.teacher_factors({"p2": teacher}, NO_BATCH)["p2"]
    torch.testing.assert_close(factor, head.auto_encoders["p2"].encoder(teacher))
    assert factor.shape == (2, 3, 8, 8)
    assert not factor.requires_grad


# ---- Overhaul ----
def stage_specs(student, teacher, stages):
    """Specs of both sides whose stages have these channels; strides 4, 8, ..."""
    return [
        {f"{stage}_preact": ShapeSpec(channels=c, stride=4 * 2**i) for i, stage in enumerate(stages)}
        for c in (student, teacher)
    ]


def overhaul(channels=3, stages=("res2",), **options):
    student, teacher = stage_specs(channels, channels, stages)
    head = OverhaulHead(student_spec=student, teacher_spec=teacher, **options)
    for name in head.connectors:
        head.connectors[name] = nn.Identity()
    return head


def test_overhaul_gives_what_published_code_gives():
    student, teacher = golden("overhaul_loss", "2x2 maps")
    weight, bias = golden("margin_from_batch_norm", "the last channel is hardly ever negative")
    head = overhaul(margin="batch_norm", scale="code")
    assert head.teacher_signals == ("res2_preact", "res2_norm_weight", "res2_norm_bias")
    signals = {"res2_preact": teacher, "res2_norm_weight": weight, "res2_norm_bias": bias}
    loss = head({"res2_preact": student}, signals, NO_BATCH)["loss_kd_overhaul"]
    assert loss.item() == pytest.approx(25.356175501753675, rel=1e-5)
    cfg = get_cfg()
    add_kd_config(cfg)
    assert cfg.KD.OVERHAUL.WEIGHT * loss.item() == pytest.approx(0.025356175501753675, rel=1e-5)


def test_estimated_margins_by_hand():
    """Channel 0: -1 and -3, then -5; channel 1 is never negative. The third batch comes too late."""
    head = overhaul(2, margin_batches=2)
    batches = [[[-1.0, -3.0, 2.0], [1.0, 2.0, 0.0]], [[-5.0, 0.0, 1.0], [3.0, 3.0, 3.0]], [[-99.0] * 3, [-99.0] * 3]]
    for values, margins in zip(batches, ([-2.0, 0.0], [-3.0, 0.0], [-3.0, 0.0]), strict=True):
        teacher = {"res2_preact": torch.tensor(values).view(1, 2, 1, 3)}
        head({"res2_preact": torch.zeros(1, 2, 1, 3)}, teacher, make_batch([(4, 12)]))
        assert head._margin("res2_preact", {}).tolist() == margins
    resumed = overhaul(2, margin_batches=2)
    resumed.load_state_dict(head.state_dict())
    assert resumed._margin("res2_preact", {}).tolist() == [-3.0, 0.0]
    assert resumed.batches == 2


def test_margins_are_not_estimated_in_evaluation():
    head = overhaul(2).eval()
    head({"res2_preact": torch.zeros(1, 2, 2, 2)}, {"res2_preact": -torch.ones(1, 2, 2, 2)}, make_batch([(8, 8)]))
    assert head.batches == 0
    assert not head.res2_preact_negative.any()


def test_processes_share_their_estimate(monkeypatch):
    """The other process saw -9 once per channel."""
    monkeypatch.setattr(overhaul_module.comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(overhaul_module.dist, "all_reduce", lambda x: x.add_(torch.tensor([[-9.0] * 2, [1.0] * 2])))
    head, teacher = overhaul(2), {"res2_preact": -torch.ones(1, 2, 1, 1)}
    head({"res2_preact": torch.zeros(1, 2, 1, 1)}, teacher, make_batch([(4, 4)]))
    assert head._margin("res2_preact", {}).tolist() == [-5.0, -5.0]


@pytest.mark.parametrize(("scale", "factor"), [("code", 1), ("map_invariant", 64 / (2 * 4))])
def test_stages_by_hand(scale, factor):
    """Student 0, teacher 1: 1 per element, 2 channels. 8x16 cells at 1/4, 4x8 at 1/2, 2x4 at 1."""
    head = overhaul(2, ("res2", "res3", "res4"), scale=scale)
    sizes = {"res2_preact": (8, 16), "res3_preact": (4, 8), "res4_preact": (2, 4)}
    sides = [{name: torch.full((3, 2, *size), value) for name, size in sizes.items()} for value in (0.0, 1.0)]
    loss = head(*sides, make_batch([(32, 64)] * 3))["loss_kd_overhaul"]
    assert loss.item() == pytest.approx(factor * 2 * (128 / 4 + 32 / 2 + 8))


# ---- Activation boundaries ----
def activation_boundary(stages=("res2", "res3"), channels=(2, 2), **options):
    student, teacher = stage_specs(*channels, stages)
    return ActivationBoundaryHead(student_spec=student, teacher_spec=teacher, **options)


def test_activation_boundaries_give_what_published_code_gives():
    """Two stages, the finer one of which is 1.1 times the student's and 0.9 times the teacher's coarser one."""
    student, teacher = golden("activation_boundary_loss", "zeros and margins")
    own = {"res2_preact": 1.1 * student, "res3_preact": student}
    other = {"res2_preact": 0.9 * teacher, "res3_preact": teacher}
    with EventStorage() as storage:
        losses = activation_boundary(scale="code").pretrain(own, other, NO_BATCH)
    assert losses["loss_kd_activation_boundary"].item() == pytest.approx(0.06198363750000001, rel=1e-5)
    assert storage.latest()["kd/ab_disagreement"][0] == pytest.approx(0.3125)


def test_connectors_stand_where_the_channels_differ():
    assert isinstance(activation_boundary().connectors["res2_preact"], nn.Identity)
    connector = activation_boundary(channels=(64, 256)).connectors["res2_preact"]
    assert connector.bias is None
    assert connector.weight.shape == (256, 64, 1, 1)
    assert connector.weight.std().item() == pytest.approx(math.sqrt(2 / 256), rel=0.05)
    assert isinstance(connector.norm, nn.BatchNorm2d)


# ---- Hints in two stages ----
def test_hints_in_two_stages_by_hand():
    """As in one stage: 3 against 5; the weight of 0.5 is the stage's."""
    specs = [{"p2": ShapeSpec(channels=1, stride=4)}] * 2
    head = HintHead(student_spec=specs[0], teacher_spec=specs[1], stages=2, weight=0.5)
    nn.init.constant_(head.regressors["p2"].weight, 2.0)
    nn.init.constant_(head.regressors["p2"].bias, 1.0)
    student, teacher = {"p2": torch.ones(2, 1, 3, 3)}, {"p2": torch.full((2, 1, 3, 3), 5.0)}
    assert head.pretrain(student, teacher, NO_BATCH)["loss_kd_hint"].item() == pytest.approx(0.5 * 4.0)
    assert head({}, {}, NO_BATCH) == {}


# ---- Padding ----
def crop(signals, cells):
    return {name: x[:, :, : cells[0], : cells[1]] for name, x in signals.items()}


@pytest.mark.parametrize(
    ("make", "name"),
    [
        *[
            (lambda scale=scale: without_encoders(factor_transfer(scale=scale)), "p2")
            for scale in ("code", "map_invariant")
        ],
        *[
            (lambda kind=kind, scale=scale: without_encoders(inherit_explore(kind=kind, scale=scale)), "p2")
            for kind in ("ft", "at", "od")
            for scale in ("code", "map_invariant")
        ],
        *[
            (lambda kind=kind, distance=distance: without_encoders(inherit_explore(kind=kind, distance=distance)), "p2")
            for kind in ("ft", "at")
            for distance in ("l2", "cosine")
        ],
        (lambda: overhaul(4, scale="code"), "res2_preact"),
        (lambda: overhaul(4), "res2_preact"),
    ],
)
def test_masked_padding_equals_cropped_maps(make, name):
    """Both images are 16 x 20 pixels, 4 x 5 cells."""
    head = make()
    same = isinstance(head, OverhaulHead)
    width = 2 if isinstance(head, FactorTransferHead) else 4
    student, teacher = {name: maps(8, 8, channels=width)}, {name: maps(8, 8, channels=width if same else 2, seed=1)}
    size = [(16, 20)] * 2
    masked = head(student, teacher, make_batch(size, mask_padding=True))
    cropped = make()(crop(student, (4, 5)), crop(teacher, (4, 5)), make_batch(size))
    unmasked = make()(student, teacher, make_batch(size))
    for key, loss in masked.items():
        assert loss.item() == pytest.approx(cropped[key].item(), rel=1e-5)
        assert loss.item() != pytest.approx(unmasked[key].item(), rel=1e-3)


def test_masked_padding_of_activation_boundaries_equals_cropped_maps():
    head = activation_boundary(("res2",))
    student, teacher = ({"res2_preact": maps(8, 8, channels=2, seed=seed)} for seed in (0, 1))
    found = []
    for signals, batch in (
        ((student, teacher), make_batch([(16, 20)] * 2, mask_padding=True)),
        ((crop(student, (4, 5)), crop(teacher, (4, 5))), NO_BATCH),
    ):
        with EventStorage() as storage:
            loss = head.pretrain(*signals, batch)["loss_kd_activation_boundary"]
        found.append([loss.item(), storage.latest()["kd/ab_disagreement"][0]])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


# ---- Options that cannot be ----
def from_options(node, options, specs):
    names = {"ACTIVATION_BOUNDARY": "ActivationBoundaryHead", "FACTOR_TRANSFER": "FactorTransferHead"}
    names |= {"INHERIT_EXPLORE": "InheritExploreHead", "OVERHAUL": "OverhaulHead", "HINT": "HintHead"}
    cfg = get_cfg()
    add_kd_config(cfg)
    cfg.KD.HEADS = [names[node]]
    cfg.merge_from_list([part for key, value in options.items() for part in (f"KD.{node}.{key}", value)])
    torch.manual_seed(0)
    return build_kd_heads(cfg, *specs)[names[node]]


FACTORS = ("FACTOR_TRANSFER", "INHERIT_EXPLORE")
PREACTIVATIONS = ("OVERHAUL", "ACTIVATION_BOUNDARY")


@pytest.mark.parametrize(
    ("node", "key", "value", "told"),
    [
        *[(node, "SCALE", "cells", "'cells' is not one of map_invariant, code.") for node in FACTORS + PREACTIVATIONS],
        *[(node, "RECONSTRUCTION", "l3", "'l3' is not one of l1, l2.") for node in FACTORS],
        *[(node, "FACTOR_RATE", 0.0, "must be above 0, got 0.0.") for node in FACTORS],
        *[(node, "IN_FEATURES", [], "no feature is named; allowed are p2, .*, roi_features") for node in FACTORS],
        *[(node, "IN_FEATURES", ["pooled"], "'pooled' is not a feature map; allowed are p2") for node in FACTORS],
        *[(node, "BOXES", -1, "must be 0 .all. or a number of boxes per image, got -1") for node in FACTORS],
        ("INHERIT_EXPLORE", "KIND", "ofd", "'ofd' is not one of ft, at, od."),
        ("INHERIT_EXPLORE", "DISTANCE", "l3", "'l3' is not one of l1, l2, cosine."),
        ("INHERIT_EXPLORE", "DIVIDE", "half", "'half' is not one of natural, random."),
        ("INHERIT_EXPLORE", "ENCODER", "frozen", "'frozen' is not one of trained, random."),
        ("INHERIT_EXPLORE", "EXPLORE_TARGET", "nothing", "'nothing' is not one of teacher, noise."),
        *[
            (node, "IN_FEATURES", [], "no stage is named; allowed are res2, res3, res4, res5.")
            for node in PREACTIVATIONS
        ],
        *[
            (node, "IN_FEATURES", ["p3"], "no ReLU at the end of the student's 'p3', .* allowed are res2, .*, res5.")
            for node in PREACTIVATIONS
        ],
        *[(node, "IN_FEATURES", ["roi_box"], "'roi_box_preact' is not a feature map") for node in PREACTIVATIONS],
        *[(node, "IN_FEATURES", ["res9"], "'res9_preact' is not a signal of the student") for node in PREACTIVATIONS],
        *[
            (node, "IN_FEATURES", ["res4", "res2"], r"finest stage to the coarsest, but .* res4, res2 are \[16, 4\].")
            for node in PREACTIVATIONS
        ],
        ("OVERHAUL", "MARGIN", "zero", "'zero' is not one of estimate, batch_norm."),
        ("OVERHAUL", "MARGIN_BATCHES", 0, "must be 1 or more, got 0."),
        ("HINT", "STAGES", 3, "3 is not one of 1, 2."),
    ],
)
def test_options_that_cannot_be(node, key, value, told):
    with pytest.raises(InputError, match=f"^KD.{node}.{key}: .*{told}"):
        from_options(node, {key: value}, (make_spec(6), make_spec(6)))


@pytest.mark.parametrize("node", PREACTIVATIONS)
def test_a_teacher_without_relu(node):
    """As a MobileNetV2, whose stages end in a sum."""
    specs = make_spec(6), {name: shape for name, shape in make_spec(6).items() if name != "res3_preact"}
    told = f"^KD.{node}.IN_FEATURES: there is no ReLU at the end of the teacher's 'res3', .* res2, res4, res5"
    with pytest.raises(InputError, match=told):
        from_options(node, {"IN_FEATURES": ["res2", "res3"]}, specs)


def test_rectified_factors_have_a_distance_of_their_own():
    with pytest.raises(InputError, match=r"^KD.INHERIT_EXPLORE.DISTANCE: must stay l1 with KIND 'od', .* got 'l2'"):
        from_options("INHERIT_EXPLORE", {"KIND": "od", "DISTANCE": "l2"}, (make_spec(6), make_spec(6)))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"ENCODER": "random", "KIND": "at"}, "ENCODER: must stay trained with KIND 'at', which has no encoders"),
        ({"ENCODER": "random", "EXPLORE_WEIGHT": 0.0}, "ENCODER: must stay trained with EXPLORE_WEIGHT 0"),
        ({"EXPLORE_TARGET": "noise", "EXPLORE_WEIGHT": 0.0}, "EXPLORE_TARGET: must stay teacher with EXPLORE_WEIGHT 0"),
    ],
)
def test_controls_of_what_is_not_there(options, told):
    with pytest.raises(InputError, match=f"^KD.INHERIT_EXPLORE.{told}"):
        from_options("INHERIT_EXPLORE", options, (make_spec(6), make_spec(6)))


@pytest.mark.parametrize("weights", [(0.0, 0.0), (-1.0, 1.0), (1.0, -1.0)])
def test_weights_of_the_halves_that_cannot_be(weights):
    options = dict(zip(("INHERIT_WEIGHT", "EXPLORE_WEIGHT"), weights, strict=True))
    with pytest.raises(InputError, match=f"^KD.INHERIT_EXPLORE: .*not both 0, got {weights[0]} and {weights[1]}"):
        from_options("INHERIT_EXPLORE", options, (make_spec(6), make_spec(6)))


def test_channels_that_cannot_be_halved():
    with pytest.raises(InputError, match="'roi_features' has 5 channels in the student; their number must be even"):
        from_options("INHERIT_EXPLORE", {}, (make_spec(5), make_spec(6)))


@pytest.mark.parametrize("node", FACTORS)
def test_pooled_sizes_that_differ(node):
    teacher = {**make_spec(6), "roi_features": ShapeSpec(channels=6, height=7, width=7)}
    with pytest.raises(InputError, match=rf"^KD.{node}.IN_FEATURES: .*\(4, 4\) cells in the student but \(7, 7\)"):
        from_options(node, {}, (make_spec(6), teacher))


def test_margins_of_a_teacher_without_batch_norm():
    teacher = {name: shape for name, shape in make_spec(6).items() if "_norm_" not in name}
    with pytest.raises(InputError, match=r"^KD.OVERHAUL.MARGIN: 'res2_norm_weight' is not a signal of the teacher"):
        from_options("OVERHAUL", {"MARGIN": "batch_norm"}, (make_spec(6), teacher))


# ---- In training ----
def test_a_detector_trains_with_all_of_them(teacher, inputs):
    heads = ["FactorTransferHead", "InheritExploreHead", "OverhaulHead"]
    options = {
        "KD.FACTOR_TRANSFER.IN_FEATURES": ["roi_features", "p3"],
        "KD.INHERIT_EXPLORE.IN_FEATURES": ["roi_features"],
        "KD.OVERHAUL.IN_FEATURES": ["res2", "res3", "res4", "res5"],
    }
    model = build(distilled_cfg(teacher, heads, options))
    losses = step(model, inputs)
    assert {"loss_kd_factor_transfer", "loss_kd_inherit_explore_explore", "loss_kd_overhaul"} < losses.keys()
    sum(losses.values()).backward()
    untouched = {name for name, p in model.named_parameters() if p.grad is None}
    assert all(".paraphrasers." in name or ".auto_encoders." in name for name in untouched)
