"""Chooses the tap that can read a model."""

from torch import nn

from kd_det.errors import InputError
from kd_det.registry import TAP_REGISTRY
from kd_det.taps.backbone import BackboneTap


def find_tap(architecture: type[nn.Module]) -> type[BackboneTap]:
    """Finds the tap registered for a class or its nearest base class; without any, the tap of the backbone."""
    names = (f"{base.__name__}Tap" for base in architecture.__mro__)
    return next((TAP_REGISTRY.get(name) for name in names if name in TAP_REGISTRY), BackboneTap)


def build_tap(model: nn.Module) -> BackboneTap:
    """Builds the tap of a model.

    Raises:
        InputError: If the model has neither a registered tap nor a ``backbone``.

    Example:
        >>> model = nn.Module()
        >>> model.backbone = nn.Identity()
        >>> type(build_tap(model)).__name__
        'BackboneTap'
    """
    tap = find_tap(type(model))
    if tap is BackboneTap and not hasattr(model, "backbone"):
        known = ", ".join(sorted(name for name, _ in TAP_REGISTRY))
        raise InputError(
            f"{type(model).__name__} cannot be distilled: it has no tap (registered are {known}) and no backbone."
        )
    return tap(model)
