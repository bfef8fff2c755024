"""Implements the distillation heads, one file per paper."""

from kd_det.heads.activation_boundary import ActivationBoundaryHead
from kd_det.heads.attention_transfer import AttentionTransferHead
from kd_det.heads.born_again import BornAgainHead
from kd_det.heads.box_target import BoxTargetHead
from kd_det.heads.build import (
    build_kd_heads,
    check_class_counts,
    check_feature_maps,
    check_signals,
    freeze_pretrained,
)
from kd_det.heads.channel_wise import ChannelWiseHead
from kd_det.heads.cross import CrossHead
from kd_det.heads.decoupled_feature import DecoupledFeatureHead
from kd_det.heads.factor_transfer import FactorTransferHead
from kd_det.heads.fine_grained import FineGrainedHead
from kd_det.heads.focal_global import FocalGlobalHead
from kd_det.heads.hint import HintHead
from kd_det.heads.inherit_explore import InheritExploreHead
from kd_det.heads.instance_graph import InstanceGraphHead
from kd_det.heads.masked_generation import MaskedGenerationHead
from kd_det.heads.overhaul import OverhaulHead
from kd_det.heads.pearson import PearsonHead
from kd_det.heads.relation import RelationHead
from kd_det.heads.review import ReviewKDHead
from kd_det.heads.soft_target import SoftTargetHead
from kd_det.heads.softmax_regression import SoftmaxRegressionHead

__all__ = [
    "ActivationBoundaryHead",
    "AttentionTransferHead",
    "BornAgainHead",
    "BoxTargetHead",
    "ChannelWiseHead",
    "CrossHead",
    "DecoupledFeatureHead",
    "FactorTransferHead",
    "FineGrainedHead",
    "FocalGlobalHead",
    "HintHead",
    "InheritExploreHead",
    "InstanceGraphHead",
    "MaskedGenerationHead",
    "OverhaulHead",
    "PearsonHead",
    "RelationHead",
    "ReviewKDHead",
    "SoftTargetHead",
    "SoftmaxRegressionHead",
    "build_kd_heads",
    "check_class_counts",
    "check_feature_maps",
    "check_signals",
    "freeze_pretrained",
]
