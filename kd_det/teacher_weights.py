"""Prepares the weights of a frozen network: stores them in the precision of its forward pass, and folds batch norms."""

from collections.abc import Iterator
from typing import Any

import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from kd_det.errors import InputError


def store_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Stores the weights of all convolutions and linear layers in the type that autocast would convert them to.

    Autocast keeps no converted copy of weights that need no gradient: it would convert all of them in every step. The
    results are the same bit for bit. Norms and everything else stay as they are.

    Args:
        model: A frozen model, which runs under autocast of the same type from now on.
        dtype: float16 or bfloat16.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)


def fold_norms(model: nn.Module) -> int:
    """Folds batch norms with stored statistics into the Detectron2 convolutions that carry them.

    The convolution with the new weights computes what both computed before, up to rounding.

    Args:
        model: A frozen model in evaluation mode, which is changed in place.

    Returns:
        The number of batch norms that were folded.
    """
    pairs = list(foldable_norms(model))
    for convolution, norm in pairs:
        convolution.weight, convolution.bias = fuse_conv_bn_weights(
            convolution.weight, convolution.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        convolution.norm = None
    return len(pairs)


def foldable_norms(model: nn.Module) -> Iterator[tuple[Conv2d, Any]]:
    """Yields each Detectron2 convolution that carries a batch norm with stored statistics, and the batch norm."""
    for module in model.modules():
        if not isinstance(module, Conv2d):
            continue
        norm = module.norm
        stored = isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.track_running_stats
        if stored or isinstance(norm, FrozenBatchNorm2d):
            yield module, norm


def check_foldable(model: nn.Module) -> None:
    """Checks that a model has a batch norm that :func:`fold_norms` can fold.

    Raises:
        InputError: If it has none.
    """
    if next(foldable_norms(model), None) is None:
        raise InputError(
            "KD.TEACHER.FOLD_NORM: must be False for this teacher, none of whose convolutions is one of Detectron2's "
            "with a batch norm that has stored statistics."
        )
