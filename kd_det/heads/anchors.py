"""Finds and counts the anchors that are labelled as objects."""

import torch
from detectron2.utils import comm
from fvcore.nn.distributed import differentiable_all_reduce
from torch import Tensor


def is_positive(labels: Tensor, *, background: int) -> Tensor:
    """Marks the anchors that are labelled as objects; see :func:`positive_count`."""
    return (labels >= 0) & (labels != background)


@torch.no_grad()
def positive_count(labels: Tensor, *, background: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Counts the anchors, or boxes, that are labelled as objects, to divide sums by.

    Every process must call this, since the mean is taken over all of them.

    Args:
        labels: Label of each anchor, of any shape; below 0 where the detector's own losses leave an anchor out.
        background: Label of the background: the number of classes, but 0 in an RPN.
        dtype: Type of the result.

    Returns:
        Scalar: their number, averaged over processes; at least 1. It is computed without waiting for the GPU.

    Example:
        >>> positive_count(torch.tensor([[0, 3, -1], [2, 3, 1]]), background=3)
        tensor(3.)
    """
    count = is_positive(labels, background=background).sum(dtype=dtype)
    return (differentiable_all_reduce(count) / comm.get_world_size()).clamp(min=1)
