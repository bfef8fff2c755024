"""What the tests of all heads try: every registered head of this package, with its defaults and with other options."""

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from torch import nn

from kd_det import KD_HEAD_REGISTRY, build_kd_heads
from kd_det.config import HEAD_KEYS, default_config
from kd_det.heads.build import has_stage
from kd_det.registry import config_key

from .signals import make_spec

STUDENT, TEACHER = make_spec(6), make_spec(32)
# Maps each head to its variants, and these to the options that they change. Every option has a variant.
VARIANTS = {
    "ReviewKDHead": {
        "BN": {"MID_CHANNELS": 8},
        "GN": {"MID_CHANNELS": 32, "NORM": "GN", "IN_FEATURES": ["p3"]},
        "LN": {"MID_CHANNELS": 8, "NORM": "LN", "IN_FEATURES": ["p4", "p5"]},
        "bottom_up": {"MID_CHANNELS": 8, "IN_FEATURES": ["res3", "res5"]},
        "recompute": {"MID_CHANNELS": 8, "RECOMPUTE": True},
        "classifier": {"MID_CHANNELS": 8, "IN_FEATURES": ["res3", "res4", "pooled"], "TEACHER_PREACT": True},
    },
    "AttentionTransferHead": {
        "sum": {},
        "mean": {"REDUCTION": "mean", "POWER": 4},
        "classifier": {"IN_FEATURES": ["res2", "res3", "res4"]},
        "gradient": {"KIND": "gradient"},
    },
    "HintHead": {
        "fpn": {},
        "bottom_up": {"IN_FEATURES": ["res4", "res5"]},
        "rectified": {"IN_FEATURES": ["res4"], "REGRESSOR": "rectified"},
        "SyncBN": {"IN_FEATURES": ["res4"], "REGRESSOR": "rectified", "NORM": "SyncBN"},
        "fpn_in_a_stage": {"STAGES": 2},
        "bottom_up_in_a_stage": {"STAGES": 2, "IN_FEATURES": ["res4"]},
    },
    "PearsonHead": {
        "fpn": {},
        "classifier": {"IN_FEATURES": ["res3", "res4"]},
    },
    "ChannelWiseHead": {
        "fpn": {},
        "classifier": {"IN_FEATURES": ["res4"], "TEMPERATURE": 4.0},
    },
    "MaskedGenerationHead": {
        "fpn": {},
        "classifier": {"IN_FEATURES": ["res4"], "SCALE": "code", "MASK_RATIO": 0.65},
    },
    "FocalGlobalHead": {
        "fpn": {},
        "bottom_up": {"IN_FEATURES": ["res3", "res4"], "SCALE": "code"},
        "weights": {
            "FOREGROUND_WEIGHT": 1e-3,
            "BACKGROUND_WEIGHT": 5e-4,
            "ATTENTION_WEIGHT": 5e-4,
            "RELATION_WEIGHT": 5e-6,
        },
    },
    "FineGrainedHead": {
        # All objects of the batch belong to the first map of a pyramid.
        "pyramid": {"IN_FEATURES": ["p3"]},
        "map": {"IN_FEATURES": ["res4"], "KIND": "map"},
        "maps": {"IN_FEATURES": ["p5", "p4"], "KIND": "map"},
    },
    "DecoupledFeatureHead": {
        "fpn": {},
        "bottom_up": {"IN_FEATURES": ["res4", "res3"], "FOREGROUND_WEIGHT": 1.0, "BACKGROUND_WEIGHT": 2.0},
    },
    "InstanceGraphHead": {
        "default": {},
        "weights": {"FOREGROUND_WEIGHT": 1.0, "BACKGROUND_WEIGHT": 0.25, "EDGE_WEIGHT": 2.0},
    },
    "RelationHead": {
        "rkd": {},
        "sp": {"KIND": "sp", "IN_FEATURE": "roi_features"},
        "cosine": {"KIND": "cosine", "BOXES": 2},
        "weights": {"DISTANCE_WEIGHT": 2.0, "ANGLE_WEIGHT": 4.0},
    },
    "FactorTransferHead": {
        "boxes": {},
        "few_boxes": {"BOXES": 2},
        "BN": {"NORM": "BN", "SCALE": "code", "RECONSTRUCTION": "l2", "FACTOR_RATE": 0.25},
        "fpn": {"IN_FEATURES": ["p3", "p4"]},
        "classifier": {"IN_FEATURES": ["res2"]},
    },
    "InheritExploreHead": {
        "ft": {},
        "at": {"KIND": "at"},
        "at_fpn": {"KIND": "at", "IN_FEATURES": ["p3", "p4", "p5"], "DIVIDE": "random", "SCALE": "code"},
        "l2": {"DISTANCE": "l2", "IN_FEATURES": ["p4"]},
        "cosine": {"DISTANCE": "cosine"},
        "od": {"KIND": "od"},
        "od_fpn": {"KIND": "od", "IN_FEATURES": ["p4"], "SCALE": "code"},
        "few_boxes": {"BOXES": 2, "FACTOR_RATE": 0.25},
        "random": {"DIVIDE": "random", "SCALE": "code", "RECONSTRUCTION": "l1", "IN_FEATURES": ["p3", "p5"]},
        "SyncBN": {"NORM": "SyncBN"},
        "inherit": {"EXPLORE_WEIGHT": 0.0},
        "explore": {"INHERIT_WEIGHT": 0.0, "EXPLORE_WEIGHT": 2.0},
        "random_encoder": {"ENCODER": "random"},
        "noise": {"EXPLORE_TARGET": "noise", "IN_FEATURES": ["p4"]},
        "od_noise": {"EXPLORE_TARGET": "noise", "KIND": "od"},
        "classifier": {"IN_FEATURES": ["res2"]},
    },
    "OverhaulHead": {
        "estimate": {},
        "batch_norm": {"MARGIN": "batch_norm", "SCALE": "code"},
        "GN": {"NORM": "GN"},
        "classifier": {"IN_FEATURES": ["res2", "res3", "res4"], "MARGIN_BATCHES": 1},
    },
    "ActivationBoundaryHead": {
        "default": {},
        "classifier": {"IN_FEATURES": ["res2", "res3", "res4"], "SCALE": "code"},
        "GN": {"NORM": "GN"},
    },
    "SoftTargetHead": {
        "default": {},
        "everything": {"SOURCES": ["roi", "rpn", "mask", "dense"], "TEMPERATURE": 3.0},
        "foreground": {"ROIS": "foreground"},
        "background": {"BACKGROUND_WEIGHT": 1.5},
        "classifier": {"SOURCES": ["cls"], "TEMPERATURE": 4.0},
        "maps": {"SOURCES": ["keypoint", "sem_seg"], "TEMPERATURE": 2.0},
        "channels": {"SOURCES": ["sem_seg"], "SEM_SEG": "channel", "SQUARED_TEMPERATURE": False},
        "shift": {"ADJUST": "probability_shift", "TEMPERATURE": 2.0},
        "smoothing": {"ADJUST": "label_smoothing", "DYNAMIC_TEMPERATURE": "cwsm"},
        "uncertain": {"ADJUST": "label_smoothing", "CORRECT_PROB": 0.8, "DYNAMIC_TEMPERATURE": "flsw", "GAMMA": 1.0},
        "strongly_dynamic": {
            "DYNAMIC_TEMPERATURE": "cwsm",
            "BETA": 2.0,
            "TEMPERATURE": 3.0,
            "SQUARED_TEMPERATURE": False,
        },
        "dynamic": {"DYNAMIC_TEMPERATURE": "flsw", "ROIS": "foreground", "TEMPERATURE": 2.0},
        "dkd": {"DIVERGENCE": "dkd", "TEMPERATURE": 4.0, "OTHER_WEIGHT": 8.0, "BACKGROUND_WEIGHT": 0.5},
        "nkd": {"DIVERGENCE": "nkd", "SOURCES": ["cls"], "OTHER_WEIGHT": 1.5},
        "gdkd": {"DIVERGENCE": "gdkd", "TOP_K": 2, "TARGET_WEIGHT": 2.0, "TOP_WEIGHT": 0.5, "ROIS": "foreground"},
        "dist": {"DIVERGENCE": "dist", "SOURCES": ["roi", "dense"]},
        "focal": {"ANCHORS": "focal", "SOURCES": ["rpn", "dense"]},
        "standardized": {"STANDARDIZE": True, "TEMPERATURE": 2.0, "SOURCES": ["cls"]},
        "classifier_lessons": {"SOURCES": ["cls"], "ADJUST": "label_smoothing", "DYNAMIC_TEMPERATURE": "flsw"},
    },
    "BoxTargetHead": {
        "smooth_l1": {"SOURCES": ["roi", "rpn", "dense"]},
        "giou": {"SOURCES": ["roi", "rpn", "dense"], "KIND": "giou"},
        "bounded": {"KIND": "bounded", "MARGIN": 0.2},
    },
    "CrossHead": {
        "default": {},
        "two_convolutions": {"HIDDEN": 1, "CLASS_WEIGHT": 2.0, "BOX_WEIGHT": 0.5},
        "classes": {"BOX_WEIGHT": 0.0},
        "boxes": {"CLASS_WEIGHT": 0.0},
    },
    "SoftmaxRegressionHead": {
        "BN": {},
        "LN": {"NORM": "LN", "KIND": "ce"},
        "SyncBN": {"NORM": "SyncBN"},
        "soft": {"KIND": "ce", "TEMPERATURE": 4.0, "FEATURE_WEIGHT": 2.0},
        "classifier": {"IN_FEATURE": "res4", "LOGIT_WEIGHT": 5.0},
    },
    "BornAgainHead": {
        "ban": {},
        "cwtm": {"KIND": "cwtm"},
        "dkpp": {"KIND": "dkpp"},
        "classifier": {"SOURCE": "cls", "LABELS": True},
        "classifier_cwtm": {"SOURCE": "cls", "KIND": "cwtm"},
    },
}
# Options with which a head that has the key NORM has such layers, of at least 32 channels.
NORMALISED = {
    "ReviewKDHead": {"MID_CHANNELS": 32},
    "HintHead": {"REGRESSOR": "rectified"},
    "FactorTransferHead": {"FACTOR_RATE": 1.0},
    "InheritExploreHead": {"FACTOR_RATE": 1.0},
}
# Heads that need the boxes of objects, which image classifiers do not have.
OF_DETECTORS = {"FocalGlobalHead", "FineGrainedHead", "DecoupledFeatureHead"}
Specs = dict[str, ShapeSpec]
Case = tuple[str, str, dict]  # A head's name, a variant's, and its options.


def make_cfg(name: str, options: dict) -> CfgNode:
    cfg = default_config()
    cfg.KD.HEADS = [name]
    for key, value in options.items():
        cfg.KD[config_key(name)][key] = value
    return cfg


def build(name: str, options: dict, student: Specs = STUDENT, teacher: Specs = TEACHER) -> nn.Module:
    """Builds a head for networks that are everything in one, unless it is for detectors alone."""
    hidden = {"logits"} if name in OF_DETECTORS else set()
    specs = [{key: shape for key, shape in spec.items() if key not in hidden} for spec in (student, teacher)]
    return build_kd_heads(make_cfg(name, options), *specs)[name]


def make_head(name: str, options: dict, seed: int = 0) -> nn.Module:
    """Builds a head as the stage before a run has it."""
    torch.manual_seed(seed)
    return build(name, options).train()


def each(cases: list[Case]) -> pytest.MarkDecorator:
    """Runs a test with ``name`` and ``options`` of each case."""
    return pytest.mark.parametrize(
        ("name", "options"), [(n, o) for n, _, o in cases], ids=[f"{n}-{v}" for n, v, _ in cases]
    )


def own_options(name: str) -> dict:
    """Returns the options that only this head has, with their defaults."""
    node = default_config().KD[config_key(name)]
    return {key: value for key, value in node.items() if key not in HEAD_KEYS}


NAMES = [name for name, head in KD_HEAD_REGISTRY if head.__module__.startswith("kd_det.")]
ALL_CASES = [(name, variant, options) for name in NAMES for variant, options in VARIANTS.get(name, {"": {}}).items()]
_HEADS = [make_head(name, options) for name, _, options in ALL_CASES]
# Heads that have a loss in the run, those of which a stage trains a part, and those whose work ends with the stage.
CASES = [case for case, head in zip(ALL_CASES, _HEADS, strict=True) if head.signals]
STAGE_CASES = [case for case, head in zip(ALL_CASES, _HEADS, strict=True) if has_stage(head)]
ENDED_CASES = [case for case in STAGE_CASES if case not in CASES]
