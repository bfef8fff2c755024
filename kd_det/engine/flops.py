"""What the inference of a model costs."""

from typing import Any

import torch
from detectron2.utils.analysis import FlopCountAnalysis
from torch import nn


@torch.no_grad()
def count_gflops(model: nn.Module, image: dict[str, Any]) -> float:
    """Billions of multiply-adds of the inference on an image, as fvcore counts them.

    Args:
        model: In evaluation mode.
        image: A dict as the mapper makes it.
    """
    count = FlopCountAnalysis(model, [{"image": image["image"]}])
    count.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    return count.total() / 1e9
