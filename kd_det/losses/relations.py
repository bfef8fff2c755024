"""Compares relations between samples or between classes; student and teacher may have features of different widths."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .numerics import check_choice, check_logits, check_same_shape, in_float32, mean, mean_square, unit_rows


@in_float32
def distance_relation_loss(s: Tensor, t: Tensor) -> Tensor:
    """Compares the distances between all pairs of rows, relative to their mean.

    RKD-D: Park et al., 2019, https://arxiv.org/abs/1904.05068: the smooth L1 distance between ``D / mean(D)`` of both
    sides, where D holds the Euclidean distances and the mean is taken over the positive ones. As in the published code,
    the result is averaged over all B^2 pairs, the diagonal included; the method's weight, 25, is left to the caller.

    Args:
        s: (B, ...) features of the student, such as the boxes of one image.
        t: (B, ...) features of the teacher, of any width; no gradient flows into them.

    Returns:
        Scalar; 0 for fewer than two rows.

    Example:
        >>> distance_relation_loss(torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[0.0], [2.0], [3.0]]))
        tensor(0.0139)
    """
    s, t = _rows("distance_relation_loss", s, t)
    return mean(F.smooth_l1_loss(_relative_distances(s), _relative_distances(t), reduction="none"))


@in_float32
def angle_relation_loss(s: Tensor, t: Tensor) -> Tensor:
    """Compares the angles of all triples of rows.

    RKD-A: Park et al., 2019, https://arxiv.org/abs/1904.05068: the smooth L1 distance between the cosines of the angle
    at i between j and k. As in the published code, it is averaged over all B^3 triples, also those with equal members,
    whose cosines are 0 or 1 on both sides; the method's weight, 50, is left to the caller. It needs memory for B^3
    cosines and B^2 rows.

    Args:
        s: (B, ...) features of the student, such as the boxes of one image.
        t: (B, ...) features of the teacher, of any width; no gradient flows into them.

    Returns:
        Scalar; 0 for fewer than three rows.

    Example:
        >>> s = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])  # a right angle and two of 45 degrees
        >>> t = torch.tensor([[0.0], [1.0], [2.0]])  # all angles are 0 or 180 degrees
        >>> angle_relation_loss(s, t)
        tensor(0.1296)
    """
    s, t = _rows("angle_relation_loss", s, t)
    return mean(F.smooth_l1_loss(_cosines_of_angles(s), _cosines_of_angles(t), reduction="none"))


@in_float32
def similarity_loss(s: Tensor, t: Tensor, *, kind: str = "gram") -> Tensor:
    """Compares the similarities of all pairs of rows.

    Args:
        s: (B, ...) features of the student, of a batch or of the boxes of one image.
        t: (B, ...) features of the teacher, of any width; no gradient flows into them.
        kind: "gram" for SP: Tung and Mori, 2019, https://arxiv.org/abs/1907.09682, the Gram matrices with rows of unit
            length; their squared difference is summed and divided by B^2. "cosine" for the edges of DSIG: Chen et al.,
            2021, https://arxiv.org/abs/2109.12862, the cosines of all pairs; half the mean squared difference.

    Returns:
        Scalar; 0 without rows.

    Example:
        >>> similarity_loss(torch.eye(2), torch.ones(2, 1), kind="cosine")
        tensor(0.2500)
    """
    check_choice("similarity_loss", "kind", kind, ("gram", "cosine"))
    s, t = _rows("similarity_loss", s, t)
    if kind == "gram":
        return mean_square(unit_rows(s @ s.T) - unit_rows(t @ t.T))
    s, t = unit_rows(s), unit_rows(t)
    # The loss is symmetric in the pairs, so its gradient is the same through both factors of a cosine. Computing it
    # through one of them, and doubling it, saves one of the two matrix products of the backward pass.
    half = s @ s.detach().T
    cosines = 2 * half - half.detach()
    return 0.5 * mean_square(cosines - t @ t.T)


@in_float32
def correlation_loss(s_probs: Tensor, t_probs: Tensor, *, dim: int) -> Tensor:
    """Averages one minus the Pearson correlation of probabilities along an axis.

    DIST: Huang et al., 2022, https://arxiv.org/abs/2205.10536. The method adds both axes: inter-class relations along
    the classes of each row, intra-class relations along the rows of each class. The correlation of the centred vectors
    a and b is ``sum(a b) / (|a| |b| + 1e-8)``, so 0 for constant ones: a single row has an intra-class loss of 1.

    Args:
        s_probs: (N, K) probabilities of the student.
        t_probs: (N, K) probabilities of the teacher; no gradient flows into them.
        dim: 1 for the inter-class, 0 for the intra-class loss.

    Returns:
        Scalar: mean over the other axis; 0 without rows.

    Example:
        >>> s, t = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.2, 0.3, 0.5]])
        >>> correlation_loss(s, t, dim=1)
        tensor(1.9286)
    """
    name = "correlation_loss"
    check_logits(name, s_probs, t_probs)
    check_same_shape(name, s_probs, t_probs)
    if dim not in (0, 1):
        raise ValueError(f"{name}: dim must be 0 or 1, got {dim}")
    if not s_probs.shape[0]:
        return mean(s_probs)
    a, b = (x - x.mean(dim=dim, keepdim=True) for x in (s_probs, t_probs.detach()))
    lengths = torch.linalg.vector_norm(a, dim=dim) * torch.linalg.vector_norm(b, dim=dim)
    return mean(1 - (a * b).sum(dim=dim) / (lengths + 1e-8))


def _rows(name: str, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Flattens both sides to (B, width) and detaches the teacher's."""
    if s.dim() < 2 or t.dim() < 2 or s.shape[0] != t.shape[0]:
        shapes = f"{tuple(s.shape)} and {tuple(t.shape)}"
        raise ValueError(f"{name}: expected shapes (B, ...) with the same number of rows, got {shapes}")
    return s.flatten(1), t.detach().flatten(1)


def _relative_distances(x: Tensor) -> Tensor:
    """Divides the (B, B) Euclidean distances by the mean of the positive ones."""
    # The faster mode of cdist, by matrix products, loses the digits of small distances in float32.
    distances = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    average = distances.sum() / (distances > 0).sum().clamp(min=1)
    return distances / average.masked_fill(average == 0, 1)


def _cosines_of_angles(x: Tensor) -> Tensor:
    """Computes the (B, B, B) cosines of the angle at i between j and k."""
    directions = unit_rows(x[None] - x[:, None])
    return directions @ directions.mT
