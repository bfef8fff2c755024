"""Mistakes are told in one line that names what was found and what is allowed."""

import re

import pytest
import torch

from kd_det import losses

A, B, ROWS = torch.zeros(2, 3, 4, 4), torch.zeros(2, 5, 4, 4), torch.ones(2, 3)
BOXES, MASK = torch.ones(2, 4), torch.ones(2, 3, dtype=torch.bool)
SAME_SHAPE = [
    losses.hint_loss,
    losses.hierarchical_context_loss,
    losses.activation_boundary_loss,
    losses.factor_transfer_loss,
    losses.inheritance_loss,
    losses.exploration_loss,
    losses.binary_soft_target_loss,
    losses.mutual_loss,
    losses.softmax_regression_loss,
    losses.born_again_loss,
    lambda s, t: losses.soft_target_loss(s, t, temperature=1.0),
    lambda s, t: losses.overhaul_loss(s, t, margin=torch.zeros(3)),
    losses.channel_wise_loss,
    losses.pearson_loss,
    losses.masked_generation_loss,
    losses.attention_loss,
    losses.relation_loss,
    losses.node_loss,
    lambda s, t: losses.focal_loss(s, t, weight=torch.ones(2, 4, 4)),
    lambda s, t: losses.region_loss(s, t, mask=torch.ones(2, 1, 4, 4, dtype=torch.bool)),
    lambda s, t: losses.focal_soft_target_loss(s, t, normalizer=1.0),
    lambda s, t: losses.box_overlap_loss(s, t, weights=torch.ones(2), normalizer=1.0),
    lambda s, t: losses.bounded_regression_loss(s, t, t),
]


@pytest.mark.parametrize("loss", SAME_SHAPE)
def test_different_shapes(loss):
    message = "_loss: student and teacher must have the same shape, got (2, 3, 4, 4) and (2, 5, 4, 4)"
    with pytest.raises(ValueError, match=re.escape(message)):
        loss(A, B)


MISTAKES = [
    (
        lambda: losses.feature_matching_loss(A, B),
        "feature_matching_loss: student and teacher must have the same shape, got (2, 3) and (2, 5)",
    ),
    (
        lambda: losses.feature_matching_loss(A[0], A[0]),
        "feature_matching_loss: expected a shape (N, C) or (N, C, H, W), got (3, 4, 4)",
    ),
    (lambda: losses.attention_map(ROWS), "attention_map: expected a feature map of shape (N, C, H, W), got (2, 3)"),
    (lambda: losses.attention_map(A, power=0.5), "attention_map: power must be at least 1, got 0.5"),
    (
        lambda: losses.attention_transfer_loss(A, B[:1]),
        "attention_transfer_loss: student and teacher must have the same number of samples, got 2 and 1",
    ),
    (
        lambda: losses.attention_transfer_loss(A, B, reduction="sum"),
        "attention_transfer_loss: reduction must be one of 'mean', 'sum_hw', 'norm', got 'sum'",
    ),
    (
        lambda: losses.inheritance_loss(A, B[..., :2], kind="at"),
        "inheritance_loss: student and teacher must have the same number of samples, height and width, "
        "got (2, 3, 4, 4) and (2, 5, 4, 2)",
    ),
    (
        lambda: losses.exploration_loss(A, A, kind="l2"),
        "exploration_loss: kind must be one of 'at', 'ft', 'od', got 'l2'",
    ),
    (
        lambda: losses.inheritance_loss(A, A, kind="od", cosine=True),
        "inheritance_loss: kind must be one of 'at', 'ft', got 'od'",
    ),
    (lambda: losses.factor_transfer_loss(A, A, p=0.5), "factor_transfer_loss: p must be 1 or more, got 0.5"),
    (
        lambda: losses.hierarchical_context_loss(ROWS, ROWS),
        "hierarchical_context_loss: expected a feature map of shape (N, C, H, W), got (2, 3)",
    ),
    (
        lambda: losses.hint_loss(A, A, mask=torch.ones(2, 4, 4, dtype=torch.bool)),
        "hint_loss: mask must have the shape (2, 1, 4, 4), got (2, 4, 4)",
    ),
    (
        lambda: losses.hint_loss(A, A, mask=torch.ones(2, 1, 4, 4)),
        "hint_loss: mask must be boolean, true where a cell is valid, got torch.float32",
    ),
    (
        lambda: losses.overhaul_loss(A, A, margin=torch.zeros(5)),
        "overhaul_loss: margin must have the shape (3,), got (5,)",
    ),
    (
        lambda: losses.margin_from_batch_norm(torch.ones(3), torch.ones(2)),
        "margin_from_batch_norm: weight and bias must have the same shape (C,), got (3,) and (2,)",
    ),
    (
        lambda: losses.soft_target_loss(ROWS, ROWS, temperature=0),
        "soft_target_loss: temperature must be above 0, got 0",
    ),
    (
        lambda: losses.soft_target_loss(ROWS, ROWS, temperature=torch.ones(3)),
        "soft_target_loss: temperature must have the shape (2,), got (3,)",
    ),
    (
        lambda: losses.soft_target_loss(ROWS, ROWS, temperature=1, weights=torch.ones(7)),
        "soft_target_loss: weights must have the shape (2,), got (7,)",
    ),
    (
        lambda: losses.binary_soft_target_loss(ROWS, ROWS, weights=torch.ones(2)),
        "binary_soft_target_loss: weights must have the shape (2, 3), got (2,)",
    ),
    (
        lambda: losses.softmax_regression_loss(ROWS, ROWS, kind="ce", temperature=0),
        "softmax_regression_loss: temperature must be above 0, got 0",
    ),
    (
        lambda: losses.softmax_regression_loss(ROWS, ROWS, kind="kl"),
        "softmax_regression_loss: kind must be one of 'mse', 'ce', got 'kl'",
    ),
    (lambda: losses.confidence_weights(A), "confidence_weights: expected a tensor of shape (N, K), got (2, 3, 4, 4)"),
    (
        lambda: losses.permute_dark_knowledge(ROWS, permutations=torch.zeros(2, 3, dtype=torch.long)),
        "permute_dark_knowledge: permutations must have the shape (2, 2), got (2, 3)",
    ),
    (
        lambda: losses.permute_dark_knowledge(ROWS, permutations=torch.zeros(2, 2, dtype=torch.long)),
        "permute_dark_knowledge: each row of permutations must hold every class but the most probable one once",
    ),
    (
        lambda: losses.adjust_probability_shift(ROWS, torch.zeros(3, dtype=torch.long)),
        "adjust_probability_shift: labels must have the shape (2,), got (3,)",
    ),
    (
        lambda: losses.adjust_label_smoothing(ROWS, torch.zeros(2, dtype=torch.long), correct_prob=1.5),
        "adjust_label_smoothing: correct_prob must be above 0 and at most 1, got 1.5",
    ),
    (
        lambda: losses.adjust_label_smoothing(ROWS[:, :1], torch.zeros(2, dtype=torch.long)),
        "adjust_label_smoothing: expected two classes or more, got a tensor of shape (2, 1)",
    ),
    (
        lambda: losses.dynamic_temperature(ROWS, ROWS, kind="ls", base=4, beta=1),
        "dynamic_temperature: kind must be one of 'flsw', 'cwsm', got 'ls'",
    ),
    (
        lambda: losses.dynamic_temperature(ROWS, ROWS, base=4, beta=1, bounds=(5, 2)),
        "dynamic_temperature: bounds must be above 0 and in increasing order, got (5, 2)",
    ),
    (
        lambda: losses.within_group_loss(ROWS, ROWS[:1], MASK, temperature=1.0),
        "within_group_loss: student and teacher must have the same shape, got (2, 3) and (1, 3)",
    ),
    (
        lambda: losses.within_group_loss(ROWS, ROWS, ROWS, temperature=1.0),
        "within_group_loss: mask must be boolean, true for the classes of the group, got torch.float32",
    ),
    (
        lambda: losses.within_group_loss(ROWS, ROWS, MASK[:1], temperature=1.0),
        "within_group_loss: mask must have the shape (2, 3), got (1, 3)",
    ),
    (
        lambda: losses.within_group_loss(ROWS, ROWS, MASK, temperature=0),
        "within_group_loss: temperature must be above 0, got 0",
    ),
    (
        lambda: losses.between_groups_loss(ROWS, ROWS, MASK[0].long(), temperature=1.0),
        "between_groups_loss: groups must have the shape (2, 3), got (3,)",
    ),
    (
        lambda: losses.between_groups_loss(ROWS, ROWS, MASK.long(), temperature=1.0, weights=torch.ones(3)),
        "between_groups_loss: weights must have the shape (2,), got (3,)",
    ),
    (
        lambda: losses.between_groups_loss(ROWS, ROWS, MASK, temperature=1.0),
        "between_groups_loss: groups must be integers from 0 on, got torch.bool",
    ),
    (
        lambda: losses.target_class_loss(ROWS, ROWS, torch.zeros(3, dtype=torch.long)),
        "target_class_loss: labels must have the shape (2,), got (3,)",
    ),
    (
        lambda: losses.focal_soft_target_loss(ROWS, ROWS, beta=0.5, normalizer=1.0),
        "focal_soft_target_loss: beta must be 0 or at least 1, got 0.5",
    ),
    (
        lambda: losses.focal_soft_target_loss(ROWS, ROWS, weights=ROWS, normalizer=1.0),
        "focal_soft_target_loss: weights must have the shape (2,), got (2, 3)",
    ),
    (lambda: losses.correlation_loss(ROWS, ROWS, dim=2), "correlation_loss: dim must be 0 or 1, got 2"),
    (
        lambda: losses.correlation_loss(A, A, dim=1),
        "correlation_loss: expected a tensor of shape (N, K), got (2, 3, 4, 4)",
    ),
    (lambda: losses.channel_wise_loss(A, A, temperature=-1), "channel_wise_loss: temperature must be above 0, got -1"),
    (
        lambda: losses.pearson_loss(ROWS, ROWS),
        "pearson_loss: expected a feature map of shape (N, C, H, W), got (2, 3)",
    ),
    (
        lambda: losses.masked_generation_loss(A, A, reduction="sum_hw"),
        "masked_generation_loss: reduction must be one of 'sum', 'mean', got 'sum_hw'",
    ),
    (lambda: losses.feature_attention(A, temperature=0), "feature_attention: temperature must be above 0, got 0"),
    (
        lambda: losses.focal_loss(A, A, weight=torch.ones(2, 1, 4, 4)),
        "focal_loss: weight must have the shape (2, 4, 4), got (2, 1, 4, 4)",
    ),
    (
        lambda: losses.region_loss(A, A, mask=torch.ones(2, 1, 4, 4)),
        "region_loss: mask must be boolean, true where a cell is valid, got torch.float32",
    ),
    (
        lambda: losses.similarity_loss(A, A, kind="l2"),
        "similarity_loss: kind must be one of 'gram', 'cosine', got 'l2'",
    ),
    (
        lambda: losses.distance_relation_loss(ROWS, ROWS[:1]),
        "distance_relation_loss: expected shapes (B, ...) with the same number of rows, got (2, 3) and (1, 3)",
    ),
    (
        lambda: losses.decode_boxes(BOXES, BOXES[:1], weights=(1, 1, 1, 1)),
        "decode_boxes: deltas and anchors must have the same shape (R, 4), got (2, 4) and (1, 4)",
    ),
    (
        lambda: losses.box_overlap_loss(ROWS, ROWS, weights=torch.ones(2), normalizer=1.0),
        "box_overlap_loss: expected a tensor of shape (R, 4), got (2, 3)",
    ),
    (
        lambda: losses.bounded_regression_loss(BOXES, BOXES, BOXES[:1]),
        "bounded_regression_loss: targets must have the shape (2, 4), got (1, 4)",
    ),
]


@pytest.mark.parametrize(("call", "message"), MISTAKES, ids=[message.split(", got")[0] for _, message in MISTAKES])
def test_mistakes(call, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call()
