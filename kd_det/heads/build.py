"""Construction of the distillation heads that a config names."""

from collections.abc import Mapping, Sequence

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from torch import nn

from kd_det.errors import InputError
from kd_det.registry import KD_HEAD_REGISTRY


def build_kd_heads(
    cfg: CfgNode, student_spec: Mapping[str, ShapeSpec], teacher_spec: Mapping[str, ShapeSpec]
) -> nn.ModuleDict:
    """Build the heads that ``KD.HEADS`` names.

    Args:
        cfg: The whole config.
        student_spec: Name to shape of each signal that the student has.
        teacher_spec: The same of the teacher.

    Returns:
        Name to head, in the order of ``KD.HEADS``.

    Raises:
        InputError: If a head is unknown or named twice, or asks for a signal that one side lacks.
    """
    heads = nn.ModuleDict()
    for name in cfg.KD.HEADS:
        if name not in KD_HEAD_REGISTRY:
            known = ", ".join(sorted(head for head, _ in KD_HEAD_REGISTRY))
            raise InputError(f"KD.HEADS: {name!r} is not a distillation head; registered are {known}.")
        if name in heads:
            raise InputError(f"KD.HEADS: {name!r} is named twice; a head may stand there once.")
        head = KD_HEAD_REGISTRY.get(name)(cfg, student_spec, teacher_spec)
        check_signals(f"KD.HEADS: {name}", head.signals, student_spec, teacher_spec)
        heads[name] = head
    return heads


def check_feature_maps(
    key: str, names: Sequence[str], student_spec: Mapping[str, ShapeSpec], teacher_spec: Mapping[str, ShapeSpec]
) -> None:
    """Check that names are given, and that both networks have feature maps of these names, at equal strides.

    Args:
        key: The config key that holds the names, for messages.

    Raises:
        InputError: If not.
    """
    maps = [name for name, shape in student_spec.items() if shape.stride is not None]
    if not names:
        raise InputError(f"{key}: no feature is named; the student's backbone has {', '.join(maps)}.")
    check_signals(key, names, student_spec, teacher_spec)
    for name in names:
        if name not in maps:
            raise InputError(f"{key}: {name!r} is not a feature map of the backbone, which has {', '.join(maps)}.")


def check_signals(
    key: str, names: Sequence[str], student_spec: Mapping[str, ShapeSpec], teacher_spec: Mapping[str, ShapeSpec]
) -> None:
    """Check that both networks have the named signals, and at equal strides.

    Args:
        key: The config key that names the signals, for messages.

    Raises:
        InputError: If a side lacks one of them, or the strides differ.
    """
    for name in names:
        for side, spec in (("student", student_spec), ("teacher", teacher_spec)):
            if name not in spec:
                raise InputError(f"{key}: {name!r} is not a signal of the {side}, which has {', '.join(spec)}.")
        strides = student_spec[name].stride, teacher_spec[name].stride
        if strides[0] != strides[1]:
            raise InputError(
                f"{key}: {name!r} has stride {strides[0]} in the student but {strides[1]} in the teacher; "
                "the strides must be equal."
            )
