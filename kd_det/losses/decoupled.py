"""Compares class scores in parts: between groups of classes, within a group, and for the labelled class alone."""

from __future__ import annotations

import torch
from torch import Tensor

from .numerics import (
    check_logits,
    check_positive,
    check_same_shape,
    check_shape,
    divergence,
    in_float32,
    keep_logits,
    mean,
    weighted,
)


@in_float32
def within_group_loss(
    s_logits: Tensor, t_logits: Tensor, mask: Tensor, *, temperature: float, weights: Tensor | None = None
) -> Tensor:
    """Computes T^2 times the divergence between softmaxes over some classes of each row.

    NCKD of DKD: Zhao et al., 2022, https://arxiv.org/abs/2203.08679, where the mask holds all classes but the labelled
    one. It is also the second term of NKD (Yang et al., 2023, https://arxiv.org/abs/2303.13005) without the teacher's
    entropy, and the inner terms of GDKD (https://github.com/ZaberKo/GDKD). With p and q the softmaxes of ``t / T`` and
    ``s / T`` over the masked classes, the loss is ``T^2 sum(p log(p / q))``.

    Args:
        s_logits: (N, K) logits of the student.
        t_logits: (N, K) logits of the teacher; no gradient flows into them.
        mask: (N, K) boolean, true for the classes of the group. A row without any costs nothing.
        temperature: T, above 0.
        weights: (N,) factor of each row's divergence, None for 1. The mean divides by the number of rows.

    Returns:
        Scalar: mean over rows; 0 without rows.

    Example:
        >>> s, t = torch.tensor([[9.0, 0.0, 0.0]]), torch.tensor([[1.0, 3.0, 1.0]]).log()
        >>> within_group_loss(s, t, torch.tensor([[False, True, True]]), temperature=1)
        tensor(0.1308)
    """
    name = "within_group_loss"
    check_logits(name, s_logits, t_logits)
    check_same_shape(name, s_logits, t_logits)
    check_shape(name, "mask", mask, tuple(s_logits.shape))
    if mask.dtype != torch.bool:
        raise ValueError(f"{name}: mask must be boolean, true for the classes of the group, got {mask.dtype}")
    check_positive(name, "temperature", temperature)
    rows = divergence(keep_logits(s_logits, mask), keep_logits(t_logits, mask), temperature)
    return mean(weighted(name, rows, weights))


@in_float32
def between_groups_loss(
    s_logits: Tensor,
    t_logits: Tensor,
    groups: Tensor,
    *,
    temperature: float,
    weights: Tensor | None = None,
    count: int | None = None,
) -> Tensor:
    """Computes T^2 times the divergence between the softened probabilities of groups of classes.

    TCKD of DKD: Zhao et al., 2022, https://arxiv.org/abs/2203.08679, with the labelled class against all others; and
    the outer term of GDKD (https://github.com/ZaberKo/GDKD), with the teacher's most probable classes against the
    rest. A group's probability is the sum over its classes. It is computed by a log-sum-exp; the published code takes
    the logarithm of the sum, which is infinite in float32 for a very sure student.

    Args:
        s_logits: (N, K) logits of the student.
        t_logits: (N, K) logits of the teacher; no gradient flows into them.
        groups: (N, K) integers 0 .. G - 1: the group of each class. A row may leave some groups empty.
        temperature: T, above 0.
        weights: (N,) factor of each row's divergence, None for 1. The mean divides by the number of rows.
        count: G, the number of groups. None finds it, for which a CPU has to wait for the GPU.

    Returns:
        Scalar: mean over rows; 0 without rows.

    Example:
        >>> s, t = torch.tensor([[2.0, 1.0, 1.0]]).log(), torch.tensor([[6.0, 1.0, 1.0]]).log()
        >>> between_groups_loss(s, t, torch.tensor([[0, 1, 1]]), temperature=1)
        tensor(0.1308)
    """
    name = "between_groups_loss"
    check_logits(name, s_logits, t_logits)
    check_same_shape(name, s_logits, t_logits)
    check_shape(name, "groups", groups, tuple(s_logits.shape))
    if groups.dtype != torch.int64:
        raise ValueError(f"{name}: groups must be integers from 0 on, got {groups.dtype}")
    check_positive(name, "temperature", temperature)
    if count is None:
        count = int(groups.max()) + 1 if groups.numel() else 1
    s, t = (_group_logits(logits / temperature, groups, count) for logits in (s_logits, t_logits.detach()))
    return mean(weighted(name, temperature**2 * divergence(s, t), weights))


@in_float32
def target_class_loss(s_logits: Tensor, t_logits: Tensor, labels: Tensor) -> Tensor:
    """Computes the cross-entropy of the labelled class alone, weighted by the teacher's probability of it.

    The first term of NKD: Yang et al., 2023, https://arxiv.org/abs/2303.13005: ``-mean(p_y log q_y)`` at temperature 1.
    The method adds `within_group_loss` of the other classes, and the labels' own cross-entropy.

    Args:
        s_logits: (N, K) logits of the student.
        t_logits: (N, K) logits of the teacher; no gradient flows into them.
        labels: (N,) true classes y.

    Returns:
        Scalar; 0 without rows.

    Example:
        >>> target_class_loss(torch.zeros(1, 2), torch.tensor([[3.0, 1.0]]).log(), torch.tensor([0]))
        tensor(0.5199)
    """
    name = "target_class_loss"
    check_logits(name, s_logits, t_logits)
    check_same_shape(name, s_logits, t_logits)
    check_shape(name, "labels", labels, tuple(s_logits.shape[:1]))
    p, log_q = t_logits.detach().softmax(dim=1), s_logits.log_softmax(dim=1)
    return mean(-(p * log_q).gather(1, labels[:, None]))


def _group_logits(logits: Tensor, groups: Tensor, count: int) -> Tensor:
    """Computes the log-sum-exp of the logits (N, K) of each group, (N, G); a group without classes has no weight."""
    ids = torch.arange(count, device=groups.device)
    return keep_logits(logits[:, None], groups[:, None] == ids[:, None]).logsumexp(dim=2)
