"""Compares the features of an image's boxes as a graph: each box is a node, and each pair of boxes an edge."""

from __future__ import annotations

import math

from torch import Tensor

from .numerics import check_same_shape, in_float32, mean_square, sum_of_squares
from .relations import similarity_loss


@in_float32
def node_loss(s: Tensor, t: Tensor) -> Tensor:
    """Averages the squared difference between the features of boxes.

    The nodes of DSIG: Chen et al., 2021, https://arxiv.org/abs/2109.12862, for the foreground or the background boxes
    of one image. The weight of the background, 7.5 times the ratio of their numbers, and the sum over images are left
    to the caller.

    Args:
        s: (M, ...) features of the student's boxes.
        t: features of the teacher for the same boxes, of the same shape; no gradient flows into them.

    Returns:
        Scalar; 0 without boxes, for which the published code gives NaN.

    Example:
        >>> import torch
        >>> node_loss(torch.zeros(1, 2), torch.tensor([[1.0, 3.0]]))
        tensor(5.)
    """
    check_same_shape("node_loss", s, t)
    return mean_square(s - t.detach())


@in_float32
def node_errors(s: Tensor, t: Tensor) -> Tensor:
    """Averages the squared difference between the features of each box; see :func:`node_loss`.

    Args:
        s: (M, ...) features of the student's boxes.
        t: features of the teacher for the same boxes, of the same shape; no gradient flows into them.

    Returns:
        (M,) errors.

    Example:
        >>> import torch
        >>> node_errors(torch.zeros(2, 2), torch.tensor([[1.0, 3.0], [0.0, 2.0]]))
        tensor([5., 2.])
    """
    check_same_shape("node_errors", s, t)
    return sum_of_squares(s - t.detach(), *range(1, s.dim())) / max(math.prod(s.shape[1:]), 1)


def edge_loss(s: Tensor, t: Tensor) -> Tensor:
    """Averages half the squared difference between the cosines of all pairs of boxes.

    The edges of DSIG: Chen et al., 2021, https://arxiv.org/abs/2109.12862, for the foreground and the mined background
    boxes of one image. This is `similarity_loss` of the kind "cosine".

    Args:
        s: (M, ...) features of the student's boxes.
        t: (M, ...) features of the teacher for the same boxes, of any width; no gradient flows into them.

    Returns:
        Scalar; 0 without boxes.

    Example:
        >>> import torch
        >>> edge_loss(torch.eye(2), torch.ones(2, 1))
        tensor(0.2500)
    """
    return similarity_loss(s, t, kind="cosine")
