"""Normalisation inside heads, chosen by their NORM as Detectron2's ``get_norm`` names it."""

from collections.abc import Iterable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import get_norm
from detectron2.utils import comm
from torch import Tensor, nn

from kd_det.errors import InputError

NORMS = ("BN", "SyncBN", "GN", "LN")


def check_norm(cfg: CfgNode, node: str, channels: Iterable[int], *, allowed: Sequence[str] = NORMS) -> None:
    """Check the NORM of a head's node.

    SyncBN of a single process is BN.

    Args:
        cfg: The whole config.
        node: Name of the node below KD.
        channels: Numbers of channels that are normalised.
        allowed: The choices; "" is none.

    Raises:
        InputError: If it is none of them, or cannot be used on these channels or this device.
    """
    norm, key = cfg.KD[node].NORM, f"KD.{node}.NORM"
    if norm not in allowed:
        raise InputError(f"{key}: {norm!r} is not one of {', '.join(name or repr(name) for name in allowed)}.")
    uneven = sorted({c for c in channels if c % 32})
    if norm == "GN" and uneven:
        raise InputError(f"{key}: GN has 32 groups, which do not divide {', '.join(map(str, uneven))} channels evenly.")
    if norm == "SyncBN" and cfg.MODEL.DEVICE == "cpu" and comm.get_world_size() > 1:
        raise InputError(f"{key}: SyncBN of several processes needs GPUs; on CPUs there are BN, GN and LN.")


class RunningStatistics:
    """Mixin of batch norms: a channel with fewer than two values is normalised as in evaluation.

    torch's layers raise ValueError in training where a batch has one value per channel, such as a map of one cell of
    one image.
    """

    def forward(self, x: Tensor) -> Tensor:
        # A synchronised layer has the values of all processes, and each of them must take part.
        synchronised = isinstance(self, nn.SyncBatchNorm) and comm.get_world_size() > 1
        if self.training and not synchronised and x.numel() <= x.shape[1]:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(x)


class BatchNorm2d(RunningStatistics, nn.BatchNorm2d):
    """Batch norm of any number of values."""


class SyncBatchNorm(RunningStatistics, nn.SyncBatchNorm):
    """Batch norm over all processes, of any number of values."""


class GroupNorm(nn.GroupNorm):
    """Group norm of any number of values; where a group has a single one, it gives the bias."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


LAYERS = {"BN": BatchNorm2d, "SyncBN": SyncBatchNorm, "GN": partial(GroupNorm, 32)}


def build_norm(norm: str, channels: int) -> nn.Module | None:
    """Build a normalisation that takes any number of values: a map of one cell of one image, or no boxes.

    Args:
        norm: One of :data:`NORMS`, or "", which is none.
        channels: Channels of what is normalised.
    """
    return get_norm(LAYERS.get(norm, norm), channels)
