"""The creation of timm's networks, with one line for what cannot be."""

from typing import Any

import timm
from torch import nn

from kd_det.errors import InputError, reason


def create_timm_model(name: str, *, pretrained: bool, **options: Any) -> nn.Module:
    """Create a network of the timm library.

    Args:
        name: timm's name of the network.
        pretrained: Whether to fetch timm's weights.
        options: More of ``timm.create_model``.

    Raises:
        InputError: If timm does not know the network, or its weights cannot be fetched or read.
        TypeError: If the network does not have an option.
    """
    try:
        return timm.create_model(name, pretrained=pretrained, **options)
    except TypeError:
        raise
    except Exception as error:  # Hubs, their libraries and broken files have their own.
        if isinstance(error, RuntimeError) or not pretrained:
            raise InputError(f"MODEL.TIMM.NAME: {name!r}: {reason(error)}") from error
        raise InputError(
            f"MODEL.TIMM.PRETRAINED: timm's weights of {name!r} cannot be fetched: {reason(error)} Set it to False and "
            "give their file as MODEL.WEIGHTS; on a machine with network, "
            f"torch.save(timm.create_model({name!r}, pretrained=True).state_dict(), FILE) writes it."
        ) from error
