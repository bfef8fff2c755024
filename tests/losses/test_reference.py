"""Random inputs against the plain numpy formulas."""

import numpy as np
import pytest
import torch

from kd_det import losses

from . import reference

LOGITS, BOXES, MAPS = (6, 5), (6, 4), (2, 3, 5, 9)


def random_mask(rng, shape):
    """Valid cells at the upper left of each sample, as in a padded batch: some pooled cells have none."""
    mask = np.zeros((shape[0], 1, *shape[2:]), dtype=bool)
    for sample in mask:
        sample[:, : rng.integers(1, shape[2] + 1), : rng.integers(1, shape[3] + 1)] = True
    return mask


def classes(rng, shape):
    """Some of the classes of each row, one at least."""
    mask = rng.random(shape) < 0.5
    mask[:, rng.integers(shape[1])] = True
    return mask


# function, shapes of student and teacher, options: fixed, or made from (rng, shape)
CASES = [
    ("soft_target_loss", LOGITS, LOGITS, {"temperature": 3.0}),
    ("soft_target_loss", (2, 3, 7), (2, 3, 7), {"temperature": 0.5}),
    ("soft_target_loss", LOGITS, LOGITS, {"temperature": lambda rng, shape: rng.uniform(0.5, 6, shape[0])}),
    (
        "soft_target_loss",
        LOGITS,
        LOGITS,
        {"temperature": 2.0, "weights": lambda rng, shape: rng.random(shape[0])},
    ),
    ("binary_soft_target_loss", LOGITS, LOGITS, {}),
    ("binary_soft_target_loss", MAPS, MAPS, {"weights": lambda rng, shape: rng.random(shape)}),
    ("mutual_loss", LOGITS, LOGITS, {}),
    ("born_again_loss", LOGITS, LOGITS, {}),
    ("softmax_regression_loss", LOGITS, LOGITS, {"kind": "mse"}),
    ("softmax_regression_loss", LOGITS, LOGITS, {"kind": "ce"}),
    ("softmax_regression_loss", LOGITS, LOGITS, {"kind": "ce", "temperature": 4.0}),
    ("dynamic_temperature", LOGITS, LOGITS, {"kind": "flsw", "base": 4.0, "beta": 2.0, "gamma": 0.5, "bounds": (1, 8)}),
    ("dynamic_temperature", LOGITS, LOGITS, {"kind": "cwsm", "base": 4.0, "beta": 2.0, "bounds": (3.9, 4.1)}),
    ("attention_transfer_loss", MAPS, (2, 4, 5, 9), {}),
    ("attention_transfer_loss", MAPS, MAPS, {"power": 3, "reduction": "sum_hw"}),
    ("attention_transfer_loss", MAPS, (2, 1, 3, 4), {"power": 1}),
    ("attention_transfer_loss", (2, 3, 4, 9), (2, 3, 7, 5), {}),
    ("attention_transfer_loss", MAPS, MAPS, {"reduction": "norm", "power": 1.5}),
    ("attention_transfer_loss", MAPS, MAPS, {"mask": random_mask}),
    ("attention_transfer_loss", MAPS, MAPS, {"reduction": "norm", "mask": random_mask}),
    ("attention_transfer_loss", MAPS, MAPS, {"reduction": "sum_hw", "mask": random_mask}),
    ("input_gradient_loss", MAPS, MAPS, {}),
    ("hint_loss", MAPS, MAPS, {}),
    ("hint_loss", MAPS, MAPS, {"mask": random_mask}),
    ("hierarchical_context_loss", (2, 3, 13, 6), (2, 3, 13, 6), {}),
    ("hierarchical_context_loss", (2, 3, 2, 11), (2, 3, 2, 11), {}),
    ("hierarchical_context_loss", (2, 3, 8, 12), (2, 3, 8, 12), {}),  # each grid pooled from the one before
    ("hierarchical_context_loss", (2, 3, 8, 6), (2, 3, 8, 6), {}),  # the coarsest alone
    ("hierarchical_context_loss", (2, 3, 12, 12), (2, 3, 12, 12), {"levels": (6, 4, 3, 2)}),  # 4 does not divide 6
    ("hierarchical_context_loss", MAPS, MAPS, {"levels": (3, 1)}),
    ("hierarchical_context_loss", (2, 3, 13, 6), (2, 3, 13, 6), {"mask": random_mask}),
    ("hierarchical_context_loss", (2, 3, 8, 12), (2, 3, 8, 12), {"mask": random_mask}),
    ("factor_transfer_loss", MAPS, MAPS, {}),
    ("factor_transfer_loss", MAPS, MAPS, {"p": 3}),
    ("inheritance_loss", MAPS, MAPS, {"kind": "ft", "p": 2}),
    ("inheritance_loss", MAPS, (2, 4, 5, 9), {"kind": "at"}),
    ("inheritance_loss", MAPS, MAPS, {"kind": "od"}),
    ("inheritance_loss", MAPS, (2, 4, 5, 9), {"kind": "at", "cosine": True}),
    ("exploration_loss", MAPS, MAPS, {"kind": "at", "p": 2}),
    ("exploration_loss", MAPS, MAPS, {"kind": "ft", "cosine": True}),
    ("activation_boundary_loss", MAPS, MAPS, {"margin": 0.7}),
    ("activation_boundary_loss", LOGITS, LOGITS, {}),
    ("overhaul_loss", MAPS, MAPS, {"margin": lambda rng, shape: -rng.random(shape[1])}),
    ("feature_matching_loss", MAPS, (2, 3, 4, 4), {}),
    ("feature_matching_loss", MAPS, (2, 3), {}),
    ("focal_soft_target_loss", LOGITS, LOGITS, {"normalizer": 3.0}),
    (
        "focal_soft_target_loss",
        LOGITS,
        LOGITS,
        {"beta": 2.0, "weights": lambda rng, shape: rng.random(shape[:-1]), "normalizer": 2.0},
    ),
    ("within_group_loss", LOGITS, LOGITS, {"mask": classes, "temperature": 3.0}),
    (
        "within_group_loss",
        LOGITS,
        LOGITS,
        {"mask": classes, "temperature": 1.0, "weights": lambda rng, shape: rng.random(shape[0])},
    ),
    (
        "between_groups_loss",
        LOGITS,
        LOGITS,
        {"groups": lambda rng, shape: rng.integers(3, size=shape), "temperature": 2.0},
    ),
    (
        "between_groups_loss",
        LOGITS,
        LOGITS,
        {
            "groups": lambda rng, shape: classes(rng, shape).astype(int),
            "temperature": 1.0,
            "weights": lambda rng, shape: rng.random(shape[0]),
        },
    ),
    ("target_class_loss", LOGITS, LOGITS, {"labels": lambda rng, shape: rng.integers(shape[1], size=shape[0])}),
    ("correlation_loss", LOGITS, LOGITS, {"dim": 0}),
    ("correlation_loss", LOGITS, LOGITS, {"dim": 1}),
    ("channel_wise_loss", MAPS, MAPS, {"temperature": 4.0}),
    ("channel_wise_loss", MAPS, MAPS, {"mask": random_mask}),
    ("pearson_loss", MAPS, MAPS, {}),
    ("pearson_loss", MAPS, MAPS, {"mask": random_mask, "eps": 0.1}),
    ("masked_generation_loss", MAPS, MAPS, {"mask": random_mask}),
    ("masked_generation_loss", MAPS, MAPS, {"reduction": "mean"}),
    ("focal_loss", MAPS, MAPS, {"weight": lambda rng, shape: rng.random((shape[0], *shape[2:]))}),
    ("attention_loss", MAPS, MAPS, {"temperature": 0.1}),
    ("relation_loss", MAPS, MAPS, {}),
    ("region_loss", MAPS, MAPS, {"mask": random_mask}),
    ("region_loss", MAPS, MAPS, {"mask": random_mask, "per_channel": False}),
    ("node_loss", MAPS, MAPS, {}),
    ("edge_loss", MAPS, (2, 7), {}),
    ("similarity_loss", LOGITS, (6, 2, 3), {}),
    ("distance_relation_loss", LOGITS, (6, 2, 3), {}),
    ("angle_relation_loss", LOGITS, (6, 2, 3), {}),
    ("bounded_regression_loss", BOXES, BOXES, {"targets": lambda rng, shape: rng.normal(size=shape), "margin": 0.5}),
]


def both(name, inputs, options):
    """Calls the torch function and its numpy twin on the same float64 arrays."""
    as_tensors = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in options.items()}
    actual = getattr(losses, name)(*map(torch.from_numpy, inputs), **as_tensors)
    np.testing.assert_allclose(actual.numpy(), getattr(reference, name)(*inputs, **options), rtol=0, atol=1e-9)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("name", "s_shape", "t_shape", "options"), CASES)
def test_pairs(name, s_shape, t_shape, options, seed):
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=s_shape), rng.normal(size=t_shape)
    both(name, inputs, {k: v(rng, s_shape) if callable(v) else v for k, v in options.items()})


@pytest.mark.parametrize("seed", range(3))
def test_maps_weights_and_targets(seed):
    rng = np.random.default_rng(seed)
    features, logits, labels = rng.normal(size=MAPS), rng.normal(size=LOGITS), rng.integers(5, size=6)
    both("attention_map", [features], {"power": 1.5, "mask": random_mask(rng, MAPS)})
    both("confidence_weights", [logits], {})
    both("adjust_probability_shift", [reference.softmax(logits), labels], {})
    both("adjust_label_smoothing", [reference.softmax(logits), labels], {"correct_prob": 0.8})
    both("standardize_logits", [logits], {})
    both("margin_from_batch_norm", [rng.normal(size=9), rng.normal(size=9)], {})


@pytest.mark.parametrize("seed", range(3))
def test_boxes(seed):
    rng = np.random.default_rng(seed)
    corners = rng.uniform(0, 20, size=(2, 6, 2))
    s, t = (np.concatenate((first, first + rng.uniform(1, 20, size=(6, 2))), axis=1) for first in corners)
    both("decode_boxes", [rng.normal(size=(6, 4)), s], {"weights": (10.0, 10.0, 5.0, 0.2)})  # some beyond the bound
    both("box_overlap_loss", [s, t], {"weights": rng.random(6), "normalizer": 3.0})


def test_attention_of_features():
    x = np.random.default_rng(0).normal(size=MAPS)
    actual = losses.feature_attention(torch.from_numpy(x), temperature=0.2)
    for found, expected in zip(actual, reference.feature_attention(x, temperature=0.2), strict=True):
        np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-9)
