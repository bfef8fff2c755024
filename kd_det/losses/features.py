"""Compares a student's features with a teacher's, element by element."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from .numerics import (
    check_choice,
    check_maps,
    check_mask,
    check_same_shape,
    check_shape,
    in_float32,
    mean_square,
    square_per_sample,
)
from .pooling import cell_shares, kept, pool


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
    return mean_square(s - t.detach(), mask)


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
    difference = generated - t.detach()
    if reduction == "mean":
        return mean_square(difference, mask)
    return square_per_sample(difference if mask is None else difference.masked_fill(~mask, 0))


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
        tensor(1.0000)
    """
    name = "hierarchical_context_loss"
    check_maps(name, s, t)
    check_same_shape(name, s, t)
    check_mask(name, mask, s)
    difference = s - t.detach()  # Pooling is linear: the difference of two pooled maps is the pooled difference.
    if mask is not None:
        difference = difference.masked_fill(~mask, 0)

    if not levels:
        return mean_square(difference, mask)
    samples, channels, height, width = s.shape
    grids, kind = tuple(levels), (s.dtype, s.device)
    if mask is None:
        weights = grid_weights(samples * channels, height, width, grids, *kind)
    else:
        share, relative, cells = grid_parts(height, grids, *kind)
        covered = pool(mask.to(difference), grids, grids)
        valid = covered > 0
        counts = cells @ valid.sum(dim=(0, 1)).flatten().to(covered) * channels
        coarse = (cells.T @ (share * relative / counts.clamp(min=1))).view(valid.shape[2:])
        coarse = (coarse / covered.square()).masked_fill(~valid, 0)
        weights = share / (mask.sum() * channels).clamp(min=1), coarse
    shares = cell_shares(height, grids, *kind), cell_shares(width, grids, *kind)
    return cast(Tensor, _SquaresOverGrids.apply(difference, *weights, *shares))


class _SquaresOverGrids(torch.autograd.Function):
    """Adds the squares of a map, and those of its averages over the cells of grids, each with a weight.

    The grids are pooled at once, with all pairs of their rows and columns; pairs of two grids have the weight 0. The
    backward pass reads the map once and cannot be differentiated again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, cell_weights: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        pooled = rows.mT @ (x @ columns)
        ctx.save_for_backward(x, weight, pooled * cell_weights, rows, columns)
        return torch.addcmul((pooled.square() * cell_weights).sum(), weight, x.square().sum())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        x, weight, pooled, rows, columns = ctx.saved_tensors
        twice = 2 * gradients[0]
        coarse = rows @ (pooled * twice) @ columns.mT
        return coarse.addcmul_(x, weight * twice), None, None, None, None


@kept
def grid_weights(
    images: int, height: int, width: int, grids: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Computes by what the squares of maps, and of their averages over cells, are multiplied to add up to the loss.

    Args:
        images: Number of maps, samples times channels.
        height: Height of a map.
        width: Width of a map.
        grids: Side lengths of the grids.
        dtype: Type of the results.
        device: Their device.

    Returns:
        A scalar for the maps, and a factor for each row of any grid with each column of any grid.
    """
    share, relative, cells = grid_parts(height, grids, dtype, device)
    counts = torch.stack([torch.full((), max(images, 1) * grid**2, dtype=dtype, device=device) for grid in grids])
    coarse = cells.T @ (share * relative / counts)
    return share / max(images * height * width, 1), coarse.view(sum(grids), -1)


@kept
def grid_parts(
    height: int, grids: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the weights of the hierarchical context loss, without a branch on the height of the map.

    Returns:
        The share of the map itself; the weights of the G grids relative to it, (G,); and for each grid ones for its
        own rows with its own columns among those of all grids, (G, pairs).
    """
    sides = torch.stack([torch.full((), grid, device=device) for grid in grids])
    used = sides < height
    relative = 0.5 ** used.to(dtype).cumsum(dim=0) * used
    own = torch.cat([torch.full((grid,), i, device=device) for i, grid in enumerate(grids)])
    own = own == torch.arange(len(grids), device=device)[:, None]
    return 1 / (1 + relative.sum()), relative, (own[:, :, None] & own[:, None]).flatten(1).to(dtype)


@in_float32
def activation_boundary_loss(
    s_pre: Tensor, t_pre: Tensor, *, margin: float = 1.0, mask: Tensor | None = None
) -> Tensor:
    """Penalises student responses that are not beyond a margin on the teacher's side of zero.

    AB: Heo et al., 2018, https://arxiv.org/abs/1811.03233. A teacher response of exactly 0 counts as inactive. The
    published code multiplies the sum by 3 / 1000 on CIFAR; such factors are left to the caller.

    Args:
        s_pre: (N, ...) responses of the student before the ReLU.
        t_pre: responses of the teacher before the ReLU, of the same shape; no gradient flows into them.
        margin: distance from zero beyond which a response on the right side costs nothing.
        mask: (N, 1, H, W) boolean for responses (N, C, H, W): only those of the true cells count.

    Returns:
        Scalar: the sum over all elements divided by N; 0 without samples.

    Example:
        >>> activation_boundary_loss(torch.tensor([[0.5, -2.0]]), torch.tensor([[1.0, -1.0]]))
        tensor(0.2500)
    """
    check_same_shape("activation_boundary_loss", s_pre, t_pre)
    check_mask("activation_boundary_loss", mask, s_pre)
    shortfall = torch.where(t_pre.detach() > 0, margin - s_pre, margin + s_pre).relu()
    return square_per_sample(shortfall if mask is None else shortfall.masked_fill(~mask, 0))


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
    total = (differ if mask is None else differ & mask).sum().double()
    return total / (count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1))


@in_float32
def overhaul_loss(s: Tensor, t_pre: Tensor, *, margin: Tensor, mask: Tensor | None = None) -> Tensor:
    """Sums squared differences, except where student and teacher are both inactive.

    OFD: Heo et al., 2019, https://arxiv.org/abs/1904.01866. The target is max(t, margin); where it is not positive, a
    student value at or below it costs nothing. The published code divides by 1000 (CIFAR) or 10000 (ImageNet) and
    weights the stages; such factors are left to the caller.

    Args:
        s: (N, C, ...) features of the student after its connector.
        t_pre: features of the teacher before the ReLU, of the same shape; no gradient flows into them.
        margin: (C,) negative margins, see `margin_from_batch_norm`.
        mask: (N, 1, H, W) boolean for features (N, C, H, W): only those of the true cells count.

    Returns:
        Scalar: the sum over all elements divided by N; 0 without samples.

    Example:
        >>> overhaul_loss(torch.tensor([[1.0, -3.0]]), torch.tensor([[2.0, -2.0]]), margin=torch.tensor([-1.0, -1.0]))
        tensor(1.)
    """
    check_same_shape("overhaul_loss", s, t_pre)
    check_shape("overhaul_loss", "margin", margin, tuple(s.shape[1:2]))
    check_mask("overhaul_loss", mask, s)
    margin = margin.detach().reshape(1, -1, *[1] * (s.dim() - 2))
    target = torch.maximum(t_pre.detach(), margin)
    difference = s - target
    difference = torch.where(target > 0, difference, difference.relu())
    return square_per_sample(difference if mask is None else difference.masked_fill(~mask, 0))


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
    return mean_square(s - t)
