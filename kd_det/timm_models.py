"""Creates timm networks and reports failures in one line."""

import difflib
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import nn

from kd_det.construction import REJECTIONS
from kd_det.errors import InputError, reason


@dataclass(frozen=True)
class Keys:
    """Names the config keys that ask for a network of timm, for messages.

    Attributes:
        name: The key that names the network.
        weights: The key that asks for timm's weights.
        remedy: What to do where these cannot be fetched.
    """

    name: str
    weights: str
    remedy: str


MODEL_KEYS = Keys("MODEL.TIMM.NAME", "MODEL.TIMM.PRETRAINED", "Set it to False and give their file as MODEL.WEIGHTS")
TEACHER_KEYS = Keys("KD.TEACHER.CONFIG_FILE", "KD.TEACHER.WEIGHTS", "Give their file there")


def pretrained_description(name: str, keys: Keys) -> dict[str, Any]:
    """Returns timm's description of the weights of a network, such as the "mean" and "std" of its images.

    Args:
        name: timm's name of the network; it may end with a dot and the tag of one of its sets of weights.
        keys: The config keys that ask for it, for messages.

    Raises:
        InputError: If timm has no such network or tag; the message lists similar names.
    """
    if not timm.is_model(name):
        similar = difflib.get_close_matches(name.partition(".")[0], timm.list_models(), n=5)
        hint = f"similar names: {', '.join(similar)}" if similar else "timm.list_models() lists its names"
        raise InputError(f"{keys.name}: timm has no network {name!r}; {hint}.")
    try:
        description = timm.get_pretrained_cfg(name)
    except RuntimeError as error:  # The tag is unknown.
        raise InputError(f"{keys.name}: {name!r}: {reason(error)}") from error
    assert description is not None
    return description.to_dict()


def create_timm_model(name: str, *, pretrained: bool, keys: Keys = MODEL_KEYS, **options: Any) -> nn.Module:
    """Creates a network of the timm library.

    Args:
        name: timm's name of the network.
        pretrained: Whether to fetch timm's weights.
        keys: The config keys that ask for it, for messages.
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
            raise InputError(f"{keys.name}: {name!r}: {reason(error)}") from error
        raise InputError(
            f"{keys.weights}: timm's weights of {name!r} cannot be fetched: {reason(error)} {keys.remedy}; "
            "on a machine with network, "
            f"torch.save(timm.create_model({name!r}, pretrained=True).state_dict(), FILE) writes it."
        ) from error


def create_resizable_timm_model(
    name: str, size: tuple[int, int], *, keys: Keys = MODEL_KEYS, **options: Any
) -> nn.Module:
    """Creates a network of the timm library that takes images of a given size, even if it was made for another one.

    Args:
        name: timm's name of the network.
        size: Height and width of the images that the network must accept.
        keys: The config keys that ask for it, for messages.
        options: Further arguments of :func:`create_timm_model`.

    Raises:
        InputError: For the reasons of :func:`create_timm_model`, or if the network only takes images of other sizes.
    """
    net = create_timm_model(name, keys=keys, **options)
    rejection = probe(net, size, options["in_chans"])
    if rejection is None:
        return net
    with suppress(TypeError):  # Not every network has this option.
        net = create_timm_model(name, keys=keys, dynamic_img_size=True, **options)
        rejection = probe(net, size, options["in_chans"])
    if rejection is None:
        return net
    raise InputError(
        f"{keys.name}: {name!r} does not take images of {size[0]} x {size[1]} pixels: {reason(rejection)}"
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
