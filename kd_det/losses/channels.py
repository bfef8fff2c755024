"""Compares feature maps channel by channel: where each channel is active, whatever its scale."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .numerics import (
    check_maps,
    check_mask,
    check_positive,
    check_same_shape,
    in_float32,
    keep_logits,
    mean,
    mean_square,
    standardize,
)


@in_float32
def channel_wise_loss(s: Tensor, t: Tensor, *, temperature: float = 1.0, mask: Tensor | None = None) -> Tensor:
    """Computes T^2 times the divergence between the softmaxes of each channel over its cells.

    CWD: Shu et al., 2020, https://arxiv.org/abs/2011.13256. With p the softmax of ``t / T`` over the H * W cells of a
    channel and q that of ``s / T``, the loss is ``T^2 sum(p log(p / q))``, averaged over samples and channels. It
    changes with the scale of the features. The logarithms are those of a log-softmax; part of the published code takes
    the logarithm of a softmax, which is infinite beside a very large value.

    Args:
        s: (N, C, H, W) features of the student.
        t: features of the teacher, of the same shape; no gradient flows into them.
        temperature: T, above 0.
        mask: (N, 1, H, W) boolean, true where a cell is valid (not in the published code). Other cells take no part in
            the softmaxes.

    Returns:
        Scalar: sum over cells, mean over samples and channels; 0 without samples or valid cells.

    Example:
        >>> import torch
        >>> s, t = torch.zeros(1, 1, 1, 2), torch.tensor([[[[3.0, 1.0]]]]).log()
        >>> channel_wise_loss(s, t)
        tensor(0.1308)
    """
    name = "channel_wise_loss"
    check_maps(name, s, t)
    check_same_shape(name, s, t)
    check_mask(name, mask, s)
    check_positive(name, "temperature", temperature)
    log_q, log_p = (
        (x if mask is None else keep_logits(x, mask)).flatten(2).log_softmax(dim=2)
        for x in (s / temperature, t.detach() / temperature)
    )
    return temperature**2 * mean(F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=2))


@in_float32
def pearson_loss(s: Tensor, t: Tensor, *, eps: float = 1e-6, mask: Tensor | None = None) -> Tensor:
    """Averages half the squared difference between the standardised channels of two maps.

    PKD: Cao et al., 2022, https://arxiv.org/abs/2207.02039, which shows that this minimises one minus the Pearson
    correlation r of the channels: for M values per channel the loss is ``(M - 1) / M * (1 - r)``, averaged over the
    channels. Each channel is standardised over N, H and W of the batch together, as in the published code:
    ``(x - mean) / (std + eps)`` with the unbiased standard deviation. An affine change of a teacher's channel changes
    nothing. The gradient of a weak student channel grows as 1 / std.

    Args:
        s: (N, C, H, W) features of the student; the gradient passes through their mean and standard deviation.
        t: features of the teacher, of the same shape; no gradient flows into them.
        eps: added to the standard deviations.
        mask: (N, 1, H, W) boolean, true where a cell is valid (not in the published code): statistics and mean are
            taken over the valid cells only.

    Returns:
        Scalar; 0 for fewer than two valid cells, for which the published code gives NaN.

    Example:
        >>> import torch
        >>> s, t = torch.tensor([[[[1.0, 2.0, 3.0]]]]), torch.tensor([[[[4.0, 8.0, 6.0]]]])
        >>> pearson_loss(s, t)
        tensor(0.3333)
    """
    name = "pearson_loss"
    check_maps(name, s, t)
    check_same_shape(name, s, t)
    check_mask(name, mask, s)
    s, t = (standardize(x, (0, 2, 3), eps=eps, mask=mask) for x in (s, t.detach()))
    return 0.5 * mean_square(s - t, mask)
