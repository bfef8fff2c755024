"""Tests the checks of values that Detectron2 would reject late, without naming the key, or misinterpret."""

import re
from pathlib import Path

import pytest
from detectron2 import model_zoo
from helpers import FAMILIES, tiny_cfg

from kd_det import KD_HEAD_REGISTRY, InputError
from kd_det.config import default_config, merge_file, merge_list
from kd_det.config_checks import check_network_values, check_parts, check_run_values


def check(key, value, family="mask_rcnn", **options):
    cfg = tiny_cfg(family, options)
    *parents, last = key.split(".")
    node = cfg
    for parent in parents:
        node = node[parent]
    node[last] = value
    check_parts(cfg, "the config")
    check_run_values(cfg)


def assert_refused(message, function, *arguments):
    with pytest.raises(InputError, match=re.escape(message)) as error:
        function(*arguments)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000


# ---- Kinds ----
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("KD: {HINT: {SCHEDULE: {START: null}}}", "KD.HINT.SCHEDULE.START: must be a whole number, got None."),
        ("KD: {GENERATIONS: null}", "KD.GENERATIONS: must be a whole number, got None."),
        ("KD: {SOFT_TARGET: {WEIGHT: null}}", "KD.SOFT_TARGET.WEIGHT: must be a number, got None."),
        ("KD: {TEACHER: {CHANNELS_LAST: null}}", "KD.TEACHER.CHANNELS_LAST: must be True or False, got None."),
        ("DATASETS: {TRAIN: null}", "DATASETS.TRAIN: must be a list, got None."),
        ("OUTPUT_DIR: null", "OUTPUT_DIR: must be text, got None."),
        ("KD: {HINT: {IN_FEATURES: [[]]}}", "KD.HINT.IN_FEATURES: each element: must be text, got []."),
        ("KD: {HEADS: [1]}", "KD.HEADS: each element: must be text, got 1."),
        ("KD: {MUTUAL: {PEERS: [null]}}", "KD.MUTUAL.PEERS: each element: must be text, got None."),
        ("KD: {PRETRAIN: {STEPS: [[]]}}", "KD.PRETRAIN.STEPS: each element: must be a number, got []."),
        ("MODEL: {PIXEL_MEAN: [a, b, c]}", "MODEL.PIXEL_MEAN: each element: must be a number, got 'a'."),
        ("MODEL: {FPN: {IN_FEATURES: [null]}}", "MODEL.FPN.IN_FEATURES: each element: must be text, got None."),
        ("MODEL: {ANCHOR_GENERATOR: {SIZES: [[8], 16]}}", "each element: must be a list, got 16."),
        ("MODEL: {RESNETS: {DEFORM_ON_PER_STAGE: [0, 1]}}", "each element: must be True or False, got 0."),
        ("SOLVER: {WEIGHT_DECAY_BIAS: heavy}", "SOLVER.WEIGHT_DECAY_BIAS: must be a number, got 'heavy'."),
        ('OUTPUT_DIR: "a\\0b"', "OUTPUT_DIR: has characters that no name and no path has"),
        ("INPUT: {MASK_FORMAT: [" + "x, " * 9999 + "]}", "Type mismatch"),
    ],
)
def test_kinds_follow_from_the_defaults(tmp_path, text, message):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    assert_refused(message, merge_file, default_config(), str(path))


@pytest.mark.parametrize(
    ("key", "value"), [("KD.GENERATIONS", "None"), ("KD.HEADS", "[1]"), ("SOLVER.STEPS", "('a',)"), ("SEED", "None")]
)
def test_kinds_of_overrides(key, value):
    assert_refused(f"command line: {key}: ", merge_list, default_config(), [key, value], "command line")


def test_values_may_be_none_or_either_kind_of_number_where_detectron2_allows_it(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(
        "SOLVER: {WEIGHT_DECAY_BIAS: 0.1, STEPS: [1, 2.5]}\n"
        "MODEL: {ANCHOR_GENERATOR: {SIZES: [32, 64.5]}, PIXEL_STD: [1, 1, 1]}\n"
    )
    cfg = default_config()
    merge_file(cfg, str(path))
    merge_list(cfg, ["SOLVER.WEIGHT_DECAY_BIAS", "None"], "K")
    check_run_values(cfg)


# ---- Bounds ----
@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("KD.FACTOR_TRANSFER.FACTOR_RATE", float("nan"), "must be finite and above 0, got nan."),
        ("KD.INHERIT_EXPLORE.FACTOR_RATE", float("inf"), "must be finite and above 0, got inf."),
        ("KD.ATTENTION_TRANSFER.POWER", 10**30, "must be at most 100, got 1000000000000000000000000000000."),
        ("KD.PRETRAIN.BASE_LR", -0.1, "must be finite and above 0, got -0.1."),
        ("KD.PRETRAIN.MAX_ITER", -1, "must be 0 or more, got -1."),
        ("KD.REVIEW.MID_CHANNELS", 0, "must be 1 or more, got 0."),
        ("KD.SOFT_TARGET.BACKGROUND_WEIGHT", -1.0, "must be finite and 0 or more, got -1.0."),
        ("KD.HINT.SCHEDULE.STOP", -(10**9), "must be -1 or more, got -1000000000."),
        ("SOLVER.MAX_ITER", 0, "must be 1 or more, got 0."),
        ("SOLVER.CHECKPOINT_PERIOD", 0, "must be 1 or more, got 0."),
        ("SOLVER.BASE_LR", 0.0, "must be finite and above 0, got 0.0."),
        ("SOLVER.MOMENTUM", -1.0, "must be finite and 0 or more, got -1.0."),
        ("SOLVER.WEIGHT_DECAY", float("-inf"), "must be finite and 0 or more, got -inf."),
        ("SOLVER.WEIGHT_DECAY", 1e308, "must be at most 1000, got 1e+308."),
        ("SOLVER.GAMMA", -1.0, "must be finite and 0 or more, got -1.0."),
        ("SOLVER.GAMMA", 1e308, "must be at most 1000, got 1e+308."),
        ("SOLVER.WARMUP_ITERS", -1, "must be 0 or more, got -1."),
        ("SOLVER.STEPS", (-1,), "must be 0 or more, got (-1,)."),
        ("SOLVER.STEPS", (9, 3), "must be in increasing order, got [9, 3]."),
        ("SOLVER.IMS_PER_BATCH", 0, "must be 1 or more, got 0."),
        ("SOLVER.IMS_PER_BATCH", 10**9, "must be at most 65536, got 1000000000."),
        ("SOLVER.CLIP_GRADIENTS.NORM_TYPE", -2.0, "must be finite and above 0, got -2.0."),
        ("DATALOADER.NUM_WORKERS", -1, "must be 0 or more, got -1."),
        ("DATALOADER.NUM_WORKERS", 10**9, "must be at most 1024, got 1000000000."),
        ("TEST.EVAL_PERIOD", -(10**9), "must be 0 or more, got -1000000000."),
        ("VIS_PERIOD", -1, "must be 0 or more, got -1."),
        ("SEED", 2**63, f"must be at most {2**32 - 2**16}, got {2**63}."),
        ("INPUT.MAX_SIZE_TRAIN", 1, "must be 2 or more, got 1."),
        ("INPUT.MAX_SIZE_TEST", 0, "must be 1 or more, got 0."),
        ("INPUT.MIN_SIZE_TRAIN", (float("nan"),), "must be finite and 0 or more, got (nan,)."),
        ("MODEL.ROI_HEADS.NUM_CLASSES", 10**12, "must be at most 1000000, got 1000000000000."),
        ("MODEL.BACKBONE.FREEZE_AT", -(10**9), "must be -1 or more, got -1000000000."),
        ("MODEL.PIXEL_STD", [1.0, 0.0, 1.0], "must be finite and above 0, got [1.0, 0.0, 1.0]."),
        ("MODEL.RPN.IOU_LABELS", [0, 2], "must be at most 1, got [0, 2]."),
        ("MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 0, "must be 1 or more, got 0."),
        ("MODEL.ANCHOR_GENERATOR.SIZES", [[0]], "must be above 0, got [[0]]."),
        ("VERSION", 99, "must be 2, got 99."),
    ],
)
def test_numbers_out_of_bounds_are_refused(key, value, message):
    assert_refused(f"{key}: {message}", check, key, value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("SEED", -5),
        ("KD.HINT.SCHEDULE.STOP", -1),
        ("MODEL.BACKBONE.FREEZE_AT", -1),
        ("MODEL.RPN.BOUNDARY_THRESH", -1),
        ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", -1.0),
        ("SOLVER.CLIP_GRADIENTS.NORM_TYPE", float("inf")),
        ("TEST.DETECTIONS_PER_IMAGE", -1),
        ("INPUT.MIN_SIZE_TEST", 0),
        ("INPUT.MAX_SIZE_TEST", 999999),
        ("SOLVER.BASE_LR", 1e30),
    ],
)
def test_values_that_detectron2_allows_pass(key, value):
    check(key, value)


# ---- Names ----
@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("MODEL.ROI_HEADS.NAME", "PointRendROIHeads", "is 'PointRendROIHeads', which nothing registers"),
        ("MODEL.PROPOSAL_GENERATOR.NAME", "X", "is 'X', which nothing registers"),
        ("MODEL.RPN.HEAD_NAME", "X", "is 'X', which nothing registers"),
        ("MODEL.ANCHOR_GENERATOR.NAME", "X", "is 'X', which nothing registers"),
        ("MODEL.ROI_BOX_HEAD.NAME", "X", "is 'X', which nothing registers"),
        ("MODEL.ROI_MASK_HEAD.NAME", "X", "is 'X', which nothing registers"),
        ("MODEL.PROPOSAL_GENERATOR.NAME", "RRPN", "is 'RRPN', which needs rotated boxes; kd_det supports upright"),
        ("MODEL.ANCHOR_GENERATOR.NAME", "RotatedAnchorGenerator", "is 'RotatedAnchorGenerator', which needs rotated"),
        ("MODEL.ROI_HEADS.NAME", "RROIHeads", "is 'RROIHeads', which needs rotated boxes"),
        ("MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIAlignRotated", ": 'ROIAlignRotated' is not one of ROIAlignV2, ROIAlign"),
        ("MODEL.ROI_BOX_HEAD.POOLER_TYPE", "X", ": 'X' is not one of ROIAlignV2, ROIAlign, ROIPool"),
        ("MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE", "X", ": 'X' is not one of smooth_l1, giou"),
        ("MODEL.RESNETS.NORM", "X", ": 'X' is not one of '', BN, SyncBN, FrozenBN, GN"),
        ("SOLVER.LR_SCHEDULER_NAME", "X", ": 'X' is not one of WarmupMultiStepLR"),
        ("SOLVER.WARMUP_METHOD", "cosine", ": 'cosine' is not one of linear, constant."),
        ("INPUT.RANDOM_FLIP", "both", ": 'both' is not one of horizontal, vertical, none."),
        ("INPUT.MASK_FORMAT", "rle", ": 'rle' is not one of polygon, bitmask."),
        ("INPUT.FORMAT", "rgb", ": 'rgb' is neither one of BGR, YUV-BT.601, RGB, L"),
    ],
)
def test_wrong_names_are_refused(key, value, message):
    assert_refused(key + (message if message.startswith(":") else f" {message}"), check, key, value)


def test_unused_parts_may_have_any_name():
    check("MODEL.ROI_HEADS.NAME", "PointRendROIHeads", "retinanet")
    check("MODEL.ROI_KEYPOINT_HEAD.NAME", "X")
    check("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "full_model")
    check("MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("KD.HINT.IN_FEATURES", ["p2", "p2"]),
        ("KD.SOFT_TARGET.SOURCES", ["roi", "roi"]),
        ("DATASETS.TRAIN", ("own", "own")),
        ("MODEL.RPN.IN_FEATURES", ["p2", "p2"]),
    ],
)
def test_repeated_names_are_refused(key, value):
    assert_refused(f"{key}: {value[0]!r} is named twice", check, key, value)


# ---- What must fit ----
@pytest.mark.parametrize(
    ("key", "value", "options", "message"),
    [
        (
            "SOLVER.CLIP_GRADIENTS.CLIP_TYPE",
            "full_model",
            {"SOLVER.CLIP_GRADIENTS.ENABLED": True},
            "not one of value, norm",
        ),
        ("SOLVER.NESTEROV", True, {"SOLVER.MOMENTUM": 0.0}, "SOLVER.MOMENTUM: must be above 0"),
        (
            "MODEL.PIXEL_MEAN",
            [1.0],
            {},
            "one number for each of the 3 channel(s) of INPUT.FORMAT BGR, got [1.0] ",
        ),
        ("MODEL.ANCHOR_GENERATOR.SIZES", [[8], [16]], {}, "one for each of the 4 features of MODEL.RPN.IN_FEATURES"),
        ("MODEL.RPN.BBOX_REG_WEIGHTS", (1.0,), {}, "must be four numbers"),
        ("MODEL.RPN.BBOX_REG_WEIGHTS", (1.0,) * 5, {}, "must be four numbers, got [1.0, 1.0, 1.0, 1.0, 1.0]."),
        ("MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS", ((1.0,),), {}, "must be four numbers"),
        ("INPUT.MIN_SIZE_TRAIN", (), {}, "INPUT.MIN_SIZE_TRAIN: must be sizes"),
        ("INPUT.MIN_SIZE_TRAIN_SAMPLING", "range", {}, "for a range the least and the greatest, got [64]."),
        ("INPUT.CROP.SIZE", [2.0, 2.0], {"INPUT.CROP.ENABLED": True}, "INPUT.CROP.SIZE: must be two shares above 0"),
        ("INPUT.CROP.SIZE", [0.5], {"INPUT.CROP.ENABLED": True}, "INPUT.CROP.SIZE: must be two shares above 0"),
        (
            "SOLVER.WARMUP_ITERS",
            5,
            {"SOLVER.LR_SCHEDULER_NAME": "WarmupStepWithFixedGammaLR", "SOLVER.MAX_ITER": 5},
            "SOLVER.WARMUP_ITERS: must be below SOLVER.MAX_ITER, 5, for ",
        ),
        (
            "SOLVER.GAMMA",
            0.0,
            {"SOLVER.LR_SCHEDULER_NAME": "WarmupStepWithFixedGammaLR"},
            "SOLVER.GAMMA: must be above 0 for SOLVER.LR_SCHEDULER_NAME WarmupStepWithFixedGammaLR.",
        ),
        (
            "SOLVER.REFERENCE_WORLD_SIZE",
            8,
            {"SOLVER.IMS_PER_BATCH": 12},
            "SOLVER.REFERENCE_WORLD_SIZE: must divide SOLVER.IMS_PER_BATCH, 12, got 8.",
        ),
        ("MODEL.RPN.IOU_THRESHOLDS", [], {}, "in increasing order and one label more, got [] and [0, -1, 1]."),
        ("MODEL.ROI_HEADS.IOU_LABELS", [0], {}, "MODEL.ROI_HEADS.IOU_LABELS: must be overlaps above 0"),
        ("MODEL.RPN.IOU_THRESHOLDS", [0.7, 0.3], {}, "in increasing order"),
        ("TEST.AUG.MIN_SIZES", (), {"TEST.AUG.ENABLED": True}, "TEST.AUG.MIN_SIZES: must name a size where "),
    ],
)
def test_values_that_contradict_each_other_are_refused(key, value, options, message):
    assert_refused(message, lambda: check(key, value, **options))


def test_cropping_polygons_needs_shapely(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check("INPUT.CROP.ENABLED", True, **{"INPUT.MASK_FORMAT": "bitmask"})
    assert_refused("INPUT.CROP.ENABLED: cropping polygons needs the package shapely", check, "INPUT.CROP.ENABLED", True)


# ---- What is legal ----
@pytest.mark.parametrize("family", FAMILIES)
def test_configs_of_the_tests_pass(family):
    check("SEED", 1, family)


def test_every_config_of_the_model_zoo_passes(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: "shapely")
    files = sorted(Path(model_zoo.__file__).parent.glob("configs/*/*.yaml"))
    assert len(files) > 40
    for path in files:
        cfg = default_config()
        merge_file(cfg, str(path))
        check_parts(cfg, path.name)
        check_run_values(cfg)


def test_heads_of_plugins_have_their_own_bounds():
    class ShiftHead:
        config = {"SHIFT": -1.5, "IN_FEATURES": ["p2", "p2"]}  # noqa: RUF012

    KD_HEAD_REGISTRY.register(ShiftHead)
    try:
        cfg = default_config()
        check_run_values(cfg)
    finally:
        KD_HEAD_REGISTRY._obj_map.pop("ShiftHead")


def test_only_the_network_of_a_teacher_is_checked():
    cfg = default_config()
    cfg.SOLVER.GAMMA = -1.0
    check_network_values(cfg, "teacher.yaml")
    cfg.MODEL.PIXEL_STD = [0.0, 1.0, 1.0]
    assert_refused(
        "teacher.yaml: MODEL.PIXEL_STD: must be finite and above 0", check_network_values, cfg, "teacher.yaml"
    )
