"""Compares spatial attention maps: where a network is active, whatever its channels mean."""

from __future__ import annotations

import torch
from torch import Tensor

from .numerics import (
    check_choice,
    check_maps,
    check_mask,
    check_same_shape,
    in_float32,
    mean,
    mean_square,
    sum_of_squares,
    unit_vectors,
)
from .pooling import pool


@in_float32
def attention_map(f: Tensor, *, power: float = 2, mask: Tensor | None = None) -> Tensor:
    """Reduces a feature map to one unit vector of spatial attention per sample.

    Zagoruyko and Komodakis, 2016, https://arxiv.org/abs/1612.03928. The map is the mean of ``|f|^power`` over the
    channels, flattened and L2-normalised with eps 1e-12. The published code writes f^power, which is the same for even
    powers; the paper sums over the channels, which is the same after normalisation.

    Args:
        f: (N, C, H, W) features.
        power: exponent, at least 1; a smaller one would have an infinite gradient at 0.
        mask: (N, 1, H, W) boolean, true where a cell is valid; invalid cells are set to zero before the normalisation.

    Returns:
        (N, H * W) maps. A map that is zero everywhere stays zero.

    Example:
        >>> attention_map(torch.tensor([[[[3.0, 0.0], [0.0, 4.0]]]]), power=1)
        tensor([[0.6000, 0.0000, 0.0000, 0.8000]])
    """
    check_maps("attention_map", f)
    check_mask("attention_map", mask, f)
    if power < 1:
        raise ValueError(f"attention_map: power must be at least 1, got {power}")
    # The sum stands for the mean; eps is multiplied in its stead.
    energy = sum_of_squares(f, 1) if power == 2 else f.abs().pow(power).sum(dim=1)
    if mask is not None:
        energy = energy.masked_fill(~mask[:, 0], 0)
    return unit_vectors(energy.flatten(1), eps=1e-12 * max(f.shape[1], 1))


@in_float32
def attention_transfer_loss(
    s: Tensor, t: Tensor, *, power: float = 2, reduction: str = "mean", mask: Tensor | None = None
) -> Tensor:
    """Measures the distance between the attention maps of student and teacher.

    Zagoruyko and Komodakis, 2016, https://arxiv.org/abs/1612.03928. The published code takes the mean of squared
    differences; equation 2 of the paper takes an unsquared norm per sample, with the weight beta / 2. A beta that was
    chosen for one of them does not suit the other.

    If the sizes differ, both features are average-pooled to the smaller height and the smaller width before the power
    is taken. The published code pools to a square; here height and width are treated separately.

    Args:
        s: (N, C_s, H_s, W_s) features of the student.
        t: (N, C_t, H_t, W_t) features of the teacher; no gradient flows into them.
        power: exponent of the map.
        reduction: "mean" over samples and cells (published code), which shrinks as 1 / (H * W); "sum_hw", the sum over
            cells and mean over samples, which does not depend on the size of the map; or "norm", the mean over samples
            of the root of that sum (equation 2 of the paper without its weight).
        mask: (N, 1, H, W) boolean at the common size, true where a cell is valid. Invalid cells are set to zero before
            the normalisation, and the mean is taken over the valid ones.

    Returns:
        Scalar; 0 without samples or valid cells.

    Example:
        >>> s = torch.tensor([[[[1.0, 0.0]]]])
        >>> attention_transfer_loss(s, s.flip(3), reduction="sum_hw")
        tensor(2.)
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
    if reduction == "sum_hw":
        return sum_of_squares(difference) / max(len(difference), 1)
    return mean_square(difference) if mask is None else sum_of_squares(difference) / mask.sum().clamp(min=1)


@in_float32
def input_gradient_loss(s: Tensor, t: Tensor) -> Tensor:
    """Computes half the distance between two input gradients, averaged over samples.

    Zagoruyko and Komodakis, 2016, https://arxiv.org/abs/1612.03928, section 3.2: ``|| J_s - J_t ||_2 / 2``, where J is
    the gradient of a sample's own task loss with respect to the network's input. The norm is taken per sample, so the
    loss does not depend on the batch size.

    Args:
        s: (N, ...) gradients of the student, part of its graph.
        t: (N, ...) gradients of the teacher; no gradient flows into them.

    Returns:
        Scalar; 0 without samples.

    Example:
        >>> input_gradient_loss(torch.zeros(1, 2), torch.tensor([[3.0, 4.0]]))
        tensor(2.5000)
    """
    check_same_shape("input_gradient_loss", s, t)
    return 0.5 * mean(torch.linalg.vector_norm((s - t.detach()).flatten(1), dim=1))


def _pool_to(x: Tensor, size: tuple[int, int]) -> Tensor:
    return x if tuple(x.shape[2:]) == size else pool(x, size[:1], size[1:])
