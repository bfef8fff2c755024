"""Creates timm networks and reports failures in one line."""

from contextlib import suppress
from typing import Any

import timm
import torch
from torch import nn

from kd_det.construction import REJECTIONS
from kd_det.errors import InputError, reason


def create_timm_model(name: str, *, pretrained: bool, **options: Any) -> nn.Module:
    """Creates a network of the timm library.

    Args:
        name: timm's name of the network.
        pretrained: Whether to fetch timm's weights.
        options: Further arguments of ``timm.create_model``.

    Raises:
        InputError: If timm does not know the network, or its weights cannot be fetched or read.
        TypeError: If the network does not accept an option.
    """
    try:
        return timm.create_model(name, pretrained=pretrained, **options)
    except TypeError:
        raise
    except Exception as error:  # Hubs, their libraries and broken files raise their own errors.
        if isinstance(error, RuntimeError) or not pretrained:
            raise InputError(f"MODEL.TIMM.NAME: {name!r}: {reason(error)}") from error
        raise InputError(
            f"MODEL.TIMM.PRETRAINED: timm's weights of {name!r} cannot be fetched: {reason(error)} Set it to False and "
            "give their file as MODEL.WEIGHTS; on a machine with network, "
            f"torch.save(timm.create_model({name!r}, pretrained=True).state_dict(), FILE) writes it."
        ) from error


def create_resizable_timm_model(name: str, size: tuple[int, int], **options: Any) -> nn.Module:
    """Creates a network of the timm library that takes images of a given size, even if it was made for another one.

    Args:
        name: timm's name of the network.
        size: Height and width of the images that the network must accept.
        options: Further arguments of :func:`create_timm_model`.

    Raises:
        InputError: For the reasons of :func:`create_timm_model`, or if the network only takes images of other sizes.
    """
    net = create_timm_model(name, **options)
    rejection = probe(net, size, options["in_chans"])
    if rejection is None:
        return net
    with suppress(TypeError):  # Not every network has this option.
        net = create_timm_model(name, dynamic_img_size=True, **options)
        rejection = probe(net, size, options["in_chans"])
    if rejection is None:
        return net
    raise InputError(
        f"MODEL.TIMM.NAME: {name!r} does not take images of {size[0]} x {size[1]} pixels: {reason(rejection)}"
    ) from rejection


@torch.no_grad()
def probe(net: nn.Module, size: tuple[int, int], channels: int) -> Exception | None:
    """Runs a network on a black image; returns the error with which it rejects the image, or None."""
    training = net.training
    try:
        net.eval()(torch.zeros(1, channels, *size))
    except REJECTIONS as error:
        return error
    finally:
        net.train(training)
    return None
