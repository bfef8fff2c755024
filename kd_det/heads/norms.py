"""Builds the normalisation inside heads, which their NORM names as in Detectron2's ``get_norm``."""

from collections.abc import Iterable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import get_norm
from detectron2.utils import comm
from torch import Tensor, nn

from kd_det.errors import InputError, check_choice

NORMS = ("BN", "SyncBN", "GN", "LN")


def check_norm(cfg: CfgNode, node: str, channels: Iterable[int], *, allowed: Sequence[str] = NORMS) -> None:
    """Checks the NORM of a head's node.

    In a single process, SyncBN is the same as BN.

    Args:
        cfg: The whole config.
        node: Name of the node below KD.
        channels: Numbers of channels that are normalised.
        allowed: The choices; "" stands for no normalisation.

    Raises:
        InputError: If NORM is not one of the choices, or cannot be used on these channels or this device.
    """
    norm, key = cfg.KD[node].NORM, f"KD.{node}.NORM"
    check_choice(key, norm, allowed)
    uneven = sorted({c for c in channels if c % 32})
    if norm == "GN" and uneven:
        raise InputError(f"{key}: GN has 32 groups, which do not divide {', '.join(map(str, uneven))} channels evenly.")
    if norm == "SyncBN" and cfg.MODEL.DEVICE == "cpu" and comm.get_world_size() > 1:
        raise InputError(f"{key}: SyncBN of several processes needs GPUs; on CPUs there are BN, GN and LN.")


class RunningStatistics(nn.modules.batchnorm._BatchNorm):
    """Normalises a channel with fewer than two values as in evaluation; a base of batch norms.

    In training, torch's layers raise ValueError for a batch with one value per channel, such as a map of one cell of
    one image.
    """

    def forward(self, x: Tensor) -> Tensor:
        # A synchronised layer normalises over all processes, and every process must take part.
        synchronised = isinstance(self, nn.SyncBatchNorm) and comm.get_world_size() > 1
        if self.training and not synchronised and x.numel() <= x.shape[1]:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(x)


class BatchNorm2d(RunningStatistics, nn.BatchNorm2d):
    """Normalises over the batch, for any number of values."""


class SyncBatchNorm(RunningStatistics, nn.SyncBatchNorm):
    """Normalises over the batches of all processes, for any number of values."""


class GroupNorm(nn.GroupNorm):
    """Normalises over groups of channels, for any number of values; a group of one value gives the bias."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


LAYERS = {"BN": BatchNorm2d, "SyncBN": SyncBatchNorm, "GN": partial(GroupNorm, 32)}


def build_norm(norm: str, channels: int) -> nn.Module:
    """Builds a normalisation that accepts any number of values, such as a map of one cell of one image, or no boxes.

    Args:
        norm: One of :data:`NORMS`.
        channels: Number of channels to normalise.
    """
    return get_norm(LAYERS.get(norm, norm), channels)
