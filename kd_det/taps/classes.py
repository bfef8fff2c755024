"""Infers from a model's signals what kind of model it is and how many classes it predicts."""

from collections.abc import Mapping

from detectron2.layers import ShapeSpec
from torch import nn

from kd_det.taps.build import build_tap

# Maps the signal of class logits to the kind of model that has it, and to the number of its channels for background.
CLASS_SIGNALS = {"logits": ("image classifier", 0), "roi_logits": ("detector", 1), "dense_logits": ("detector", 0)}


def count_classes(spec: Mapping[str, ShapeSpec]) -> int | None:
    """Counts the classes of a model whose signals have these shapes; None if it has no class logits."""
    counts = (spec[name].channels - background for name, (_, background) in CLASS_SIGNALS.items() if name in spec)
    return next(counts, None)


def describe_model(model: nn.Module) -> str:
    """Describes in words what kind of model this is and how many classes it predicts."""
    spec = build_tap(getattr(model, "student", model)).spec()
    kind = next((kind for name, (kind, _) in CLASS_SIGNALS.items() if name in spec), "detector")
    return f"{kind} of {count_classes(spec) if count_classes(spec) is not None else 'unknown'} classes"
