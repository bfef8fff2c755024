"""Heads that compare whole maps: PKD, CWD and MGD, by numbers that a reader can check."""

import math

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.utils import comm

from kd_det import Batch
from kd_det.heads import ChannelWiseHead, MaskedGenerationHead, PearsonHead
from kd_det.heads.align import sum_scale

BATCH = Batch([], [(32, 32)])


def spec(channels=1, *, names=("p3",)):
    return {name: ShapeSpec(channels=channels, stride=8) for name in names}


def only(losses):
    (loss,) = losses.values()
    return loss


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- What all of them share ----
@pytest.mark.parametrize("head", [PearsonHead, ChannelWiseHead])
def test_maps_of_one_width_have_no_adapter(head):
    assert not list(head(student_spec=spec(2), teacher_spec=spec(2)).parameters())
    assert [tuple(p.shape) for p in head(student_spec=spec(2), teacher_spec=spec(3)).parameters()] == [
        (3, 2, 1, 1),
        (3,),
    ]


@pytest.mark.parametrize("head", [PearsonHead, ChannelWiseHead])
def test_the_adapter_comes_before_the_comparison(head):
    built = head(student_spec=spec(2), teacher_spec=spec(1)).double()
    built.align["p3"].weight.data = torch.tensor([[[[2.0]], [[-1.0]]]], dtype=torch.float64)
    built.align["p3"].bias.data.fill_(0.5)
    s, t = noise(1, 2, 4, 4), noise(1, 1, 4, 4, seed=1)
    aligned = 2 * s[:, :1] - s[:, 1:] + 0.5
    expected = only(head(student_spec=spec(), teacher_spec=spec())({"p3": aligned}, {"p3": t}, BATCH))
    assert only(built({"p3": s}, {"p3": t}, BATCH)).item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("head", [PearsonHead, ChannelWiseHead])
def test_levels_are_summed(head):
    sides = [{"p3": noise(1, 1, 4, 4, seed=i), "p4": noise(1, 1, 2, 2, seed=i + 2)} for i in (0, 1)]
    one = [only(head(student_spec=spec(names=[x]), teacher_spec=spec(names=[x]))(*sides, BATCH)) for x in ("p3", "p4")]
    names = ("p3", "p4")
    assert only(head(student_spec=spec(names=names), teacher_spec=spec(names=names))(*sides, BATCH)) == sum(one)


@pytest.mark.parametrize("head", [PearsonHead, ChannelWiseHead])
def test_padding_is_left_out_as_if_it_were_cut_off(head):
    built = head(student_spec=spec(2), teacher_spec=spec(2))
    s, t = noise(1, 2, 4, 4), noise(1, 2, 4, 4, seed=1)
    masked = built({"p3": s}, {"p3": t}, Batch([], [(32, 17)], mask_padding=True))
    cut = built({"p3": s[..., :3]}, {"p3": t[..., :3]}, BATCH)
    assert only(masked).item() == pytest.approx(only(cut).item(), rel=1e-12)


# ---- PKD ----
def test_pearson_of_a_correlation_that_is_known():
    """Of 1, 2, 3 and 1, 3, 2 the correlation is 1/2, and M is 3: the loss is 2/3 * 1/2."""
    head = PearsonHead(student_spec=spec(), teacher_spec=spec())
    s, t = ({"p3": torch.tensor([[[x]]], dtype=torch.float64)} for x in ([1.0, 2.0, 3.0], [1.0, 3.0, 2.0]))
    assert only(head(s, t, BATCH)).item() == pytest.approx(1 / 3, rel=1e-5)


def test_pearson_ignores_the_scale_and_the_offset_of_each_channel():
    head = PearsonHead(student_spec=spec(2), teacher_spec=spec(2))
    s = noise(2, 2, 3, 3)
    t = s * torch.tensor([5.0, 0.1])[:, None, None] + torch.tensor([-3.0, 8.0])[:, None, None]
    assert only(head({"p3": s}, {"p3": t}, BATCH)).item() == pytest.approx(0, abs=1e-9)
    assert only(head({"p3": s}, {"p3": -t}, BATCH)).item() == pytest.approx(2 * 17 / 18, rel=1e-4)


# ---- CWD ----
def test_channel_wise_divergence_of_two_cells():
    """KL of (1/2, 1/2) from (3/4, 1/4), the softmax of (log 3, 0); with T = 2 its logits are halved."""
    s, t = torch.zeros(1, 1, 1, 2), torch.tensor([[[[math.log(3), 0.0]]]])
    head = ChannelWiseHead(student_spec=spec(), teacher_spec=spec())
    assert only(head({"p3": s}, {"p3": t}, BATCH)).item() == pytest.approx(
        0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-5
    )
    warm = ChannelWiseHead(student_spec=spec(), teacher_spec=spec(), temperature=2.0)
    p = math.sqrt(3) / (1 + math.sqrt(3))
    expected = 4 * (p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p)))
    assert only(warm({"p3": s}, {"p3": t}, BATCH)).item() == pytest.approx(expected, rel=1e-5)


def test_channel_wise_ignores_an_offset_of_a_channel():
    head = ChannelWiseHead(student_spec=spec(2), teacher_spec=spec(2))
    s = noise(1, 2, 3, 3)
    t = s + torch.tensor([-3.0, 8.0])[:, None, None]
    assert only(head({"p3": s}, {"p3": t}, BATCH)).item() == pytest.approx(0, abs=1e-9)


# ---- MGD ----
def build_mgd(channels=1, **options):
    """The generator passes positive values on as they are."""
    head = MaskedGenerationHead(student_spec=spec(channels), teacher_spec=spec(channels), **options)
    for conv in (head.generate["p3"][0], head.generate["p3"][2]):
        torch.nn.init.dirac_(conv.weight)
        torch.nn.init.zeros_(conv.bias)
    return head


def shown(head, size=(1, 1, 40, 50)):
    """Share of the cells that are shown: of ones and a teacher of zeros, each of them costs 1."""
    ones = torch.ones(size)
    return only(head({"p3": ones}, {"p3": torch.zeros(size)}, BATCH)).item() / ones.numel()


def test_generated_maps_are_compared_by_the_sum_of_squares():
    head = build_mgd(2, mask_ratio=0.0, scale="code")
    s, t = torch.full((2, 2, 3, 4), 3.0), torch.full((2, 2, 3, 4), 1.0)
    assert only(head({"p3": s}, {"p3": t}, BATCH)).item() == pytest.approx(2 * 3 * 4 * 4.0)


@pytest.mark.parametrize("ratio", [0.2, 0.65])
def test_a_share_of_the_cells_is_hidden_in_all_channels(ratio):
    head = build_mgd(2, mask_ratio=ratio, scale="code")
    assert shown(head, (1, 2, 40, 50)) == pytest.approx(1 - ratio, abs=0.05)
    different = torch.tensor([1.0, 10.0])[:, None, None].expand(1, 2, 40, 50).clone().requires_grad_()
    only(head({"p3": different}, {"p3": torch.zeros(1, 2, 40, 50)}, BATCH)).backward()
    hidden = different.grad == 0
    assert torch.equal(hidden[:, 0], hidden[:, 1])
    assert hidden.double().mean().item() == pytest.approx(ratio, abs=0.05)


def test_the_sum_is_that_of_an_image_of_the_published_size():
    small, published = torch.zeros(1, 1, 10, 10), torch.zeros(1, 1, 100, 168)
    assert sum_scale(published, 8, scale="map_invariant") == 1.0
    assert sum_scale(small, 8, scale="map_invariant") == pytest.approx(168.0)
    assert sum_scale(small, 8, scale="code") == 1.0
    mask = torch.zeros(1, 1, 10, 10, dtype=torch.bool)
    mask[..., :5] = True
    assert sum_scale(small, 8, scale="map_invariant", mask=mask).item() == pytest.approx(336.0)
    invariant, code = (build_mgd(mask_ratio=0.0, scale=scale) for scale in ("map_invariant", "code"))
    assert shown(invariant, (1, 1, 10, 10)) == pytest.approx(168 * shown(code, (1, 1, 10, 10)))


def test_hidden_cells_change_with_each_step_and_go_on_after_a_resume():
    head = build_mgd(scale="code")
    shares = [shown(head) for _ in range(4)]
    assert len(set(shares)) == 4
    resumed = build_mgd(scale="code")
    first = build_mgd(scale="code")
    first.load_state_dict(head.state_dict() | {"_extra_state": {"seed": head.seed, "draws": 2}})
    assert [shown(first), shown(first)] == shares[2:]
    resumed.load_state_dict(head.state_dict())
    assert shown(resumed) == shown(head)


def test_hidden_cells_do_not_touch_other_random_numbers(monkeypatch):
    head = build_mgd(scale="code")
    state = torch.get_rng_state()
    first = shown(head)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(123)
    again = build_mgd(scale="code")
    again.set_extra_state(head.get_extra_state() | {"draws": 0})
    assert shown(again) == first
    monkeypatch.setattr(comm, "get_rank", lambda: 1)
    other = build_mgd(scale="code")
    other.set_extra_state(head.get_extra_state() | {"draws": 0})
    assert shown(other) != first
