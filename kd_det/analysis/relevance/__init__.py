"""Explains logits by relevance maps: layer-wise relevance propagation (LRP) from a class logit to the pixels."""

from kd_det.analysis.relevance.explanation import Explanation, explain, relevance_map
from kd_det.analysis.relevance.rules import COMPOSITES, Composite, Epsilon, Gamma, PixelBox, Zero, ZPlus

__all__ = [
    "COMPOSITES",
    "Composite",
    "Epsilon",
    "Explanation",
    "Gamma",
    "PixelBox",
    "ZPlus",
    "Zero",
    "explain",
    "relevance_map",
]
