"""Heads that compare the regions of objects on maps: FGD, FGFI and DeFeat, by numbers that a reader can check."""

import math

import numpy as np
import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.structures import Instances, PolygonMasks
from helpers import build, distilled_cfg, save_teacher, step, tiny_cfg, tiny_inputs

from kd_det import Batch, InputError, build_kd_heads
from kd_det.config import default_config
from kd_det.heads import DecoupledFeatureHead, FineGrainedHead, FocalGlobalHead
from kd_det.heads.boxes import object_boxes
from kd_det.heads.connectors import build_faint_conv
from kd_det.heads.focal_global import ContextBlock

from .signals import make_input, make_spec

STRIDES = {"p3": 8, "p4": 16}
DETECTOR = {key: shape for key, shape in make_spec(6).items() if key != "logits"}
OF_REGIONS = ("FocalGlobalHead", "FineGrainedHead", "DecoupledFeatureHead")


def spec(channels=1, *, names=("p3",)):
    return {name: ShapeSpec(channels=channels, stride=STRIDES[name]) for name in names}


def make_batch(*inputs, **options):
    return Batch.from_inputs([make_input(*x) for x in inputs], **options)


def values(losses):
    """Losses by the names of their parts."""
    return {key.rpartition("_")[2]: loss.item() for key, loss in losses.items()}


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def full(value, *size, channels=2):
    return torch.full((1, channels, *size), value, dtype=torch.float64)


def without_adapters(head):
    """The convolutions return their input."""
    for conv in head.adapters.values():
        torch.nn.init.dirac_(conv.weight)
        torch.nn.init.zeros_(conv.bias)
    return head.double()


def build_from_config(name, specs, options=None):
    cfg = default_config()
    cfg.KD.HEADS = [name]
    cfg.merge_from_list([part for pair in (options or {}).items() for part in pair])
    return build_kd_heads(cfg, specs, specs)[name]


# ---- FGD ----
def build_fgd(channels=2, *, names=("p3",), **options):
    """Each part has the factor 1, unless something else is asked for."""
    ones = {f"{part}_weight": 1.0 for part in ("foreground", "background", "attention", "relation")}
    both = spec(channels, names=names)
    return FocalGlobalHead(student_spec=both, teacher_spec=both, **({"scale": "code"} | ones | options)).double()


def test_an_object_and_the_background_of_an_image_weigh_one_cell_each():
    """Of a constant teacher all attention is 1. The first object covers 2 x 2 cells, the second 3 x 2 others."""
    s, t = full(0.0, 4, 6).repeat(2, 1, 1, 1), full(3.0, 4, 6).repeat(2, 1, 1, 1)
    s[0, :, :2, :2] = 1.0
    losses = values(
        build_fgd()({"p3": s}, {"p3": t}, make_batch((32, 48, [0, 0, 8, 8], [17, 17, 33, 24]), (32, 48, [0, 0, 8, 8])))
    )
    # two channels; the objects have differences of 2 and 3 in the first image and 3 in the second
    assert losses["foreground"] == pytest.approx(2 * (2**2 + 3**2 + 3**2) / 2)
    assert losses["background"] == pytest.approx(2 * 3**2)
    assert losses["relation"] == pytest.approx(2 * (4 * 2**2 + 20 * 3**2 + 24 * 3**2) / 2)


def test_each_part_has_its_factor_and_maps_are_summed():
    batch = make_batch((32, 48, [0, 0, 8, 8]))
    sides = [{"p3": noise(1, 2, 4, 6, seed=i), "p4": noise(1, 2, 2, 3, seed=i + 2)} for i in (0, 1)]
    parts = [values(build_fgd(names=[name])(*sides, batch)) for name in ("p3", "p4")]
    factors = {"foreground": 2.0, "background": 3.0, "attention": 5.0, "relation": 7.0}
    head = build_fgd(names=["p3", "p4"], **{f"{part}_weight": factor for part, factor in factors.items()})
    expected = {part: factor * (parts[0][part] + parts[1][part]) for part, factor in factors.items()}
    assert values(head(*sides, batch)) == pytest.approx(expected, rel=1e-12)


def test_sums_over_cells_are_those_of_images_of_the_published_size():
    """At stride 8 the published size has 16800 cells. The temperature of the attention is 1/2."""
    high = math.log(3) / 2
    along_cells = torch.tensor([[[[high, 0.0]], [[high, 0.0]]]], dtype=torch.float64)
    along_channels = torch.tensor([[[[high, high]], [[0.0, 0.0]]]], dtype=torch.float64)
    batch = make_batch((8, 16))
    for t, factor in ((along_cells, 16800 / 2), (along_channels, 1)):
        student, teacher = {"p3": torch.zeros_like(t)}, {"p3": t}
        code, invariant = (values(build_fgd(scale=x)(student, teacher, batch)) for x in ("code", "map_invariant"))
        assert code["attention"] == pytest.approx(abs(1.5 - 1) + abs(0.5 - 1))
        assert invariant["attention"] == pytest.approx(factor * code["attention"])
        assert invariant["relation"] == pytest.approx(16800 / 2 * code["relation"])
        assert (invariant["foreground"], invariant["background"]) == (code["foreground"], code["background"])


def test_the_context_block_in_numpy():
    torch.manual_seed(0)
    block, x = ContextBlock(4).double(), noise(2, 4, 2, 3)
    assert torch.equal(block(x), x)
    for p in block.parameters():
        torch.nn.init.normal_(p)
    weights = {key: p.detach().numpy().squeeze() for key, p in block.named_parameters()}
    assert block.attend.bias is None
    cells = x.numpy().reshape(2, 4, 6)
    attention = np.exp(np.einsum("c,nci->ni", weights["attend.weight"], cells))
    context = np.einsum("ni,nci->nc", attention / attention.sum(axis=1, keepdims=True), cells)
    hidden = context @ weights["transform.0.weight"].T + weights["transform.0.bias"]
    centred = hidden - hidden.mean(axis=1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-5)
    rectified = np.maximum(normed * weights["transform.1.weight"] + weights["transform.1.bias"], 0)
    added = rectified @ weights["transform.3.weight"].T + weights["transform.3.bias"]
    np.testing.assert_allclose(block(x).detach().numpy(), x.numpy() + added[:, :, None, None], rtol=1e-12)


@pytest.mark.parametrize("scale", ["code", "map_invariant"])
def test_masked_padding_is_cut_off_image_by_image(scale):
    head = build_fgd(scale=scale)
    for p in head.parameters():
        torch.nn.init.normal_(p)
    s, t = noise(2, 2, 4, 6), noise(2, 2, 4, 6, seed=1)
    first, second = (32, 41, [3, 3, 20, 20]), (17, 48, [20, 0, 45, 16])
    together = values(head({"p3": s}, {"p3": t}, make_batch(first, second, mask_padding=True)))
    alone = [
        values(head({"p3": s[:1]}, {"p3": t[:1]}, make_batch(first))),
        values(head({"p3": s[1:, :, :3]}, {"p3": t[1:, :, :3]}, make_batch(second))),
    ]
    assert together == pytest.approx({key: (alone[0][key] + alone[1][key]) / 2 for key in together}, rel=1e-12)


# ---- FGFI ----
def build_fgfi(kind, *, names=("p3",)):
    """One square anchor per cell, of the cell's size."""
    both = spec(2, names=names)
    anchors = DefaultAnchorGenerator(
        sizes=[[STRIDES[name]] for name in names], aspect_ratios=[1.0], strides=[STRIDES[name] for name in names]
    )
    head = FineGrainedHead(student_spec=both, teacher_spec=both, anchor_generator=anchors, kind=kind)
    return without_adapters(head)


@pytest.mark.parametrize(("kind", "channels"), [("pyramid", 1), ("map", 2)])
def test_cells_of_near_anchors_are_compared(kind, channels):
    """The object lies in the first two cells; its IoU is 1/3 with the first and 3/5 with the second, or 1/2 with each.

    Over channels, `map` adds up and `pyramid` takes the mean.
    """
    s = full(0.0, 2, 3)
    s[..., 0, :2] = torch.tensor([4.0, 6.0])
    head, teacher = build_fgfi(kind), {"p3": full(1.0, 2, 3)}
    uneven, even = (head({"p3": s}, teacher, make_batch((16, 24, box))) for box in ([4, 0, 12, 8], [6, 0, 14, 8]))
    assert values(uneven)["grained"] == pytest.approx(channels * (3**2 + 5**2) / 2 / 2)
    assert values(even)["grained"] == pytest.approx(channels * 5**2 / 2)


def test_an_object_counts_on_one_map_of_a_pyramid():
    """The sizes are 16 and 160 pixels, and the limit between the two maps is 111."""
    batch = make_batch((160, 160, [0, 0, 16, 16], [0, 0, 160, 160]))
    student = {"p3": full(0.0, 20, 20), "p4": full(0.0, 10, 10)}
    teacher = {"p3": full(2.0, 20, 20), "p4": full(6.0, 10, 10)}
    teacher["p3"][..., :2, :2] = 4.0
    pyramid = build_fgfi("pyramid", names=["p3", "p4"])(student, teacher, batch)
    assert values(pyramid)["grained"] == pytest.approx((4**2 / 2 + 6**2 / 2) / 2)
    # on each map both count, and each cell of the maps is as near as any other to the large one
    every = build_fgfi("map", names=["p3", "p4"])(student, teacher, batch)
    assert values(every)["grained"] == pytest.approx(2 * ((4 * 4**2 + 396 * 2**2) / 400 / 2 + 6**2 / 2) / 2)
    small = build_fgfi("pyramid", names=["p3", "p4"])(student, teacher, make_batch((160, 160, [0, 0, 16, 16])))
    assert values(small)["grained"] == pytest.approx(4**2 / 2 / 2)


def test_the_adapter_of_one_map_is_rectified():
    batch, teacher = make_batch((16, 24, [0, 0, 8, 8])), {"p3": full(1.0, 2, 3)}
    for kind, expected in (("map", 2 * 1**2 / 2), ("pyramid", 3**2 / 2)):
        assert values(build_fgfi(kind)({"p3": full(-2.0, 2, 3)}, teacher, batch))["grained"] == pytest.approx(expected)


def test_without_objects_nothing_is_compared():
    s = full(1.0, 2, 3).requires_grad_()
    (loss,) = build_fgfi("pyramid")({"p3": s}, {"p3": full(9.0, 2, 3)}, make_batch((16, 24))).values()
    loss.backward()
    assert loss == 0
    assert not s.grad.any()


def test_maps_get_their_anchors_from_the_finest_on():
    anchors = {"MODEL.ANCHOR_GENERATOR.SIZES": [[8], [16], [32]], "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [[1.0]]}
    names = "KD.FINE_GRAINED.IN_FEATURES"
    head = build_from_config("FineGrainedHead", DETECTOR, anchors | {names: ["p4", "p2", "p3"]})
    assert head.signals == ("p2", "p3", "p4")
    assert [x.tolist() for x in head.anchor_generator.cell_anchors] == [[[-x, -x, x, x]] for x in (4.0, 8.0, 16.0)]
    assert list(head.anchor_generator.strides) == [4, 8, 16]
    told = (
        r"^KD.FINE_GRAINED.IN_FEATURES: must name 3 maps, as many as MODEL.ANCHOR_GENERATOR.SIZES has lists, got p4, "
    )
    with pytest.raises(InputError, match=told):
        build_from_config("FineGrainedHead", DETECTOR, anchors | {names: ["p4", "p2"]})


# ---- DeFeat ----
def build_defeat(*, names=("p3",), **options):
    both = spec(2, names=names)
    return without_adapters(DecoupledFeatureHead(student_spec=both, teacher_spec=both, **options))


def test_objects_and_background_are_compared_apart():
    """The object covers 2 cells: columns 1 and 2 of the first row, the far edges not included."""
    s, t = full(0.0, 2, 4), full(2.0, 2, 4)
    t[..., 0, 1:3] = 6.0
    losses = values(build_defeat()({"p3": s}, {"p3": t}, make_batch((16, 32, [8, 0, 24, 8]))))
    assert losses == pytest.approx({"foreground": 3 * 6**2 / 2, "background": 12 * 2**2 / 2})
    factors = {"foreground_weight": 5.0, "background_weight": 7.0}
    losses = values(build_defeat(**factors)({"p3": s}, {"p3": t}, make_batch((16, 32, [8, 0, 24, 8]))))
    assert losses == pytest.approx({"foreground": 5 * 6**2 / 2, "background": 7 * 2**2 / 2})


def test_maps_without_objects_count_in_the_mean():
    student = {"p3": full(0.0, 20, 20), "p4": full(0.0, 10, 10)}
    teacher = {"p3": full(2.0, 20, 20), "p4": full(4.0, 10, 10)}
    head = build_defeat(names=["p3", "p4"])
    small = values(head(student, teacher, make_batch((160, 160, [0, 0, 16, 16]))))
    assert small == pytest.approx({"foreground": 3 * 2**2 / 2 / 2, "background": 12 * (2**2 / 2 + 4**2 / 2) / 2})
    large = values(head(student, teacher, make_batch((160, 160, [0, 0, 160, 160]))))
    assert large == pytest.approx({"foreground": 3 * 4**2 / 2 / 2, "background": 12 * 2**2 / 2 / 2})


@pytest.mark.parametrize("head", [build_defeat(), build_fgfi("pyramid")])
def test_masked_padding_is_in_no_region(head):
    """The object reaches into the last column, which is padding."""
    s, t = full(0.0, 2, 4), full(2.0, 2, 4)
    size = (16, 24, [8, 0, 32, 16])
    before = values(head({"p3": s}, {"p3": t}, make_batch(size, mask_padding=True)))
    t[..., 3] = 100.0
    assert values(head({"p3": s}, {"p3": t}, make_batch(size, mask_padding=True))) == before
    assert values(head({"p3": s}, {"p3": t}, make_batch(size))) != before


# ---- What they share ----
def test_convolutions_begin_near_zero():
    torch.manual_seed(0)
    weight = build_faint_conv(32, 64).weight
    assert weight.shape == (64, 32, 3, 3)
    assert 1.9e-4 < weight.abs().max() < 2e-4
    # 0.9 is the deviation of the remainder by 2 of a normal number
    assert weight.std().item() == pytest.approx(0.9e-4, rel=0.05)


def test_boxes_of_objects_by_image():
    batch = make_batch((32, 32, [1, 2, 3, 4], [5, 6, 7, 8]), (32, 32), (32, 32, [9, 10, 11, 12]))
    boxes = object_boxes("HeadOfATest", batch, torch.zeros(1, dtype=torch.float16))
    assert [x.tolist() for x in boxes] == [[[1, 2, 3, 4], [5, 6, 7, 8]], [], [[9, 10, 11, 12]]]
    assert [x.dtype for x in boxes] == [torch.float32] * 3


@pytest.mark.parametrize("without", [{}, {"instances": make_input(8, 8)["instances"][0:0]}])
def test_images_without_boxes_are_an_error(without):
    x = {"image": torch.zeros(3, 8, 8), "file_name": "a/b.jpg"} | without
    if without:
        x["instances"].remove("gt_boxes")
    told = r"^KD.HEADS: FocalGlobalHead needs the boxes of objects, but a/b.jpg comes without instances\.$"
    with pytest.raises(InputError, match=told):
        build_fgd()({"p3": full(0.0, 1, 1)}, {"p3": full(0.0, 1, 1)}, Batch.from_inputs([x]))


@pytest.mark.parametrize("name", OF_REGIONS)
def test_image_classifiers_are_an_error(name):
    classifier = {key: shape for key, shape in make_spec(6).items() if key in ("res3", "res4", "pooled", "logits")}
    told = f"^KD.HEADS: {name} needs the boxes of objects, which images of a classifier do not have"
    with pytest.raises(InputError, match=told):
        build_from_config(name, classifier)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [("FocalGlobalHead", "FOCAL_GLOBAL.SCALE", "mean"), ("FineGrainedHead", "FINE_GRAINED.KIND", "fpn")],
)
def test_unknown_options_are_an_error(name, key, value):
    with pytest.raises(InputError, match=f"^KD.{key}: '{value}' is not one of "):
        build_from_config(name, DETECTOR, {f"KD.{key}": value})


def test_a_detector_trains_with_all_of_them(teacher, inputs):
    model = build(distilled_cfg(teacher, [*OF_REGIONS, "InstanceGraphHead"]))
    losses = {key: loss for key, loss in step(model, inputs).items() if key.startswith("loss_kd_")}
    assert len(losses) == 4 + 1 + 2 + 3
    assert all(loss.isfinite() and loss > 0 for loss in losses.values())
    sum(losses.values()).backward()
    assert [name for name, p in model.heads.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("objects", [0, 2])
@pytest.mark.parametrize("family", ["mask_rcnn", "retinanet"])
def test_images_of_one_pixel(tmp_path, family, objects):
    """Such as INPUT.MIN_SIZE_TRAIN 1 gives; the last map has a single cell."""
    options = {"MODEL.RESNETS.NORM": "FrozenBN", "INPUT.MIN_SIZE_TRAIN": [1]}
    teacher = save_teacher(tmp_path, tiny_cfg(family, options))
    heads = [*OF_REGIONS, "PearsonHead", "ChannelWiseHead", "MaskedGenerationHead"]
    model = build(distilled_cfg(teacher, heads, options, family))
    (image,) = tiny_inputs([(64, 96)])
    instances = Instances((1, 1), **{name: x[:objects] for name, x in image["instances"].get_fields().items()})
    instances.gt_boxes.scale(1 / 96, 1 / 64)
    instances.gt_masks = PolygonMasks([[polygon / 96 for polygon in mask] for mask in instances.gt_masks.polygons])
    losses = step(model, [image | {"image": image["image"][:, :1, :1], "instances": instances}])
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
