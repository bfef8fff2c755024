"""Builds the distillation heads that a config names, and checks the signals that they need."""

from collections.abc import Mapping, Sequence
from typing import Protocol, TypeGuard, cast

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from kd_det.errors import InputError
from kd_det.registry import KD_HEAD_REGISTRY
from kd_det.signals import Batch, Signals

# Logits of the classes that data sets name.
NAMED = ("roi_logits", "dense_logits", "logits")
# The shapes of the student's signals and of the teacher's, by their names.
Specs = tuple[Mapping[str, ShapeSpec], Mapping[str, ShapeSpec]]


class StagedHead(Protocol):
    """Declares what a head has that trains something in a stage before the main run.

    Attributes:
        pretrained: Names of its submodules that the stage trains.
        pretrains_student: Whether the stage also trains the student, as far as the head's loss reaches it.
        pretrain_signals: Signals of the student that the stage needs.
        pretrain_teacher_signals: Signals of the teacher that the stage needs.
    """

    pretrained: Sequence[str]
    pretrains_student: bool
    pretrain_signals: Sequence[str]
    pretrain_teacher_signals: Sequence[str]

    def pretrain(self, student: Signals, teacher: Signals, batch: Batch) -> dict[str, Tensor]:
        """Computes the losses of the stage."""

    def get_submodule(self, target: str) -> nn.Module:
        """Returns a submodule by its name."""


def build_kd_heads(
    cfg: CfgNode, student_spec: Mapping[str, ShapeSpec], teacher_spec: Mapping[str, ShapeSpec]
) -> nn.ModuleDict:
    """Builds the heads that ``KD.HEADS`` names.

    Args:
        cfg: The whole config.
        student_spec: Maps each signal that the student has to its shape.
        teacher_spec: Maps each signal that the teacher has to its shape.

    Returns:
        The heads by their names, in the order of ``KD.HEADS``.

    Raises:
        InputError: If a head is unknown or named twice, or asks for a signal that one side lacks.

    Example:
        >>> from detectron2.config import get_cfg
        >>> from kd_det import add_kd_config
        >>> cfg = get_cfg()
        >>> add_kd_config(cfg)
        >>> cfg.KD.HEADS, cfg.KD.HINT.IN_FEATURES = ["HintHead"], ["p3"]
        >>> spec = {"p3": ShapeSpec(channels=8, stride=8)}
        >>> heads = build_kd_heads(cfg, student_spec=spec, teacher_spec=spec)
        >>> heads["HintHead"].signals
        ('p3',)
    """
    return build_heads_of_teachers(cfg, dict.fromkeys(cfg.KD.HEADS, (student_spec, teacher_spec)))


def build_heads_of_teachers(cfg: CfgNode, specs: Mapping[str, Specs]) -> nn.ModuleDict:
    """Builds the heads that ``KD.HEADS`` names, each of which may learn from another teacher.

    Args:
        cfg: The whole config.
        specs: Maps the name of each head to the arguments of :func:`build_kd_heads` that describe the signals.

    Raises:
        InputError: For the reasons of :func:`build_kd_heads`.
    """
    heads = nn.ModuleDict()
    for name in cfg.KD.HEADS:
        student_spec, teacher_spec = specs[name]
        if name not in KD_HEAD_REGISTRY:
            known = ", ".join(sorted(head for head, _ in KD_HEAD_REGISTRY))
            raise InputError(f"KD.HEADS: {name!r} is not a distillation head; registered are {known}.")
        if name in heads:
            raise InputError(f"KD.HEADS: {name!r} is named twice; a head may stand there once.")
        head = KD_HEAD_REGISTRY.get(name)(cfg, student_spec, teacher_spec)
        check_signals(f"KD.HEADS: {name}", head.signals, student_spec, teacher_spec, teacher_signals(head))
        if has_stage(head):
            signals = head.pretrain_signals, head.pretrain_teacher_signals
            check_signals(f"KD.HEADS: {name}", signals[0], student_spec, teacher_spec, signals[1])
        if cfg.KD.COMPILE_HEADS:
            head.compile(dynamic=True)
        heads[name] = head
    return heads


def student_signals(head: nn.Module) -> Sequence[str]:
    """Returns the signals that a head needs from the student."""
    return cast(Sequence[str], head.signals)


def teacher_signals(head: nn.Module) -> Sequence[str]:
    """Returns the signals that a head needs from the teacher; by default those that it needs from the student."""
    return getattr(head, "teacher_signals", student_signals(head))


def has_stage(head: nn.Module) -> TypeGuard[StagedHead]:
    """Reports whether a head has something to train in a stage before the main run."""
    return bool(getattr(head, "pretrained", ())) or getattr(head, "pretrains_student", False)


def freeze_pretrained(head: nn.Module) -> None:
    """Freezes what a stage before the run trains."""
    for name in getattr(head, "pretrained", ()):
        freeze(head.get_submodule(name))


def freeze(module: nn.Module) -> None:
    """Freezes a part of a head: no gradients, and evaluation mode whatever ``head.train()`` asks."""
    module.requires_grad_(False).eval()
    vars(module)["train"] = lambda mode=True: module  # This hides the method of the class.


def check_feature_maps(
    key: str,
    names: Sequence[str],
    student_spec: Mapping[str, ShapeSpec],
    teacher_spec: Mapping[str, ShapeSpec],
    teacher_names: Sequence[str] | None = None,
) -> None:
    """Checks that names are given, and that both networks have feature maps of these names, at equal strides.

    Args:
        key: The config key that holds the names, for messages.
        teacher_names: Names of the teacher's maps, where they differ from the student's.

    Raises:
        InputError: If no name is given, a side lacks a map, or the strides differ.
    """
    maps = [name for name, shape in student_spec.items() if shape.stride is not None]
    if not names:
        raise InputError(f"{key}: no feature is named; the student's backbone has {', '.join(maps)}.")
    check_signals(key, names, student_spec, teacher_spec, teacher_names)
    for name in names:
        if name not in maps:
            raise InputError(f"{key}: {name!r} is not a feature map of the backbone, which has {', '.join(maps)}.")


def select_specs(
    names: Sequence[str], student_spec: Mapping[str, ShapeSpec], teacher_spec: Mapping[str, ShapeSpec]
) -> dict[str, dict[str, ShapeSpec]]:
    """Returns the arguments ``student_spec`` and ``teacher_spec`` of a head that compares the named signals."""
    specs = {"student_spec": student_spec, "teacher_spec": teacher_spec}
    return {side: {name: spec[name] for name in names} for side, spec in specs.items()}


def without_relu(names: Sequence[str], spec: Mapping[str, ShapeSpec]) -> list[str]:
    """Selects the named features that a network has, but not as they are before a ReLU."""
    return [name for name in names if name in spec and f"{name}_preact" not in spec]


def check_signals(
    key: str,
    names: Sequence[str],
    student_spec: Mapping[str, ShapeSpec],
    teacher_spec: Mapping[str, ShapeSpec],
    teacher_names: Sequence[str] | None = None,
) -> None:
    """Checks that both networks have the named signals, and that their maps have equal strides.

    Args:
        key: The config key that names the signals, for messages.
        teacher_names: Names of the teacher's signals, where they differ from the student's: first the signals that are
            compared, in the same order, then any others.

    Raises:
        InputError: If a side lacks one of them, or the strides differ.
    """
    teacher_names = names if teacher_names is None else teacher_names
    for side, spec, needed in (("student", student_spec, names), ("teacher", teacher_spec, teacher_names)):
        for name in needed:
            if name not in spec:
                # Weights of layers are left out, since nobody names them in a config.
                known = ", ".join(x for x in spec if not x.endswith(("_weight", "_bias")))
                hint = suggest_map(name, student_spec, teacher_spec) if side == "teacher" else ""
                raise InputError(f"{key}: {name!r} is not a signal of the {side}, which has {known}{hint}.")
    for name, teacher_name in zip(names, teacher_names, strict=False):
        strides = student_spec[name].stride, teacher_spec[teacher_name].stride
        if None not in strides and strides[0] != strides[1]:
            raise InputError(
                f"{key}: {name!r} has stride {strides[0]} in the student but {strides[1]} in the teacher; "
                "the strides must be equal."
            )


def suggest_map(name: str, student_spec: Mapping[str, ShapeSpec], teacher_spec: Mapping[str, ShapeSpec]) -> str:
    """Suggests, for a message, a feature map of the teacher in the place of one that it lacks; "" if none would do."""
    stride = student_spec[name].stride if name in student_spec else None
    same = [
        other
        for other, shape in teacher_spec.items()
        if stride is not None and shape.stride == stride and not other.endswith("_preact")
    ]
    if not same:
        return ""
    return f"; KD.TEACHER.FEATURES: {{{name}: {same[-1]}}} would compare it with that map, which has the same stride"


def check_class_counts(key: str, name: str, student_spec, teacher_spec) -> None:
    """Checks that both networks have a signal of logits, for the same number of classes.

    Raises:
        InputError: If a side lacks it, or the numbers of classes differ; the message names both.
    """
    check_signals(key, [name], student_spec, teacher_spec)
    channels = student_spec[name].channels, teacher_spec[name].channels
    if channels[0] != channels[1]:
        raise InputError(
            f"{key}: student and teacher must know the same classes, but {name} has {channels[0]} channels in the "
            f"student and {channels[1]} in the teacher{' (background included)' if name == 'roi_logits' else ''}."
            + (" List the teacher's in KD.TEACHER.CLASSES to compare those that both know." if name in NAMED else "")
        )


def check_pooled_sizes(key: str, student_spec: Mapping[str, ShapeSpec], teacher_spec: Mapping[str, ShapeSpec]) -> None:
    """Checks that both networks pool the features of a box to equally many cells.

    Raises:
        InputError: If they do not; the message names both sizes.
    """
    sizes = [(spec["roi_features"].height, spec["roi_features"].width) for spec in (student_spec, teacher_spec)]
    if sizes[0] != sizes[1]:
        raise InputError(
            f"{key}: roi_features have {sizes[0]} cells in the student but {sizes[1]} in the teacher "
            "(MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION); the sizes must be equal."
        )
