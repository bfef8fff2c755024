"""Compares predictions that are maps by soft targets: heatmaps of keypoints, and semantic segmentations."""

import torch.nn.functional as F
from torch import Tensor

from kd_det.losses import channel_wise_loss, soft_target_loss
from kd_det.losses.numerics import cast_up, mean_weights

SEM_SEG = ("pixel", "channel")


def heatmap_loss(s_logits: Tensor, t_logits: Tensor, labels: Tensor, *, temperature: float) -> Tensor:
    """Computes T^2 KL of the softmax over the cells of each visible keypoint's heatmap, mean over these keypoints.

    Args:
        s_logits: Logits of the student, (V, P, m, m).
        t_logits: Logits of the teacher, (V, P, m, m).
        labels: Cell of each keypoint, (V, P), -1 where it is not visible.
        temperature: T of the softmax.
    """
    rows = (logits.flatten(2) for logits in (s_logits, t_logits))
    return soft_target_loss(*rows, temperature=temperature, weights=mean_weights(labels >= 0, cast_up(s_logits).dtype))


def segmentation_loss(s_logits: Tensor, t_logits: Tensor, labels: Tensor, *, kind: str, temperature: float) -> Tensor:
    """Computes T^2 KL of a semantic segmentation, without the pixels that the labels leave out.

    Args:
        s_logits: Logits of the student, (N, K, h, w).
        t_logits: Logits of the teacher, (N, K, h, w).
        labels: Classes of the pixels of the images, (N, H, W), -1 for those to leave out.
        kind: "pixel", the softmax over the classes of each pixel, mean over pixels; or "channel", the softmax over the
            pixels of each class, mean over images and classes, see :func:`kd_det.losses.channel_wise_loss`.
        temperature: T of the softmax.
    """
    # Each cell has the label of the pixel at its centre.
    valid = F.interpolate((labels[:, None] >= 0).byte(), size=s_logits.shape[-2:], mode="nearest-exact").bool()
    if kind == "channel":
        return channel_wise_loss(s_logits, t_logits, temperature=temperature, mask=valid)
    rows = (logits.permute(0, 2, 3, 1) for logits in (s_logits, t_logits))
    return soft_target_loss(*rows, temperature=temperature, weights=mean_weights(valid[:, 0], cast_up(s_logits).dtype))
