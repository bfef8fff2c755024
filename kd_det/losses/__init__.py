"""Implements distillation losses as pure functions: tensors in, a scalar out, no weights inside.

The student comes first, the teacher second, and everything else is passed by keyword. Every function computes in
float32 or wider, with autocast switched off, and sends no gradient into the teacher. Empty inputs, such as no ROIs,
give 0 with a gradient. Mismatched shapes and options out of range raise ValueError.
"""

from .attention import attention_map, attention_transfer_loss, input_gradient_loss
from .factors import exploration_loss, factor_transfer_loss, inheritance_loss
from .features import (
    activation_boundary_loss,
    activation_disagreement,
    feature_matching_loss,
    hierarchical_context_loss,
    hint_loss,
    margin_from_batch_norm,
    overhaul_loss,
)
from .logits import (
    adjust_label_smoothing,
    adjust_probability_shift,
    binary_soft_target_loss,
    born_again_loss,
    confidence_weights,
    dynamic_temperature,
    mutual_loss,
    permute_dark_knowledge,
    soft_target_loss,
    softmax_regression_loss,
)

__all__ = [
    "activation_boundary_loss",
    "activation_disagreement",
    "adjust_label_smoothing",
    "adjust_probability_shift",
    "attention_map",
    "attention_transfer_loss",
    "binary_soft_target_loss",
    "born_again_loss",
    "confidence_weights",
    "dynamic_temperature",
    "exploration_loss",
    "factor_transfer_loss",
    "feature_matching_loss",
    "hierarchical_context_loss",
    "hint_loss",
    "inheritance_loss",
    "input_gradient_loss",
    "margin_from_batch_norm",
    "mutual_loss",
    "overhaul_loss",
    "permute_dark_knowledge",
    "soft_target_loss",
    "softmax_regression_loss",
]
