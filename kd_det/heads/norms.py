"""Normalisation inside heads, chosen by their NORM as Detectron2's ``get_norm`` names it."""

from collections.abc import Iterable, Sequence

from detectron2.config import CfgNode
from detectron2.utils import comm

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
