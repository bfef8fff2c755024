"""Infers from a model's signals what kind of model it is and how many classes it predicts."""

from collections.abc import Mapping

from detectron2.layers import ShapeSpec
from torch import nn

from kd_det.signals import SOURCES
from kd_det.taps.build import build_tap


def count_classes(spec: Mapping[str, ShapeSpec]) -> int | None:
    """Counts the classes of a model whose signals have these shapes; None if it has no class logits."""
    counts = (
        spec[source.logits].channels - source.background
        for source in SOURCES.values()
        if source.logits in spec and source.background is not None
    )
    return next(counts, None)


def describe_model(model: nn.Module) -> str:
    """Describes in words what kind of model this is and how many classes it predicts."""
    spec = build_tap(getattr(model, "student", model)).spec()
    kind = next((source.model for source in SOURCES.values() if source.logits in spec), "detector")
    return f"{kind} of {count_classes(spec) if count_classes(spec) is not None else 'unknown'} classes"
