"""Provides what the heads on values before a ReLU share: stages, float32 connectors, and sums over cells and stages."""

from collections.abc import Callable, Mapping, Sequence

import torch
from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from kd_det.errors import InputError, check_choice
from kd_det.heads.build import check_feature_maps, without_relu
from kd_det.losses.numerics import add_up, cast_up

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
    """Runs a connector in float32 or wider: the gradient of a sum over elements may be too large for float16."""
    with torch.autocast(x.device.type, enabled=False):
        return connector(cast_up(x))


def sum_over_cells(
    function: Callable[[Tensor, Tensor], Tensor], student: Tensor, teacher: Tensor, mask: Tensor | None
) -> Tensor:
    """Applies a loss that sums over elements and divides by the number of images to the cells that count.

    Args:
        function: The loss, of maps (N, C, H, W) or of cells (M, C).
        student: The student's map, (N, C, H, W).
        teacher: The teacher's map, of the same shape.
        mask: Booleans (N, 1, H, W), or None for all cells.
    """
    if mask is None:
        return function(student, teacher)
    student, teacher = (x.movedim(1, -1)[mask[:, 0]] for x in (student, teacher))
    return function(student, teacher) * len(student) / max(len(mask), 1)


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
