"""Implements taps, which read the signals of each family of models."""

from kd_det.taps.backbone import BackboneTap, hook, wrap
from kd_det.taps.build import build_tap, find_tap
from kd_det.taps.classes import count_classes, describe_model
from kd_det.taps.classifier import ImageClassifierTap
from kd_det.taps.dense import FCOSTap, RetinaNetTap
from kd_det.taps.foreign import ForeignBackbone
from kd_det.taps.preprocessing import padded_size, padding_of, preprocess_alike, shared_images
from kd_det.taps.rcnn import GeneralizedRCNNTap
from kd_det.taps.segmentation import PanopticFPNTap, SemanticSegmentorTap
from kd_det.taps.timm_features import TimmFeaturesTap

__all__ = [
    "BackboneTap",
    "FCOSTap",
    "ForeignBackbone",
    "GeneralizedRCNNTap",
    "ImageClassifierTap",
    "PanopticFPNTap",
    "RetinaNetTap",
    "SemanticSegmentorTap",
    "TimmFeaturesTap",
    "build_tap",
    "count_classes",
    "describe_model",
    "find_tap",
    "hook",
    "padded_size",
    "padding_of",
    "preprocess_alike",
    "shared_images",
    "wrap",
]
