"""Makes equal runs equal on a GPU: ``KD.DETERMINISTIC``."""

import os

import torch
from detectron2.config import CfgNode


def make_deterministic(cfg: CfgNode) -> None:
    """Makes PyTorch use deterministic algorithms from now on if ``KD.DETERMINISTIC`` is True.

    This must happen before anything computes on a GPU: cuBLAS reads its variable once. An operation that has no
    deterministic form on a GPU then raises PyTorch's error, which names it.

    Args:
        cfg: The whole config.
    """
    if not cfg.KD.DETERMINISTIC:
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
