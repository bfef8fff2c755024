"""What the heads on values before a ReLU share: the stages, connectors, and the sum over images, cells and stages."""

from collections.abc import Callable, Mapping, Sequence

import torch
from detectron2.layers import Conv2d, ShapeSpec
from fvcore.nn import weight_init
from torch import Tensor, nn

from kd_det.errors import InputError
from kd_det.heads.build import check_feature_maps, without_relu
from kd_det.heads.norms import build_norm
from kd_det.losses.numerics import cast_up

SCALES = ("map_invariant", "code")
# Of the deepest map of a CIFAR network, for which the published code's factors were chosen.
REFERENCE_CELLS = 8 * 8


def check_stage_options(
    key: str, node, student_spec: Mapping[str, ShapeSpec], teacher_spec: Mapping[str, ShapeSpec]
) -> None:
    """Check IN_FEATURES and SCALE of a head's node.

    Args:
        key: Name of the node, for messages.
        node: The node.

    Raises:
        InputError: If a feature is no stage with a ReLU at its end, or they do not go from fine to coarse.
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
    if node.SCALE not in SCALES:
        raise InputError(f"{key}.SCALE: {node.SCALE!r} is not one of {', '.join(SCALES)}.")


def build_connector(student_channels: int, teacher_channels: int, *, norm: str) -> nn.Module:
    """Build a 1x1 convolution with a normalisation, which brings the student's channels to the teacher's."""
    layer = build_norm(norm, teacher_channels)
    connector = Conv2d(student_channels, teacher_channels, 1, bias=False, norm=layer)
    weight_init.c2_msra_fill(connector)
    return connector


def connect(connector: nn.Module, x: Tensor) -> Tensor:
    """Run a connector in float32 at least: the gradient of a sum over elements may be too large for float16."""
    with torch.autocast(x.device.type, enabled=False):
        return connector(cast_up(x))


def sum_over_cells(
    function: Callable[[Tensor, Tensor], Tensor], own: Tensor, other: Tensor, mask: Tensor | None
) -> Tensor:
    """Apply a loss that sums over elements and divides by the number of images, to the cells that count.

    Args:
        function: The loss, of (N, C, H, W) or of cells (M, C).
        own: The student's map, (N, C, H, W).
        other: The teacher's map, of the same shape.
        mask: Booleans (N, 1, H, W), or None for all cells.
    """
    if mask is None:
        return function(own, other)
    own, other = (x.movedim(1, -1)[mask[:, 0]] for x in (own, other))
    return function(own, other) * len(own) / max(len(mask), 1)


def sum_over_stages(losses: Sequence[Tensor], deepest: Tensor, mask: Tensor | None, *, scale: str) -> Tensor:
    """Weigh the stages as published, the deepest 1 and each finer one half of the next, and sum.

    Args:
        losses: Of the stages, finest first, summed over cells.
        deepest: Map of the last stage, (N, C, H, W).
        mask: Its cells that count.
        scale: "code" leaves the sum as it is. "map_invariant" multiplies it by 64 over the number of cells of the
            deepest map: the strength that the loss has on CIFAR, where both are the same, whatever the size of the
            images.
    """
    total = sum(loss / 2 ** (len(losses) - 1 - i) for i, loss in enumerate(losses))
    if scale == "code":
        return total
    if mask is None:
        return total * REFERENCE_CELLS / (deepest.shape[2] * deepest.shape[3])
    return total * REFERENCE_CELLS / torch.clamp(mask.sum().to(total) / max(len(mask), 1), min=1)
