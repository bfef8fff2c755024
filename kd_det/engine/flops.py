"""Counts the operations of a model's inference."""

from typing import Any

import torch
from detectron2.utils.analysis import FlopCountAnalysis
from torch import nn


@torch.no_grad()
def count_gflops(model: nn.Module, image: dict[str, Any]) -> float:
    """Counts the multiply-adds, in billions, of the inference on one image with fvcore.

    Args:
        model: A model in evaluation mode.
        image: The dict that a mapper makes of an image.
    """
    count = FlopCountAnalysis(model, [{"image": image["image"]}])
    count.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    return count.total() / 1e9
