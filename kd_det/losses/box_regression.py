"""Compares boxes and box deltas."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .numerics import check_same_shape, check_shape, in_float32, mean, weighted

MAX_LOG_SCALE = math.log(1000 / 16)  # the bound of Detectron2's Box2BoxTransform


@in_float32
def decode_boxes(deltas: Tensor, anchors: Tensor, *, weights: Sequence[float]) -> Tensor:
    """Applies box deltas to anchors or proposals, as Detectron2's ``Box2BoxTransform``, but keeps float64.

    A delta (dx, dy, dw, dh), divided by the weights, moves the centre by dx widths and dy heights and scales the sides
    by exp(dw) and exp(dh); dw and dh are at most log(1000 / 16).

    Args:
        deltas: (R, 4) deltas.
        anchors: (R, 4) boxes x0, y0, x1, y1 to move.
        weights: four divisors of the deltas.

    Returns:
        (R, 4) boxes x0, y0, x1, y1, with a gradient.

    Example:
        >>> deltas, anchors = torch.tensor([[5.0, 0.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.0, 8.0, 4.0]])
        >>> decode_boxes(deltas, anchors, weights=(10, 10, 5, 5))
        tensor([[ 4.,  0., 12.,  4.]])
    """
    if deltas.shape != anchors.shape or deltas.shape[1:] != (4,):
        shapes = f"{tuple(deltas.shape)} and {tuple(anchors.shape)}"
        raise ValueError(f"decode_boxes: deltas and anchors must have the same shape (R, 4), got {shapes}")
    dx, dy, dw, dh = (delta / weight for delta, weight in zip(deltas.unbind(dim=1), weights, strict=True))
    x0, y0, x1, y1 = anchors.unbind(dim=1)
    width, height = x1 - x0, y1 - y0
    x, y = (x0 + x1) / 2 + dx * width, (y0 + y1) / 2 + dy * height
    width, height = dw.clamp(max=MAX_LOG_SCALE).exp() * width, dh.clamp(max=MAX_LOG_SCALE).exp() * height
    return torch.stack((x - width / 2, y - height / 2, x + width / 2, y + height / 2), dim=1)


@in_float32
def encode_boxes(boxes: Tensor, anchors: Tensor, *, weights: Sequence[float]) -> Tensor:
    """Computes the deltas by which anchors or proposals become boxes; inverts :func:`decode_boxes`.

    Detectron2's ``Box2BoxTransform`` computes the same, but checks that all anchors have a width, for which a CPU has
    to wait for the GPU.

    Args:
        boxes: (R, 4) boxes x0, y0, x1, y1 to reach.
        anchors: (R, 4) boxes to move.
        weights: four factors of the deltas.

    Returns:
        (R, 4) deltas.

    Example:
        >>> anchors, boxes = torch.tensor([[0.0, 0.0, 8.0, 4.0]]), torch.tensor([[4.0, 0.0, 12.0, 4.0]])
        >>> encode_boxes(boxes, anchors, weights=(10, 10, 5, 5))
        tensor([[5., 0., 0., 0.]])
    """
    check_same_shape("encode_boxes", boxes, anchors)
    _check_boxes("encode_boxes", boxes)
    size, target_size = anchors[:, 2:] - anchors[:, :2], boxes[:, 2:] - boxes[:, :2]
    centre, target_centre = anchors[:, :2] + 0.5 * size, boxes[:, :2] + 0.5 * target_size
    wx, wy, ww, wh = weights
    dx, dy = ((target_centre - centre) / size).unbind(dim=1)
    dw, dh = (target_size / size).log().unbind(dim=1)
    return torch.stack((wx * dx, wy * dy, ww * dw, wh * dh), dim=1)


@in_float32
def box_overlap_loss(s_boxes: Tensor, t_boxes: Tensor, *, weights: Tensor, normalizer: float | Tensor) -> Tensor:
    """Sums one minus the generalised IoU between the boxes of student and teacher.

    The box part of BCKD: Yang et al., 2023, https://arxiv.org/abs/2308.14286, and of CrossKD: Wang et al., 2023,
    https://arxiv.org/abs/2306.11369: ``sum(weights * (1 - GIoU)) / normalizer``. As in the published code, areas below
    1e-6 count as 1e-6; torchvision's loss adds its eps to all areas instead. Factors such as BCKD's 4 are left to the
    caller.

    Args:
        s_boxes: (R, 4) boxes x0, y0, x1, y1 of the student.
        t_boxes: (R, 4) boxes of the teacher; no gradient flows into them.
        weights: (R,) weight of each pair, through which no gradient flows.
        normalizer: divisor of the sum, such as the number of positive anchors.

    Returns:
        Scalar; 0 without boxes.

    Example:
        >>> s, t = torch.tensor([[0.0, 0.0, 2.0, 2.0]]), torch.tensor([[0.0, 0.0, 2.0, 1.0]])
        >>> box_overlap_loss(s, t, weights=torch.ones(1), normalizer=1)
        tensor(0.5000)
    """
    check_same_shape("box_overlap_loss", s_boxes, t_boxes)
    _check_boxes("box_overlap_loss", s_boxes)
    losses = 1 - _generalized_iou(s_boxes, t_boxes.detach())
    return weighted("box_overlap_loss", losses, weights).sum() / normalizer


@in_float32
def bounded_regression_loss(s_deltas: Tensor, t_deltas: Tensor, targets: Tensor, *, margin: float = 0.0) -> Tensor:
    """Averages the student's squared error over boxes, where it is not clearly below the teacher's.

    Chen et al., NeurIPS 2017, "Learning Efficient Object Detection Models with Knowledge Distillation". With the error
    ``e = |s - y|^2``, a box costs e if ``e + margin > |t - y|^2``, else nothing. The teacher is only a bound: the
    gradient pulls towards the label. The method's factor is left to the caller.

    Args:
        s_deltas: (R, 4) deltas of the student, of foreground boxes.
        t_deltas: (R, 4) deltas of the teacher; no gradient flows into them.
        targets: (R, 4) deltas y of the labels.
        margin: by how much the student's error must be below the teacher's.

    Returns:
        Scalar: sum over the four coordinates, mean over boxes; 0 without boxes.

    Example:
        >>> s, t, y = torch.tensor([[1.0, 0.0, 0.0, 2.0]]), torch.ones(1, 4), torch.zeros(1, 4)
        >>> bounded_regression_loss(s, t, y)
        tensor(5.)
    """
    name = "bounded_regression_loss"
    check_same_shape(name, s_deltas, t_deltas)
    check_shape(name, "targets", targets, tuple(s_deltas.shape))
    _check_boxes(name, s_deltas)
    targets = targets.detach()
    error = (s_deltas - targets).square().sum(dim=1)
    bound = (t_deltas.detach() - targets).square().sum(dim=1)
    return mean(error.masked_fill(error + margin <= bound, 0))


def _generalized_iou(a: Tensor, b: Tensor, eps: float = 1e-6) -> Tensor:
    """Computes the generalised IoU (Rezatofighi et al., 2019) of each pair of boxes, (R,)."""
    common = _area(torch.maximum(a[:, :2], b[:, :2]), torch.minimum(a[:, 2:], b[:, 2:]))
    hull = _area(torch.minimum(a[:, :2], b[:, :2]), torch.maximum(a[:, 2:], b[:, 2:])).clamp(min=eps)
    union = ((a[:, 2:] - a[:, :2]).prod(dim=1) + (b[:, 2:] - b[:, :2]).prod(dim=1) - common).clamp(min=eps)
    return common / union - (hull - union) / hull


def _area(first: Tensor, last: Tensor) -> Tensor:
    """Computes the area between two corners (R, 2); 0 where they are the wrong way round."""
    return (last - first).clamp(min=0).prod(dim=1)


def _check_boxes(name: str, boxes: Tensor) -> None:
    if boxes.shape[1:] != (4,):
        raise ValueError(f"{name}: expected a tensor of shape (R, 4), got {tuple(boxes.shape)}")
