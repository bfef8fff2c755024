"""Compares factors, the compact features that small learned encoders extract, for factor transfer and IE-KD."""

from __future__ import annotations

import torch
from torch import Tensor

from .attention import attention_map
from .numerics import check_choice, check_maps, check_same_shape, in_float32, mean, unit_vectors


@in_float32
def factor_transfer_loss(s_factor: Tensor, t_factor: Tensor, *, p: float = 1) -> Tensor:
    """Measures the mean distance between two factors, each scaled to unit length per sample.

    FT: Kim et al., 2018, https://arxiv.org/abs/1802.04977. The distance is ``(mean |u - v|^p)^(1/p)`` over all
    N * C * H * W elements, where u and v are the flattened factors divided by their L2 norm (eps 1e-12). The paper
    writes the unreduced norm; for p = 1 this is the published code's mean. It shrinks as the factor grows: it is at
    most 2 / sqrt(C * H * W).

    Args:
        s_factor: (N, ...) factors of the student.
        t_factor: factors of the teacher, of the same shape; no gradient flows into them.
        p: exponent of the distance, 1 or more.

    Returns:
        Scalar; 0 without samples.

    Example:
        >>> factor_transfer_loss(torch.tensor([[3.0, 4.0]]), torch.tensor([[4.0, 3.0]]))
        tensor(0.2000)
    """
    return _distance("factor_transfer_loss", s_factor, t_factor, kind="ft", p=p)


@in_float32
def inheritance_loss(
    s_factor: Tensor, t_factor: Tensor, *, kind: str = "ft", p: float = 1, cosine: bool = False
) -> Tensor:
    """Measures how far the inheriting half of the student is from the teacher's factor.

    IE-KD: Huang et al., 2021, https://arxiv.org/abs/2107.00181. The paper writes unreduced norms. The mean for "ft"
    and the cosine follow the published code, which has neither "at" nor "od"; "at" takes the same mean as "ft".

    Args:
        s_factor: (N, C, H, W) factors of the student.
        t_factor: (N, C, H, W) factors of the teacher; no gradient flows into them.
        kind: "ft", the distance of `factor_transfer_loss`; "at", the same distance between the attention maps, for
            which the channels may differ; "od", the L2 norm per sample of the difference between the rectified factors,
            averaged over samples.
        p: exponent of the distance for "ft" and "at", 1 or more; "od" does not use it.
        cosine: replace the distance for "ft" and "at" with 1 minus the cosine between student and teacher, which does
            not use p.

    Returns:
        Scalar; 0 without samples.

    Example:
        >>> s, t = torch.tensor([3.0, -1.0]).view(1, 2, 1, 1), torch.zeros(1, 2, 1, 1)
        >>> inheritance_loss(s, t, kind="od")
        tensor(3.)
    """
    if cosine:
        return mean(1 - _cosine("inheritance_loss", s_factor, t_factor, kind=kind))
    return _distance("inheritance_loss", s_factor, t_factor, kind=kind, p=p)


@in_float32
def exploration_loss(
    s_factor: Tensor, t_factor: Tensor, *, kind: str = "ft", p: float = 1, cosine: bool = False
) -> Tensor:
    """Computes the negated distance of the student's exploring half from the teacher's factor.

    IE-KD: Huang et al., 2021, https://arxiv.org/abs/2107.00181. The value already has its sign, so give it a positive
    weight. "at" and "ft" are bounded; "od" is unbounded below, so its factors need a bounded length.

    Args:
        s_factor: (N, C, H, W) factors of the student.
        t_factor: (N, C, H, W) factors of the teacher; no gradient flows into them.
        kind: "at", "ft" or "od", as for `inheritance_loss`.
        p: exponent of the distance, as for `inheritance_loss`.
        cosine: replace the negated distance for "ft" and "at" with the absolute cosine between student and teacher,
            which does not use p and is smallest, 0, where they are orthogonal.

    Returns:
        Scalar, never positive except for the cosine; 0 without samples.

    Example:
        >>> s, t = torch.tensor([3.0, -1.0]).view(1, 2, 1, 1), torch.zeros(1, 2, 1, 1)
        >>> exploration_loss(s, t, kind="od")
        tensor(-3.)
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
    """Computes the cosine between student and teacher for each sample, (N,)."""
    check_choice(name, "kind", kind, ("at", "ft"))
    u, v = _units(name, s, t, kind=kind)
    return (u * v).sum(dim=1)


def _units(name: str, s: Tensor, t: Tensor, *, kind: str) -> tuple[Tensor, Tensor]:
    """Flattens both sides to unit vectors per sample: the factors themselves, or their attention maps."""
    t = t.detach()
    if kind == "ft":
        check_same_shape(name, s, t)
        return unit_vectors(s.flatten(1)), unit_vectors(t.flatten(1))
    check_maps(name, s, t)
    if s[:, 0].shape != t[:, 0].shape:
        shapes = f"{tuple(s.shape)} and {tuple(t.shape)}"
        raise ValueError(
            f"{name}: student and teacher must have the same number of samples, height and width, got {shapes}"
        )
    return attention_map(s), attention_map(t)


def _mean_distance(u: Tensor, v: Tensor, p: float) -> Tensor:
    """Computes ``(mean |u - v|^p)^(1/p)``, with gradient 0 instead of NaN where u equals v."""
    return torch.linalg.vector_norm(u - v, ord=p) / max(u.numel(), 1) ** (1 / p)
