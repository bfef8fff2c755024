"""Averages the predictions of the teachers from which one head learns."""

from collections.abc import Mapping, Sequence

from detectron2.layers import ShapeSpec
from torch import nn

from kd_det.class_partition import ClassPartition
from kd_det.errors import InputError, shorten
from kd_det.heads.build import has_stage, student_signals, teacher_signals
from kd_det.losses.averages import average_sigmoid, average_softmax
from kd_det.registry import config_key
from kd_det.signals import SOURCES, Signals
from kd_det.teacher_choices import TeacherChoice, with_keys_of

# Predictions whose probabilities can be averaged. The softmax of the others is over the cells of a map.
SOFTMAX, SIGMOID = ({SOURCES[name].logits for name in names} for names in (("roi", "cls"), ("dense", "rpn", "mask")))


def check_average(
    name: str,
    head: nn.Module,
    choice: TeacherChoice,
    specs: Mapping[str, Mapping[str, ShapeSpec]],
    classes: Mapping[str, ClassPartition | None],
) -> None:
    """Checks that what a head compares can be averaged over its teachers.

    Args:
        name: Name of the head.
        head: The head.
        choice: Its teachers, of which there are several.
        specs: Maps the names of the teachers to the shapes of their signals, for the classes that are compared.
        classes: Maps the names of the teachers to the division of their classes from the student's; None if they are
            the same.

    Raises:
        InputError: If it compares anything but probabilities, or the teachers' are of different classes.
    """
    key = f"KD.{config_key(name)}.TEACHERS"
    needed = [*student_signals(head), *teacher_signals(head)]
    if has_stage(head):
        needed += [*head.pretrain_signals, *head.pretrain_teacher_signals]
    others = sorted(set(needed) - SOFTMAX - SIGMOID)
    if others:
        raise InputError(
            f"{key}: names {len(choice.names)} teachers, {', '.join(choice.names)}, but {name} compares "
            f"{shorten(others)}; only the probabilities of {', '.join(sorted(SOFTMAX | SIGMOID))} can be averaged."
        )
    first, *rest = choice.names
    for other in rest:
        shared = [
            None if (x := classes[teacher]) is None or x.covers_student else x.shared for teacher in (first, other)
        ]
        if shared[0] != shared[1]:
            listed = ["all" if x is None else shorten(x, 20) for x in shared]
            raise InputError(
                f"{key}: {name} cannot average {first} and {other}, which share other classes with the student: "
                f"{listed[0]}; and {listed[1]}."
            )
        for signal in needed:
            channels = [
                specs[teacher][signal].channels if signal in specs[teacher] else 0 for teacher in (first, other)
            ]
            if channels[0] != channels[1]:
                listing = with_keys_of(other, "KD.TEACHER.CLASSES")
                raise InputError(
                    f"{key}: {name} cannot average {first} and {other}, whose {signal} have {channels[0]} and "
                    f"{channels[1]} channels; {listing} lists the classes of a teacher."
                )


def average(signals: Sequence[Signals], choice: TeacherChoice, head: nn.Module) -> Signals:
    """Averages the probabilities of a head's teachers.

    Args:
        signals: The signals of each teacher, for the same classes.
        choice: The teachers and the kind of mean.
        head: The head. Class logits are averaged at its ``temperature``, if it has one.
    """
    averaged: Signals = {}
    for name in teacher_signals(head):
        logits = [x[name] for x in signals]
        averaged[name] = (
            average_softmax(logits, kind=choice.average, temperature=getattr(head, "temperature", 1.0))
            if name in SOFTMAX
            else average_sigmoid(logits, kind=choice.average)
        )
    return averaged
