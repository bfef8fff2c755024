"""Choice of the tap that knows a model."""

from torch import nn

from kd_det.errors import InputError
from kd_det.registry import TAP_REGISTRY
from kd_det.taps.backbone import BackboneTap


def find_tap(architecture: type[nn.Module]) -> type[BackboneTap]:
    """Find the tap of a meta-architecture: that of the class or of its nearest registered base, else the backbone's."""
    names = (f"{base.__name__}Tap" for base in architecture.__mro__)
    return next((TAP_REGISTRY.get(name) for name in names if name in TAP_REGISTRY), BackboneTap)


def build_tap(model: nn.Module) -> BackboneTap:
    """Build the tap of a model.

    Raises:
        InputError: If the model has neither a registered tap nor a ``backbone``.
    """
    tap = find_tap(type(model))
    if tap is BackboneTap and not hasattr(model, "backbone"):
        known = ", ".join(sorted(name for name, _ in TAP_REGISTRY))
        raise InputError(
            f"{type(model).__name__} cannot be distilled: it has no tap (registered are {known}) and no backbone."
        )
    return tap(model)
