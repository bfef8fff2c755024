"""Compares a student's features with a teacher's, element by element."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .numerics import (
    check_choice,
    check_maps,
    check_mask,
    check_same_shape,
    check_shape,
    in_float32,
    masked_mean,
    mean,
    sum_per_sample,
)


@in_float32
def hint_loss(s: Tensor, t: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Averages the squared difference between two tensors of the same shape.

    FitNets: Romero et al., 2014, https://arxiv.org/abs/1412.6550. Equation 3 of the paper, half the squared norm per
    sample, is C * H * W / 2 times this value; today's implementations use the mean.

    Args:
        s: features of the student after the regressor, of any shape.
        t: features of the teacher, of the same shape; no gradient flows into them.
        mask: (N, 1, H, W) boolean for features of shape (N, C, H, W): the mean is taken over the true cells only.

    Returns:
        Scalar; 0 without elements or valid cells.

    Example:
        >>> hint_loss(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))
        tensor(2.)
    """
    check_same_shape("hint_loss", s, t)
    check_mask("hint_loss", mask, s)
    return masked_mean((s - t.detach()).square(), mask)


@in_float32
def masked_generation_loss(
    generated: Tensor, t: Tensor, *, reduction: str = "sum", mask: Tensor | None = None
) -> Tensor:
    """Sums the squared difference between the teacher's features and those generated from a masked student.

    MGD: Yang et al., 2022, https://arxiv.org/abs/2205.01529. Masking random cells of the student and generating the
    features by two convolutions is left to the caller, as is the method's factor alpha.

    Args:
        generated: (N, C, H, W) features generated from the student's.
        t: features of the teacher, of the same shape; no gradient flows into them.
        reduction: "sum" over channels and cells and mean over samples (published code), which grows with the size of
            the map; or "mean" over all elements.
        mask: (N, 1, H, W) boolean, true where a cell is valid (not in the published code); others do not count.

    Returns:
        Scalar; 0 without samples or valid cells.

    Example:
        >>> masked_generation_loss(torch.zeros(2, 3, 2, 2), torch.ones(2, 3, 2, 2))
        tensor(12.)
    """
    name = "masked_generation_loss"
    check_choice(name, "reduction", reduction, ("sum", "mean"))
    check_maps(name, generated, t)
    check_same_shape(name, generated, t)
    check_mask(name, mask, generated)
    squared = (generated - t.detach()).square()
    if reduction == "mean":
        return masked_mean(squared, mask)
    return sum_per_sample(squared if mask is None else squared.masked_fill(~mask, 0))


@in_float32
def hierarchical_context_loss(
    s: Tensor, t: Tensor, *, levels: Sequence[int] = (4, 2, 1), mask: Tensor | None = None
) -> Tensor:
    """Averages the squared difference between two maps, at full size and pooled to coarser grids.

    HCL of ReviewKD: Chen et al., 2021, https://arxiv.org/abs/2104.09044, for one pair of maps; the method sums it over
    its pairs. The map itself has weight 1, the pooled grids in use 1/2, 1/4, ..., and the weighted sum is divided by
    the sum of the weights. As in the published code, a grid of l x l cells is left out if l >= H, whatever the width.

    Args:
        s: (N, C, H, W) features of the student.
        t: (N, C, H, W) features of the teacher; no gradient flows into them.
        levels: side lengths of the pooled grids, in the order of their weights.
        mask: (N, 1, H, W) boolean, true where a cell is valid (not in the published code). The map's mean is taken over
            valid cells; a pooled cell averages the valid cells under it, and is left out if there are none.

    Returns:
        Scalar; 0 without samples or valid cells.

    Example:
        >>> hierarchical_context_loss(torch.ones(1, 1, 8, 8), torch.zeros(1, 1, 8, 8))
        tensor(1.)
    """
    name = "hierarchical_context_loss"
    check_maps(name, s, t)
    check_same_shape(name, s, t)
    check_mask(name, mask, s)
    difference = s - t.detach()  # Pooling is linear: the difference of two pooled maps is the pooled difference.
    if mask is not None:
        difference = difference.masked_fill(~mask, 0)

    loss, weight, total = masked_mean(difference.square(), mask), 1.0, 1.0
    grid = difference
    for level in (level for level in levels if level < s.shape[2]):
        # Where the last grid has cells of equal size that tile this grid's cells, pooling it gives the same means.
        sides = zip(s.shape[2:], grid.shape[2:], strict=True)
        if any(side % cells or cells % level for side, cells in sides):
            grid = difference
        grid = F.adaptive_avg_pool2d(grid, level)
        pooled, valid = grid, None
        if mask is not None:
            share = F.adaptive_avg_pool2d(mask.to(grid), level)
            valid = share > 0
            pooled = grid / share.masked_fill(~valid, 1)
        weight /= 2
        total += weight
        loss = loss + weight * masked_mean(pooled.square(), valid)
    return loss / total


@in_float32
def activation_boundary_loss(s_pre: Tensor, t_pre: Tensor, *, margin: float = 1.0) -> Tensor:
    """Penalises student responses that are not beyond a margin on the teacher's side of zero.

    AB: Heo et al., 2018, https://arxiv.org/abs/1811.03233. A teacher response of exactly 0 counts as inactive. The
    published code multiplies the sum by 3 / 1000 on CIFAR; such factors are left to the caller.

    Args:
        s_pre: (N, ...) responses of the student before the ReLU.
        t_pre: responses of the teacher before the ReLU, of the same shape; no gradient flows into them.
        margin: distance from zero beyond which a response on the right side costs nothing.

    Returns:
        Scalar: the sum over all elements divided by N; 0 without samples.

    Example:
        >>> activation_boundary_loss(torch.tensor([[0.5, -2.0]]), torch.tensor([[1.0, -1.0]]))
        tensor(0.2500)
    """
    check_same_shape("activation_boundary_loss", s_pre, t_pre)
    shortfall = torch.where(t_pre.detach() > 0, margin - s_pre, margin + s_pre).relu()
    return sum_per_sample(shortfall.square())


@torch.no_grad()
def activation_disagreement(s_pre: Tensor, t_pre: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Computes the share of neurons that are active, that is above 0, in only one of the two networks.

    This is the quantity that AB minimises: Heo et al., 2018, https://arxiv.org/abs/1811.03233.

    Args:
        s_pre: (N, C, H, W) responses of the student before the ReLU.
        t_pre: responses of the teacher before the ReLU, of the same shape.
        mask: (N, 1, H, W) boolean, true for the cells that count; None for all.

    Returns:
        Scalar in float64, without gradient; 0 without elements.

    Example:
        >>> activation_disagreement(torch.tensor([[[[1.0, -1.0]]]]), torch.ones(1, 1, 1, 2))
        tensor(0.5000, dtype=torch.float64)
    """
    check_same_shape("activation_disagreement", s_pre, t_pre)
    check_mask("activation_disagreement", mask, s_pre)
    differ = (s_pre > 0) != (t_pre > 0)
    count = differ.numel() if mask is None else mask.sum() * differ.shape[1]
    return (differ if mask is None else differ & mask).sum().double() / max(count, 1)


@in_float32
def overhaul_loss(s: Tensor, t_pre: Tensor, *, margin: Tensor) -> Tensor:
    """Sums squared differences, except where student and teacher are both inactive.

    OFD: Heo et al., 2019, https://arxiv.org/abs/1904.01866. The target is max(t, margin); where it is not positive, a
    student value at or below it costs nothing. The published code divides by 1000 (CIFAR) or 10000 (ImageNet) and
    weights the stages; such factors are left to the caller.

    Args:
        s: (N, C, ...) features of the student after its connector.
        t_pre: features of the teacher before the ReLU, of the same shape; no gradient flows into them.
        margin: (C,) negative margins, see `margin_from_batch_norm`.

    Returns:
        Scalar: the sum over all elements divided by N; 0 without samples.

    Example:
        >>> overhaul_loss(torch.tensor([[1.0, -3.0]]), torch.tensor([[2.0, -2.0]]), margin=torch.tensor([-1.0, -1.0]))
        tensor(1.)
    """
    check_same_shape("overhaul_loss", s, t_pre)
    check_shape("overhaul_loss", "margin", margin, tuple(s.shape[1:2]))
    margin = margin.detach().reshape(1, -1, *[1] * (s.dim() - 2))
    target = torch.maximum(t_pre.detach(), margin)
    difference = s - target
    return sum_per_sample(torch.where(target > 0, difference, difference.relu()).square())


@in_float32
def margin_from_batch_norm(weight: Tensor, bias: Tensor) -> Tensor:
    """Computes the mean negative response of each channel of a batch norm.

    OFD: Heo et al., 2019, https://arxiv.org/abs/1904.01866. The margin is ``E[x | x < 0]`` for x ~ N(bias, weight^2),
    or, as in the published code, ``-3 |weight|`` where x is negative with a probability of 0.001 or less. It does not
    hold for a frozen batch norm into which the running statistics were folded (Detectron2's converted weights);
    estimate the margins from data there.

    Args:
        weight: (C,) scale of the batch norm.
        bias: (C,) shift of the batch norm.

    Returns:
        (C,) margins, none above zero, without gradient.

    Example:
        >>> margin_from_batch_norm(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 0.0]))
        tensor([-0.7979, -1.5958])
    """
    if weight.dim() != 1 or weight.shape != bias.shape:
        raise ValueError(
            "margin_from_batch_norm: weight and bias must have the same shape (C,), "
            f"got {tuple(weight.shape)} and {tuple(bias.shape)}"
        )
    sigma, bias = weight.detach().abs(), bias.detach()
    z = bias / sigma
    negative = torch.special.ndtr(-z)
    density = torch.exp(-z.square() / 2) / (2 * torch.pi) ** 0.5
    return torch.where(negative > 0.001, bias - sigma * density / negative, -3 * sigma)


@in_float32
def feature_matching_loss(s: Tensor, t: Tensor) -> Tensor:
    """Averages the squared difference between globally pooled features.

    SRRL: Yang et al., 2021, https://openreview.net/forum?id=ZzwDy_wiWv. The paper writes the squared norm, C times this
    value; the mean is that of the published code.

    Args:
        s: (N, C) or (N, C, H, W) features of the student after its connector; maps are averaged over their cells.
        t: (N, C) or (N, C, H, W) features of the teacher, whose H and W may differ; no gradient flows into them.

    Returns:
        Scalar: mean over samples and channels; 0 without samples.

    Example:
        >>> feature_matching_loss(torch.ones(1, 2, 4, 4), torch.zeros(1, 2))
        tensor(1.)
    """
    for x in (s, t):
        if x.dim() not in (2, 4):
            raise ValueError(f"feature_matching_loss: expected a shape (N, C) or (N, C, H, W), got {tuple(x.shape)}")
    s, t = (x.mean(dim=(2, 3)) if x.dim() == 4 else x for x in (s, t.detach()))
    check_same_shape("feature_matching_loss", s, t)
    return mean((s - t).square())
