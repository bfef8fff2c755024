"""Implements distillation losses as pure functions: tensors in, a scalar out, no weights inside.

The student comes first, the teacher second, and everything else is passed by keyword, but for labels, masks and groups
of classes. Every function computes in float32 or wider, with autocast switched off, and sends no gradient into the
teacher, except `relation_loss`, whose second argument is trained as well. Empty inputs, such as no ROIs, give 0 with a
gradient. Mismatched shapes and options out of range raise ValueError.
"""

from .attention import attention_map, attention_transfer_loss, input_gradient_loss
from .box_regression import bounded_regression_loss, box_overlap_loss, decode_boxes
from .channels import channel_wise_loss, pearson_loss
from .decoupled import between_groups_loss, target_class_loss, within_group_loss
from .factors import exploration_loss, factor_transfer_loss, inheritance_loss
from .features import (
    activation_boundary_loss,
    activation_disagreement,
    feature_matching_loss,
    hierarchical_context_loss,
    hint_loss,
    margin_from_batch_norm,
    masked_generation_loss,
    overhaul_loss,
)
from .instances import edge_loss, node_loss
from .logits import (
    adjust_label_smoothing,
    adjust_probability_shift,
    binary_soft_target_loss,
    born_again_loss,
    confidence_weights,
    dynamic_temperature,
    focal_soft_target_loss,
    mutual_loss,
    permute_dark_knowledge,
    soft_target_loss,
    softmax_regression_loss,
    standardize_logits,
)
from .regions import attention_loss, feature_attention, focal_loss, region_loss, relation_loss
from .relations import angle_relation_loss, correlation_loss, distance_relation_loss, similarity_loss

__all__ = [
    "activation_boundary_loss",
    "activation_disagreement",
    "adjust_label_smoothing",
    "adjust_probability_shift",
    "angle_relation_loss",
    "attention_loss",
    "attention_map",
    "attention_transfer_loss",
    "between_groups_loss",
    "binary_soft_target_loss",
    "born_again_loss",
    "bounded_regression_loss",
    "box_overlap_loss",
    "channel_wise_loss",
    "confidence_weights",
    "correlation_loss",
    "decode_boxes",
    "distance_relation_loss",
    "dynamic_temperature",
    "edge_loss",
    "exploration_loss",
    "factor_transfer_loss",
    "feature_attention",
    "feature_matching_loss",
    "focal_loss",
    "focal_soft_target_loss",
    "hierarchical_context_loss",
    "hint_loss",
    "inheritance_loss",
    "input_gradient_loss",
    "margin_from_batch_norm",
    "masked_generation_loss",
    "mutual_loss",
    "node_loss",
    "overhaul_loss",
    "pearson_loss",
    "permute_dark_knowledge",
    "region_loss",
    "relation_loss",
    "similarity_loss",
    "soft_target_loss",
    "softmax_regression_loss",
    "standardize_logits",
    "target_class_loss",
    "within_group_loss",
]
