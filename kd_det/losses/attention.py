"""Losses on spatial attention maps: where a network is active, whatever its channels mean."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .numerics import check_choice, check_maps, check_mask, check_same_shape, in_float32, mean


@in_float32
def attention_map(f: Tensor, *, power: float = 2, mask: Tensor | None = None) -> Tensor:
    """Reduces a feature map to one unit vector of spatial attention per sample.

    Zagoruyko and Komodakis, 2016, https://arxiv.org/abs/1612.03928. Mean of ``|f|^power`` over the channels, flattened
    and L2-normalised with eps 1e-12. The published code writes f^power, which is the same for even powers; the paper's
    sum over the channels is the same after normalisation.

    Args:
        f: (N, C, H, W) features.
        power: exponent, at least 1; below, the gradient at 0 would be infinite.
        mask: (N, 1, H, W) boolean, true where a cell is valid; the others are set to zero before the normalisation.

    Returns:
        (N, H * W) maps. A map that is zero everywhere stays zero.
    """
    check_maps("attention_map", f)
    check_mask("attention_map", mask, f)
    if power < 1:
        raise ValueError(f"attention_map: power must be at least 1, got {power}")
    energy = f.abs().pow(power).mean(dim=1, keepdim=True)
    if mask is not None:
        energy = energy.masked_fill(~mask, 0)
    return F.normalize(energy.flatten(1), dim=1, eps=1e-12)


@in_float32
def attention_transfer_loss(
    s: Tensor, t: Tensor, *, power: float = 2, reduction: str = "mean", mask: Tensor | None = None
) -> Tensor:
    """Averages the squared difference of the two attention maps, or its root.

    Zagoruyko and Komodakis, 2016, https://arxiv.org/abs/1612.03928. The published code takes the mean of squares, the
    paper's equation 2 an unsquared norm per sample and the weight beta / 2, so a beta of one is none of the other.

    If the sizes differ, both features are average-pooled to the smaller height and the smaller width before the power
    is taken. Published code pools to a square; here height and width are kept apart.

    Args:
        s: (N, C_s, H_s, W_s) features of the student.
        t: (N, C_t, H_t, W_t) features of the teacher; no gradient flows into them.
        power: exponent of the map.
        reduction: "mean" over samples and cells (published code), whose size falls with 1 / (H * W); or "sum_hw", the
            sum over cells and mean over samples, which does not depend on the size of the map; or "norm", the mean over
            samples of the root of that sum (the paper's equation 2 without its weight).
        mask: (N, 1, H, W) boolean at the common size, true where a cell is valid. Invalid cells are set to zero before
            the normalisation, and the mean is taken over the valid ones.

    Returns:
        Scalar; 0 without samples or valid cells.
    """
    name = "attention_transfer_loss"
    check_choice(name, "reduction", reduction, ("mean", "sum_hw", "norm"))
    check_maps(name, s, t)
    if s.shape[0] != t.shape[0]:
        raise ValueError(
            f"{name}: student and teacher must have the same number of samples, got {s.shape[0]} and {t.shape[0]}"
        )
    size = min(s.shape[2], t.shape[2]), min(s.shape[3], t.shape[3])
    s, t = _pool_to(s, size), _pool_to(t.detach(), size)
    check_mask(name, mask, s)

    difference = attention_map(s, power=power, mask=mask) - attention_map(t, power=power, mask=mask)
    if reduction == "norm":
        return mean(torch.linalg.vector_norm(difference, dim=1))
    squared = difference.square()
    if reduction == "sum_hw":
        return squared.sum() / max(squared.shape[0], 1)
    return mean(squared) if mask is None else squared.sum() / mask.sum().clamp(min=1)


@in_float32
def input_gradient_loss(s: Tensor, t: Tensor) -> Tensor:
    """Halves the distance of two input gradients, averaged over samples.

    Zagoruyko and Komodakis, 2016, https://arxiv.org/abs/1612.03928, section 3.2: ``|| J_s - J_t ||_2 / 2``, where J is
    the gradient of a sample's own task loss with respect to the network's input. The norm is taken per sample, so the
    loss does not depend on the batch size.

    Args:
        s: (N, ...) gradients of the student, part of its graph.
        t: (N, ...) gradients of the teacher; no gradient flows into them.

    Returns:
        Scalar; 0 without samples.
    """
    check_same_shape("input_gradient_loss", s, t)
    return 0.5 * mean(torch.linalg.vector_norm((s - t.detach()).flatten(1), dim=1))


def _pool_to(x: Tensor, size: tuple[int, int]) -> Tensor:
    return x if tuple(x.shape[2:]) == size else F.adaptive_avg_pool2d(x, size)
