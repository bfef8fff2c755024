"""Choice of the tap that knows a model."""

from torch import nn

from kd_det.errors import InputError
from kd_det.registry import TAP_REGISTRY
from kd_det.taps.backbone import BackboneTap


def build_tap(model: nn.Module) -> BackboneTap:
    """Build the tap of a model: that of its class or nearest registered base, else its backbone's.

    Raises:
        InputError: If the model has neither a registered tap nor a ``backbone``.
    """
    for base in type(model).__mro__:
        if f"{base.__name__}Tap" in TAP_REGISTRY:
            return TAP_REGISTRY.get(f"{base.__name__}Tap")(model)
    if not hasattr(model, "backbone"):
        known = ", ".join(sorted(name for name, _ in TAP_REGISTRY))
        raise InputError(
            f"{type(model).__name__} cannot be distilled: it has no tap (registered are {known}) and no backbone."
        )
    return BackboneTap(model)
