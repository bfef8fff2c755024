"""Losses on factors, the compact features that small learned encoders extract: factor transfer, inherit and explore."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import attention_map
from .numerics import check_choice, check_maps, check_same_shape, in_float32, mean


@in_float32
def factor_transfer_loss(s_factor: Tensor, t_factor: Tensor, *, p: float = 1) -> Tensor:
    """Measures the mean distance of two factors, each scaled to unit length per sample.

    FT: Kim et al., 2018, https://arxiv.org/abs/1802.04977. ``(mean |u - v|^p)^(1/p)`` over all N * C * H * W elements,
    where u and v are the flattened factors divided by their L2 norm (eps 1e-12). The paper writes the unreduced norm;
    this is the published code's mean for p = 1. It falls with the size of the factor: at most 2 / sqrt(C * H * W).

    Args:
        s_factor: (N, ...) factors of the student.
        t_factor: factors of the teacher, of the same shape; no gradient flows into them.
        p: exponent of the distance, 1 or more.

    Returns:
        Scalar; 0 without samples.
    """
    return _distance("factor_transfer_loss", s_factor, t_factor, kind="ft", p=p)


@in_float32
def inheritance_loss(
    s_factor: Tensor, t_factor: Tensor, *, kind: str = "ft", p: float = 1, cosine: bool = False
) -> Tensor:
    """Measures how far the inheriting half of the student is from the teacher's factor.

    IE-KD: Huang et al., 2021, https://arxiv.org/abs/2107.00181. The paper writes unreduced norms. The mean for "ft"
    and the cosine follow the published code, which has neither "at" nor "od"; the mean for "at" is made alike.

    Args:
        s_factor: (N, C, H, W) factors of the student.
        t_factor: (N, C, H, W) factors of the teacher; no gradient flows into them.
        kind: "ft", the distance of `factor_transfer_loss`; "at", the same distance between the attention maps, for
            which the channels may differ; "od", the L2 norm per sample of the difference of the ReLUs, averaged over
            samples.
        p: exponent of the distance for "ft" and "at", 1 or more; "od" takes none.
        cosine: whether, for "ft" and "at", 1 less the cosine of student and teacher takes the distance's place; p then
            has no part.

    Returns:
        Scalar; 0 without samples.
    """
    if cosine:
        return mean(1 - _cosine("inheritance_loss", s_factor, t_factor, kind=kind))
    return _distance("inheritance_loss", s_factor, t_factor, kind=kind, p=p)


@in_float32
def exploration_loss(
    s_factor: Tensor, t_factor: Tensor, *, kind: str = "ft", p: float = 1, cosine: bool = False
) -> Tensor:
    """Measures how close the exploring half of the student is to the teacher's factor: the negated distance.

    IE-KD: Huang et al., 2021, https://arxiv.org/abs/2107.00181. The sign is already in the value: weigh it positively.
    "at" and "ft" are bounded; "od" is unbounded below, so its factors need a bounded length.

    Args:
        s_factor: (N, C, H, W) factors of the student.
        t_factor: (N, C, H, W) factors of the teacher; no gradient flows into them.
        kind: "at", "ft" or "od", as for `inheritance_loss`.
        p: exponent of the distance, as for `inheritance_loss`.
        cosine: whether, for "ft" and "at", the absolute cosine of student and teacher takes the negated distance's
            place; it is least, 0, where they are orthogonal. p then has no part.

    Returns:
        Scalar, never positive but for the cosine; 0 without samples.
    """
    if cosine:
        return mean(_cosine("exploration_loss", s_factor, t_factor, kind=kind).abs())
    return -_distance("exploration_loss", s_factor, t_factor, kind=kind, p=p)


def _distance(name: str, s: Tensor, t: Tensor, *, kind: str, p: float) -> Tensor:
    check_choice(name, "kind", kind, ("at", "ft", "od"))
    if p < 1:
        raise ValueError(f"{name}: p must be 1 or more, got {p}")
    if kind != "od":
        return _mean_distance(*_units(name, s, t, kind=kind), p)
    check_same_shape(name, s, t)
    return mean(torch.linalg.vector_norm((s.relu() - t.detach().relu()).flatten(1), dim=1))


def _cosine(name: str, s: Tensor, t: Tensor, *, kind: str) -> Tensor:
    """Cosine of each sample, (N,)."""
    check_choice(name, "kind", kind, ("at", "ft"))
    u, v = _units(name, s, t, kind=kind)
    return (u * v).sum(dim=1)


def _units(name: str, s: Tensor, t: Tensor, *, kind: str) -> tuple[Tensor, Tensor]:
    """What is compared of both sides, flattened and of unit length per sample: factors or attention maps."""
    t = t.detach()
    if kind == "ft":
        check_same_shape(name, s, t)
        return F.normalize(s.flatten(1), eps=1e-12), F.normalize(t.flatten(1), eps=1e-12)
    check_maps(name, s, t)
    if s[:, 0].shape != t[:, 0].shape:
        found = f"{tuple(s.shape)} and {tuple(t.shape)}"
        raise ValueError(
            f"{name}: student and teacher must have the same number of samples, height and width, got {found}"
        )
    return attention_map(s), attention_map(t)


def _mean_distance(u: Tensor, v: Tensor, p: float) -> Tensor:
    """``(mean |u - v|^p)^(1/p)``, with gradient 0 instead of NaN where u equals v."""
    return torch.linalg.vector_norm(u - v, ord=p) / max(u.numel(), 1) ** (1 / p)
