"""A teacher that is not the student's twin: its signals come with the student's level names, on its boxes and grids."""

import copy
import re

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from detectron2.modeling.meta_arch.fcos import FCOS, FCOSHead
from detectron2.structures import ImageList
from helpers import LEVELS, WIDE, build, distilled_cfg, save_teacher, step, tiny_cfg, tiny_inputs
from torch import nn

from kd_det import InputError, Teacher
from kd_det.alignment import resample
from kd_det.taps import FCOSTap, build_tap
from kd_det.teacher import check_square

SIZES = ((50, 70), (41, 66))


class Coordinates(Backbone):
    """Its maps hold the place of the centre of each cell in the image that it gets, in pixels: (y, x)."""

    def __init__(self, strides, *, divisor=0, square=0):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.strides, self.divisor, self.square = strides, divisor, square

    size_divisibility = property(lambda self: self.divisor)
    padding_constraints = property(lambda self: {"square_size": self.square})

    def output_shape(self):
        return {name: ShapeSpec(channels=2, stride=stride) for name, stride in self.strides.items()}

    def forward(self, x):
        maps = {}
        for name, stride in self.strides.items():
            places = [(torch.arange(-(-n // stride)) + 0.5) * stride for n in x.shape[-2:]]
            maps[name] = torch.stack(torch.meshgrid(*places, indexing="ij")).expand(len(x), -1, -1, -1) * self.weight
        return maps


class Places(nn.Module):
    def __init__(self, strides, **padding):
        super().__init__()
        self.backbone = Coordinates(strides, **padding)

    def preprocess_image(self, batched_inputs):
        backbone = self.backbone
        return ImageList.from_tensors(
            [x["image"] for x in batched_inputs],
            backbone.size_divisibility,
            padding_constraints=backbone.padding_constraints,
        )


def aligned(student, teacher, names, **options):
    """What the teacher gives a student for a batch of two images, and what the student itself has."""
    tap, other = build_tap(student), Teacher(teacher, **options)
    other.align_with(tap)
    inputs = tiny_inputs(SIZES)
    found = other.finish(other.start(inputs, names), names, {})
    assert all(torch.equal(found[name], x) for name, x in other(inputs, names, {}).items())
    with tap.record(names) as own:
        student.backbone(student.preprocess_image(inputs).tensor)
    return found, own, other


def inner(x):
    """Cells whose neighbours are in the map of a teacher of every kind tested here."""
    return x[..., 1:-1, 1:-1]


# ---- Grids: the map of places, which is linear, keeps its values ----
@pytest.mark.parametrize(
    ("student", "teacher", "scale"),
    [
        ({"p3": 8}, {"p3": 8}, 2.0),
        ({"p3": 8}, {"p3": 16}, 2.0),
        ({"p3": 8}, {"p3": 16}, 1.0),
        ({"p3": 8}, {"p3": 4}, 1.0),
        ({"p3": 8}, {"p3": 14}, 1.0),
        ({"p3": 16}, {"p3": 4}, 1.5),
        ({"p3": 8}, {"p3": 8}, 0.5),
        ({"p3": 8}, {"p3": 8}, 1.5),
    ],
)
@pytest.mark.parametrize("padding", [{}, {"divisor": 32}, {"square": 160}])
def test_each_cell_gets_the_value_at_its_centre(student, teacher, scale, padding):
    found, own, other = aligned(Places(student, divisor=16), Places(teacher, **padding), ["p3"], scale=scale)
    assert found["p3"].shape == own["p3"].shape
    assert other.spec()["p3"].stride == student["p3"]
    # The place in the enlarged image, whose size is a whole number of pixels.
    factors = torch.tensor([[round(n * scale) / n for n in size] for size in SIZES])[..., None, None]
    torch.testing.assert_close(inner(found["p3"]), inner(own["p3"] * factors), rtol=1e-5, atol=1e-4)


def test_an_enlarged_image_whose_cells_agree_is_only_cut():
    """Stride 16 in an image of twice the size is stride 8 in the image itself."""
    found, own, other = aligned(Places({"p3": 8}), Places({"p4": 16}), ["p3"], scale=2.0, features={"p3": "p4"})
    assert torch.equal(found["p3"], 2 * own["p3"])
    assert other.alignment.describe(["p3"]) == (
        "The teacher is aligned with the student: images x 2; p3: the teacher's p4."
    )


def test_the_average_of_the_cells_that_a_cell_covers():
    x = torch.arange(24.0).view(1, 1, 4, 6)
    ratios = torch.tensor([[2.0, 3.0]])
    assert torch.equal(resample(x, ratios, (2, 2)), x.view(1, 1, 2, 2, 2, 3).mean(dim=(3, 5)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_resampling_keeps_the_type(dtype):
    assert resample(torch.ones(2, 3, 4, 4, dtype=dtype), torch.full((2, 2), 0.5), (8, 8)).dtype == dtype


# ---- Twins ----
def test_a_twin_gives_what_it_gives_alone():
    """Its signals are bit for bit those of its tap, and the student's padding is left to it."""
    student, other = build(tiny_cfg()), Teacher(build(tiny_cfg(), seed=1))
    other.align_with(build_tap(student))
    assert other.alignment.is_identity
    assert other.spec() == other.tap.spec()
    assert other.alignment.describe(other.spec()) == ""
    names, inputs = {"p2", "res4_preact", "rpn_logits", "roi_logits", "mask_logits"}, tiny_inputs(SIZES)
    with build_tap(student).record(names) as signals:
        step(student, inputs)
    expected = other.tap.compute(inputs, names, signals)
    found = other(inputs, names, signals)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in names)


def test_names_are_mapped_with_what_belongs_to_them():
    student, other = build(tiny_cfg()), Teacher(build(tiny_cfg(), seed=1), features={"p2": "res2", "res4": "p4"})
    other.align_with(build_tap(student))
    assert (other.spec()["p2"], other.spec()["p2_preact"]) == (
        other.tap.spec()["res2"],
        other.tap.spec()["res2_preact"],
    )
    assert "res4_preact" not in other.spec()  # p4 has no ReLU at its end.
    inputs = tiny_inputs(SIZES)
    own = other.tap.compute(inputs, {"res2", "p4", "p2"}, {})
    found = other(inputs, {"p2", "res4"}, {})
    assert torch.equal(found["p2"], own["res2"])
    assert torch.equal(found["res4"], own["p4"])


# ---- Padding ----
def padded_differently(model, *, square=0, divisor=None):
    """A copy of an R-CNN whose images are padded to a square, or to multiples of another number."""
    model = copy.deepcopy(model)
    backbone = model.backbone
    constraints = {"square_size": square} | ({} if divisor is None else {"size_divisibility": divisor})
    backbone.__class__ = type("Padded", (type(backbone),), {"padding_constraints": constraints})
    return model


class Patches(Backbone):
    """One convolution per level that sees nothing but the pixels of its cell, so that padding stays zero."""

    def __init__(self, shapes):
        super().__init__()
        self.shapes = {name: shapes[name] for name in LEVELS}
        self.levels = nn.ModuleDict(
            {name: nn.Conv2d(3, x.channels, x.stride, x.stride, bias=False) for name, x in self.shapes.items()}
        )

    size_divisibility = 32

    def output_shape(self):
        return self.shapes

    def forward(self, x):
        return {name: level(x) for name, level in self.levels.items()}


PADDINGS = [{"square": 128}, {"divisor": 64}]


@pytest.mark.parametrize("padding", PADDINGS)
def test_predictions_of_a_teacher_that_pads_to_a_square_are_those_of_the_same_teacher_without(padding):
    teacher, student = build(tiny_cfg(options=WIDE), seed=1).eval(), build(tiny_cfg())
    teacher.backbone = Patches(teacher.backbone.output_shape())
    names = {"p2", "p5", "rpn_logits", "rpn_deltas", "roi_features", "roi_logits", "roi_deltas", "mask_logits"}
    inputs = tiny_inputs(SIZES)
    with build_tap(student).record(names) as signals:
        step(student, inputs)
    twin, other = Teacher(copy.deepcopy(teacher)), Teacher(padded_differently(teacher, **padding))
    for x in (twin, other):
        x.align_with(build_tap(student))
        x.check(names)
    expected = twin(inputs, names, signals)
    for found in (other(inputs, names, signals), other.finish(other.start(inputs, names), names, signals)):
        assert found.keys() == expected.keys() == names
        for name in names:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-4)
    assert other.tap.extent is None


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("retinanet", {"dense_logits", "dense_deltas", "dense_cls_hidden_p3", "res4_preact"}),
        ("panoptic", {"sem_seg_logits", "rpn_logits", "p6"}),
    ],
)
def test_what_is_computed_in_the_padding_is_cut_off(family, names, padding):
    """The values are those of the padded teacher, level by level."""
    student, other = build(tiny_cfg(family)), Teacher(padded_differently(build(tiny_cfg(family), seed=1), **padding))
    other.align_with(build_tap(student))
    other.check(names)
    inputs = tiny_inputs(SIZES)
    with build_tap(student).record(names) as signals:
        step(student, inputs)
    found, raw = other(inputs, names, {}), other.tap.compute(inputs, names, {})
    model, sides = other.model, raw.get("res4_preact", raw.get("sem_seg_logits")).shape[-2:]
    for name, x in found.items():
        assert x.shape[:2] + x.shape[3:] == signals[name].shape[:2] + signals[name].shape[3:]
        if x.dim() == 4:
            assert torch.equal(x, raw[name][..., : x.shape[2], : x.shape[3]])
            continue
        assert x.shape[1] < raw[name].shape[1]
        generator = model.anchor_generator if family == "retinanet" else model.proposal_generator.anchor_generator
        assert set(generator.num_anchors) == {1}
        # The side of the finest map times its stride is that of the padded batch.
        height, width = (n * (16 if family == "retinanet" else 4) for n in sides)
        place, parts = 0, []
        for stride in generator.strides:
            rows, columns = -(-height // stride), -(-width // stride)
            level = raw[name][:, place : place + rows * columns].unflatten(1, (rows, columns))
            parts.append(level[:, : -(-64 // stride), : -(-96 // stride)].flatten(1, 2))
            place += rows * columns
        assert torch.equal(x, torch.cat(parts, dim=1))


def test_a_teacher_that_pads_less_than_its_student():
    found, own, _ = aligned(Places({"p3": 8}, divisor=64), Places({"p3": 8}), ["p3"])
    assert torch.equal(found["p3"], own["p3"])


def test_boxes_alone_leave_the_padding_as_it_is():
    student, teacher = build(tiny_cfg()), build(tiny_cfg(), seed=1)
    other = Teacher(padded_differently(teacher, divisor=1))
    other.align_with(build_tap(student))
    assert other.alignment.view(tiny_inputs(SIZES), {"roi_logits"}).own_extent is None
    assert other.alignment.view(tiny_inputs(SIZES), {"roi_logits", "p2"}).own_extent == (64, 96)


# ---- Enlarged images ----
def test_boxes_are_enlarged_with_the_images():
    """Boxes in an image of twice the size pool the same features that their doubles pool in that image."""
    student, teacher = build(tiny_cfg()), build(tiny_cfg(options=WIDE), seed=1).eval()
    inputs, names = tiny_inputs(), {"roi_logits", "mask_logits", "p2"}
    with build_tap(student).record(names) as signals:
        step(student, inputs)
    other = Teacher(teacher, scale=2.0)
    other.align_with(build_tap(student))
    found = other(inputs, names, signals)
    large = [
        {"image": nn.functional.interpolate(x["image"][None].float(), scale_factor=2, mode="bilinear")[0]}
        for x in inputs
    ]
    doubled = {name: signals[name] * torch.tensor([1.0, 2, 2, 2, 2]) for name in ("roi_boxes", "mask_boxes")}
    expected = other.tap.compute(large, names, doubled)
    for name in ("roi_logits", "mask_logits"):
        torch.testing.assert_close(found[name], expected[name])
    torch.testing.assert_close(found["p2"], nn.functional.avg_pool2d(expected["p2"], 2))


def test_a_run_with_a_teacher_at_another_scale(teacher):
    options = {"KD.TEACHER.SCALE": 1.5, "KD.TEACHER.FEATURES": {"p3": "res3"}}
    model = build(distilled_cfg(teacher, ["HintHead", "SoftTargetHead"], options))
    losses = step(model, tiny_inputs(SIZES))
    assert all(x.isfinite() for x in losses.values())
    assert not model.shares_images
    assert "images x 1.5" in model.describe(distilled_cfg(teacher, []))[1]


def test_a_run_with_a_teacher_of_another_stride(tmp_path):
    """A dilated res5 has the stride of res4."""
    both = {"MODEL.RESNETS.OUT_FEATURES": ["res4", "res5"]}
    named = save_teacher(tmp_path, tiny_cfg("c4", both | {"MODEL.RESNETS.RES5_DILATION": 2}))
    options = both | {"KD.HINT.IN_FEATURES": ["res5"]}
    model = build(distilled_cfg(named, ["HintHead"], options, family="c4"))
    assert step(model, tiny_inputs(SIZES))["loss_kd_hint"].isfinite()
    assert "res5: resampled from stride 16" in model.describe(distilled_cfg(named, []))[1]


# ---- FCOS ----
def fcos(classes=3, seed=0):
    torch.manual_seed(seed)
    backbone = build(tiny_cfg("retinanet")).backbone
    shapes = [backbone.output_shape()[name] for name in LEVELS]
    return FCOS(
        backbone=backbone,
        head=FCOSHead(input_shape=shapes, conv_dims=[16], num_classes=classes),
        head_in_features=LEVELS,
        num_classes=classes,
        pixel_mean=[0.0, 0.0, 0.0],
        pixel_std=[1.0, 1.0, 1.0],
    )


def test_fcos_has_a_tap():
    student, other = fcos(), Teacher(fcos(seed=1))
    assert type(build_tap(student)) is type(other.tap) is FCOSTap
    names, inputs = {"dense_logits", "dense_distances", "dense_centerness"}, tiny_inputs()
    assert names <= other.spec().keys()
    assert not any("deltas" in name or "hidden" in name for name in other.spec())
    with build_tap(student).record(names) as signals:
        step(student, inputs)
    found = other(inputs, names, signals)
    anchors = signals["dense_anchors"]
    assert signals["dense_labels"].shape == (2, len(anchors)) == found["dense_logits"].shape[:2]
    assert [found[name].shape[2] for name in ("dense_logits", "dense_distances", "dense_centerness")] == [3, 4, 1]
    logits, _, centerness = other.model.head(
        [other.model.backbone(other.model.preprocess_image(inputs).tensor)[name] for name in LEVELS]
    )
    assert torch.equal(found["dense_logits"][:, :3], logits[0].flatten(2).mT[:, :3])
    assert torch.equal(found["dense_centerness"][:, -1], centerness[-1][:, :, -1, -1])


def test_fcos_teaches_a_retinanet_with_its_anchors():
    options = {"MODEL.ANCHOR_GENERATOR.SIZES": [[4], [8], [16], [32]], "MODEL.ANCHOR_GENERATOR.OFFSET": 0.5}
    taps = [build_tap(build(tiny_cfg("retinanet", options))), build_tap(fcos())]
    taps[0].check_alignment(taps[1], {"dense_logits"})
    options["MODEL.ANCHOR_GENERATOR.OFFSET"] = 0.0
    with pytest.raises(InputError, match=r"^MODEL.ANCHOR_GENERATOR: .*, offsets 0.0 and 0.5\.$"):
        build_tap(build(tiny_cfg("retinanet", options))).check_alignment(taps[1], {"dense_logits"})


# ---- What is refused ----
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"FEATURES": {"p9": "p2"}}, "KD.TEACHER.FEATURES: 'p9' is not a feature map of the student, which has res2, "),
        (
            {"FEATURES": {"p2": "p9"}},
            "KD.TEACHER.FEATURES: 'p9' (for p2) is not a feature map of the teacher, which has",
        ),
        ({"FEATURES": {"p2": 3}}, "KD.TEACHER.FEATURES: 3 (for p2) is not a feature map of the teacher, which has"),
        ({"SCALE": 2.0}, "KD.TEACHER.SCALE: must be 1.0 for heads that compare rpn_logits, got 2.0"),
    ],
)
def test_what_cannot_be_aligned(teacher, options, message):
    options = {f"KD.TEACHER.{key}": value for key, value in options.items()} | {"KD.SOFT_TARGET.SOURCES": ["rpn"]}
    with pytest.raises(InputError, match=f"^{re.escape(message)}") as error:
        build(distilled_cfg(teacher, ["SoftTargetHead"], options))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"KD.TEACHER.SCALE": 2.0}, "INPUT.MAX_SIZE_TRAIN: must be at most 64 for .* squares of 128 pixels, got 96"),
        ({"VIS_PERIOD": 5, "INPUT.MAX_SIZE_TEST": 200}, "INPUT.MAX_SIZE_TEST: must be at most 128 for .*, got 200"),
    ],
)
def test_images_that_do_not_fit_into_the_square(options, told):
    cfg = tiny_cfg(options=options)
    with pytest.raises(InputError, match=f"^{told}"):
        check_square(cfg, padded_differently(build(cfg), square=128))
    check_square(tiny_cfg(), padded_differently(build(cfg), square=128))


def test_a_teacher_without_fpn_is_told_which_map_would_help(tmp_path):
    named = save_teacher(tmp_path, tiny_cfg("c4"))
    told = r"'p4' is not a signal of the teacher, .*; KD.TEACHER.FEATURES: \{p4: res4\} would compare it .* stride\.$"
    options = {"KD.HINT.IN_FEATURES": ["p4"]}
    with pytest.raises(InputError, match=told):
        build(distilled_cfg(named, ["HintHead"], options))
    options |= {"KD.TEACHER.FEATURES": {"p4": "res4"}}
    assert "loss_kd_hint" in step(build(distilled_cfg(named, ["HintHead"], options)), tiny_inputs(SIZES))


def test_predictions_that_a_tap_does_not_cut():
    class Unknown(Places):
        pass

    student, other = Unknown({"p3": 8}), Teacher(Unknown({"p3": 8}, square=160))
    other.align_with(build_tap(student))
    with pytest.raises(
        InputError, match=r"^KD.HEADS: the student pads .* squares of 0 and 160 .*dense_logits would not"
    ):
        other.check({"dense_logits"})
