"""Distillation heads, one file per paper."""

from kd_det.heads.attention_transfer import AttentionTransferHead
from kd_det.heads.build import build_kd_heads, check_feature_maps, check_signals
from kd_det.heads.hint import HintHead
from kd_det.heads.review import ReviewKDHead
from kd_det.heads.soft_target import SoftTargetHead

__all__ = [
    "AttentionTransferHead",
    "HintHead",
    "ReviewKDHead",
    "SoftTargetHead",
    "build_kd_heads",
    "check_feature_maps",
    "check_signals",
]
