"""Provides what the heads on values before a ReLU share: stages, connectors outside float16, and sums over stages."""

from collections.abc import Mapping, Sequence

import torch
from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from kd_det.errors import InputError, check_choice
from kd_det.heads.build import check_feature_maps, without_relu
from kd_det.losses.numerics import add_up, cast_for_layers, without_float16

SCALES = ("map_invariant", "code")
# Number of cells in the deepest map of a CIFAR network, for which the published code's factors were chosen.
REFERENCE_CELLS = 8 * 8


def check_stage_options(
    key: str, node, student_spec: Mapping[str, ShapeSpec], teacher_spec: Mapping[str, ShapeSpec]
) -> None:
    """Checks IN_FEATURES and SCALE of a head's node.

    Args:
        key: Name of the node, for messages.
        node: The node.

    Raises:
        InputError: If a feature is not a stage with a ReLU at its end, the stages do not go from fine to coarse, or
            the scale is not allowed.
    """
    names = node.IN_FEATURES
    both = student_spec.keys() & teacher_spec.keys()
    allowed = [name for name, shape in student_spec.items() if shape.stride and f"{name}_preact" in both]
    if not names:
        raise InputError(f"{key}.IN_FEATURES: no stage is named; allowed are {', '.join(allowed)}.")
    for side, spec in (("student", student_spec), ("teacher", teacher_spec)):
        for name in without_relu(names, spec):
            raise InputError(
                f"{key}.IN_FEATURES: there is no ReLU at the end of the {side}'s {name!r}, so its sign has no "
                f"meaning; allowed are {', '.join(allowed) or 'none of these two networks'}."
            )
    signals = [f"{name}_preact" for name in names]
    check_feature_maps(f"{key}.IN_FEATURES", signals, student_spec, teacher_spec)
    strides = [student_spec[signal].stride for signal in signals]
    if strides != sorted(strides):
        raise InputError(
            f"{key}.IN_FEATURES: must go from the finest stage to the coarsest, but the strides of "
            f"{', '.join(names)} are {strides}."
        )
    check_choice(f"{key}.SCALE", node.SCALE, SCALES)


def connect(connector: nn.Module, x: Tensor) -> Tensor:
    """Runs a connector, not in float16, for which the gradient of a sum over elements may be too large."""
    with without_float16(x.device.type):
        return connector(cast_for_layers(x))


def sum_over_stages(losses: Sequence[Tensor], deepest: Tensor, mask: Tensor | None, *, scale: str) -> Tensor:
    """Weights the stages as published, the deepest by 1 and each finer one by half the next weight, and sums.

    Args:
        losses: Losses of the stages, finest first, summed over cells.
        deepest: Map of the last stage, (N, C, H, W).
        mask: Its cells that count.
        scale: "code" leaves the sum as it is. "map_invariant" multiplies it by 64 over the number of cells of the
            deepest map, so that images of any size give the strength that the loss has on CIFAR, where the two are
            equal.
    """
    total = add_up(loss / 2 ** (len(losses) - 1 - i) for i, loss in enumerate(losses))
    if scale == "code":
        return total
    if mask is None:
        return total * REFERENCE_CELLS / (deepest.shape[2] * deepest.shape[3])
    return total * REFERENCE_CELLS / torch.clamp(mask.sum().to(total) / max(len(mask), 1), min=1)
