"""Read from a model's signals what it is and how many classes it knows."""

from collections.abc import Mapping

from detectron2.layers import ShapeSpec
from torch import nn

from kd_det.taps.build import build_tap

# Maps the signal of class logits to what such a model is, and to how many of its channels are not classes.
CLASS_SIGNALS = {"logits": ("image classifier", 0), "roi_logits": ("detector", 1), "dense_logits": ("detector", 0)}


def count_classes(spec: Mapping[str, ShapeSpec]) -> int | None:
    """Return the number of classes of a model whose signals have these shapes; None where no signal has classes."""
    return next((spec[name].channels - others for name, (_, others) in CLASS_SIGNALS.items() if name in spec), None)


def describe_model(model: nn.Module) -> str:
    """Say in words what a model is and how many classes it knows."""
    spec = build_tap(getattr(model, "student", model)).spec()
    kind = next((kind for name, (kind, _) in CLASS_SIGNALS.items() if name in spec), "detector")
    return f"{kind} of {count_classes(spec) if count_classes(spec) is not None else 'unknown'} classes"
