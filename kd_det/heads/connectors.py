"""Builds the connectors that bring the student's channels to the teacher's."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d
from fvcore.nn import weight_init
from torch import Tensor

from kd_det.heads.norms import build_norm


def build_connector(
    student_channels: int,
    teacher_channels: int,
    *,
    norm: str = "",
    activation: Callable[[Tensor], Tensor] | None = None,
    msra: bool = False,
) -> Conv2d:
    """Builds a 1x1 convolution that brings the student's channels to the teacher's.

    Args:
        student_channels: Number of input channels.
        teacher_channels: Number of output channels.
        norm: Normalisation after the convolution; see :func:`kd_det.heads.norms.build_norm`; "" for none.
        activation: Function that is applied last.
        msra: Whether the convolution has no bias, and initial weights that keep the variance through a ReLU (He et
            al., 2015); otherwise it is initialised as torch does.
    """
    layer = build_norm(norm, teacher_channels) if norm else None
    connector = Conv2d(student_channels, teacher_channels, 1, bias=not msra, norm=layer, activation=activation)
    if msra:
        weight_init.c2_msra_fill(connector)
    return connector


def build_faint_conv(channels: int, teacher_channels: int, *, rectified: bool = False) -> Conv2d:
    """Builds the adapter of FGFI and DeFeat: a 3x3 convolution whose weights begin at 2e-4 at most.

    Args:
        rectified: Whether a ReLU follows it.
    """
    conv = Conv2d(channels, teacher_channels, kernel_size=3, padding=1, activation=F.relu if rectified else None)
    with torch.no_grad():
        conv.weight.normal_().fmod_(2).mul_(1e-4)
    return conv
