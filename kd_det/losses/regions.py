"""Compares feature maps region by region: objects and background apart, or weighted by attention."""

from __future__ import annotations

from torch import Tensor

from .numerics import (
    check_maps,
    check_mask,
    check_positive,
    check_same_shape,
    check_shape,
    in_float32,
    square_per_sample,
    sum_of_squares,
    sum_per_sample,
)


@in_float32
def feature_attention(x: Tensor, *, temperature: float = 0.5) -> tuple[Tensor, Tensor]:
    """Computes where, and in which channels, a map is active, as two softmaxes with mean 1.

    FGD: Yang et al., 2021, https://arxiv.org/abs/2111.11837. The spatial attention is
    ``H W softmax(mean over channels of |x| / T)`` over the cells, the channel attention
    ``C softmax(mean over cells of |x| / T)`` over the channels.

    Args:
        x: (N, C, H, W) features.
        temperature: T, above 0.

    Returns:
        Spatial attention (N, H, W) and channel attention (N, C), both with a gradient.

    Example:
        >>> import torch
        >>> spatial, channel = feature_attention(torch.tensor([3.0, 1.0]).log().view(1, 1, 1, 2), temperature=1)
        >>> spatial, channel
        (tensor([[[1.5000, 0.5000]]]), tensor([[1.]]))
    """
    check_maps("feature_attention", x)
    check_positive("feature_attention", "temperature", temperature)
    energy = x.abs() / temperature
    height, width = x.shape[2:]
    spatial = height * width * energy.mean(dim=1).flatten(1).softmax(dim=1).view(-1, height, width)
    return spatial, x.shape[1] * energy.mean(dim=(2, 3)).softmax(dim=1)


@in_float32
def focal_loss(s: Tensor, t: Tensor, *, weight: Tensor, temperature: float = 0.5) -> Tensor:
    """Sums squared differences, weighted by a mask of the region and by the teacher's attention.

    The focal part of FGD: Yang et al., 2021, https://arxiv.org/abs/2111.11837, for the foreground or the background:
    ``sum(weight * S * A * (s - t)^2) / N`` with the teacher's `feature_attention` S and A. The factors alpha and beta
    of the method are left to the caller.

    Args:
        s: (N, C, H, W) features of the student.
        t: features of the teacher, of the same shape; no gradient flows into them.
        weight: (N, H, W) weight of each cell, in FGD 1 over the area of the smallest object there, or 1 over the number
            of background cells.
        temperature: T of the attention, above 0.

    Returns:
        Scalar: the sum over all elements divided by N; 0 without samples.

    Example:
        >>> import torch
        >>> focal_loss(torch.zeros(1, 1, 1, 2), torch.full((1, 1, 1, 2), 2.0), weight=torch.tensor([[[0.0, 0.5]]]))
        tensor(2.)
    """
    name = "focal_loss"
    check_maps(name, s, t)
    check_same_shape(name, s, t)
    check_shape(name, "weight", weight, (s.shape[0], *s.shape[2:]))
    t = t.detach()
    spatial, channel = feature_attention(t, temperature=temperature)
    return sum_per_sample((weight.detach() * spatial)[:, None] * channel[:, :, None, None] * (s - t).square())


@in_float32
def attention_loss(s: Tensor, t: Tensor, *, temperature: float = 0.5, spatial_scale: float | Tensor = 1.0) -> Tensor:
    """Sums the absolute differences between the attention of student and teacher.

    The attention part of FGD: Yang et al., 2021, https://arxiv.org/abs/2111.11837: both `feature_attention` masks, the
    spatial one summed over cells and the channel one over channels, divided by N.

    Args:
        s: (N, C, H, W) features of the student.
        t: features of the teacher, of the same shape; no gradient flows into them.
        temperature: T of the attention, above 0.
        spatial_scale: factor of the spatial part, which grows with the map, unlike the channel part.

    Returns:
        Scalar; 0 without samples.

    Example:
        >>> import torch
        >>> t = torch.tensor([3.0, 1.0]).log().view(1, 1, 1, 2)
        >>> attention_loss(torch.zeros(1, 1, 1, 2), t, temperature=1)
        tensor(1.0000)
    """
    check_maps("attention_loss", s, t)
    check_same_shape("attention_loss", s, t)
    pairs = zip(
        feature_attention(s, temperature=temperature),
        feature_attention(t.detach(), temperature=temperature),
        strict=True,
    )
    spatial, channel = (sum_per_sample((of_s - of_t).abs()) for of_s, of_t in pairs)
    return spatial_scale * spatial + channel


@in_float32
def relation_loss(s_context: Tensor, t_context: Tensor) -> Tensor:
    """Sums the squared differences between the outputs of two global context blocks.

    The global part of FGD: Yang et al., 2021, https://arxiv.org/abs/2111.11837: ``sum (R_s(s) - R_t(t))^2 / N``. Both
    blocks are trained, the teacher's too, so the gradient flows into both arguments: pass the teacher's features
    to R_t without a gradient.

    Args:
        s_context: (N, ...) output R_s of the block on the student's features.
        t_context: output R_t of the other block on the teacher's features, of the same shape.

    Returns:
        Scalar: the sum over all elements divided by N; 0 without samples.

    Example:
        >>> import torch
        >>> relation_loss(torch.zeros(2, 3), torch.ones(2, 3))
        tensor(3.)
    """
    check_same_shape("relation_loss", s_context, t_context)
    return square_per_sample(s_context - t_context)


@in_float32
def region_loss(s: Tensor, t: Tensor, *, mask: Tensor, per_channel: bool = True) -> Tensor:
    """Averages half the squared difference over the cells of a region.

    FGFI: Wang et al., 2019, https://arxiv.org/abs/1906.03609, and, with the mean over channels, DeFeat: Guo et al.,
    2021, https://arxiv.org/abs/2103.14475, which adds the background with the mask's complement. The loss is
    ``sum(mask * (s - t)^2) / (2 * cells * C)`` for the cells of the whole batch; weights and the mean over levels are
    left to the caller.

    Args:
        s: (N, C, H, W) features of the student.
        t: features of the teacher, of the same shape; no gradient flows into them.
        mask: (N, 1, H, W) boolean, true in the region.
        per_channel: whether to divide by C (DeFeat) or not (FGFI).

    Returns:
        Scalar; 0 for an empty region.

    Example:
        >>> import torch
        >>> mask = torch.tensor([[[[True, False]]]])
        >>> region_loss(torch.zeros(1, 2, 1, 2), torch.ones(1, 2, 1, 2), mask=mask)
        tensor(0.5000)
    """
    name = "region_loss"
    check_maps(name, s, t)
    check_same_shape(name, s, t)
    check_mask(name, mask, s)
    divisor = 2 * mask.sum() * (s.shape[1] if per_channel else 1)
    return sum_of_squares((s - t.detach()).masked_fill(~mask, 0)) / divisor.clamp(min=1)
