"""Finds out which classes the teacher knows, by name, and divides them from the student's."""

from collections.abc import Mapping, Sequence

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.layers import ShapeSpec

from kd_det.class_partition import ClassPartition
from kd_det.data import known_class_names
from kd_det.errors import InputError, shorten
from kd_det.signals import SOURCES
from kd_det.teacher_kinds import TeacherKind, teacher_kind

# Models of Detectron2's zoo with as many classes were trained on COCO.
COCO = "coco_2017_train"


def divide_classes(cfg: CfgNode, student_count: int | None, teacher_count: int | None) -> ClassPartition | None:
    """Divides the classes of student and teacher by their names.

    The student's names are those of its data sets. The teacher's are ``KD.TEACHER.CLASSES``, or those of the data sets
    of its config, or COCO's for a model of the zoo with 80 classes. Without the keys CLASSES and SYNONYMS, networks
    with equally many classes are taken to know the same ones in the same order.

    Args:
        cfg: The run's config.
        student_count: Number of classes that the student predicts; None if it predicts none.
        teacher_count: Number of classes that the teacher predicts; None if it predicts none.

    Returns:
        The partition, or None if the classes are the same, are taken to be the same, or are not known.

    Raises:
        InputError: If a class is named twice, the number of names is not that of the classes that a network predicts, a
            synonym is unknown, or names that the keys refer to are not known.
    """
    node = cfg.KD.TEACHER
    key = "KD.TEACHER.CLASSES" if node.CLASSES else "KD.TEACHER.SYNONYMS" if node.SYNONYMS else ""
    if not key and (student_count == teacher_count or None in (student_count, teacher_count)):
        return None
    names = {"student": known_class_names(cfg), "teacher": teacher_class_names(cfg, teacher_count)}
    counts = {"student": student_count, "teacher": teacher_count}
    for side, listed in names.items():
        if len(listed) == counts[side] and listed:
            continue
        if not key:
            return None
        place = "KD.TEACHER.CLASSES names" if side == "teacher" and node.CLASSES else f"the {side}'s data sets name"
        raise InputError(
            f"{key}: classes are compared by name, but {place} {len(listed) or 'no'} classes"
            f"{f' ({shorten(listed, 8)})' if listed else ''} and the {side} predicts {counts[side] or 'none'}."
        )
    for side, listed in names.items():
        if not key and len(set(listed)) < len(listed):
            return None
        check_distinct(key if side == "teacher" and node.CLASSES else f"{key}: the {side}'s data sets", listed)
    teacher = translate_names(node.SYNONYMS, names["student"], names["teacher"])
    if names["student"] == teacher:
        return None
    return ClassPartition(tuple(names["student"]), tuple(teacher), dict(node.SYNONYMS))


def teacher_class_names(cfg: CfgNode, count: int | None) -> list[str]:
    """Returns the teacher's own names of its classes, in the order of its indices; [] if they are not known.

    Args:
        cfg: The run's config.
        count: Number of classes that the teacher predicts.
    """
    if cfg.KD.TEACHER.CLASSES:
        return list(cfg.KD.TEACHER.CLASSES)
    return trained_class_names(teacher_kind(cfg), count)


def trained_class_names(kind: TeacherKind, count: int | None) -> list[str]:
    """Returns the names of the classes that a model was trained on, in the order of its indices; [] if not known.

    They are those of :func:`declared_names`, or COCO's for a model of the zoo with 80 classes.

    Args:
        kind: The model.
        count: Number of classes that it predicts.
    """
    known = declared_names(kind)
    coco = MetadataCatalog.get(COCO).thing_classes
    if not known and count == len(coco) and kind.is_in_zoo:
        return list(coco)
    return known


def declared_names(kind: TeacherKind, metadata: str = "thing_classes") -> list[str]:
    """Returns the names of classes that a teacher declares, or else those of its data sets; [] if there are none.

    Args:
        kind: The teacher.
        metadata: The metadata of a data set that holds the names; a teacher itself declares only those of objects or
            images.
    """
    declared = kind.class_names if metadata == "thing_classes" else ()
    return list(declared) or known_class_names(kind.description, metadata)


def translate_names(synonyms: Mapping[str, str], student: Sequence[str], teacher: Sequence[str]) -> list[str]:
    """Replaces the teacher's names of classes by the student's.

    Args:
        synonyms: Maps the teacher's names to the student's.
        student: Names of the student's classes.
        teacher: Names of the teacher's classes.

    Raises:
        InputError: If a synonym is not a class, or two classes of the teacher get the same name.

    Example:
        >>> translate_names({"bike": "bicycle"}, ["bicycle", "cow"], ["car", "bike"])
        ['car', 'bicycle']
    """
    for own, name in synonyms.items():
        for side, word, names in (("teacher", own, teacher), ("student", name, student)):
            if word not in names:
                raise InputError(
                    f"KD.TEACHER.SYNONYMS: {word!r} in {own}: {name} is not a class of the {side}, which has "
                    f"{shorten(names, 20)}; the teacher's name comes first."
                )
    translated = [synonyms.get(name, name) for name in teacher]
    check_distinct("KD.TEACHER.SYNONYMS", translated)
    return translated


def check_distinct(place: str, names: Sequence[str]) -> None:
    """Checks that no class is named twice.

    Args:
        place: The config key that holds the names, or whose they are, for messages.

    Raises:
        InputError: If one is.
    """
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        raise InputError(f"{place}: class {twice!r} is named twice, so that classes cannot be compared by name.")


def count_object_classes(spec: Mapping[str, ShapeSpec]) -> int | None:
    """Counts the classes of boxes or images that a model predicts; None if it predicts none.

    Args:
        spec: Maps each signal that the model has to its shape.
    """
    sources = (SOURCES[name] for name in ("roi", "dense", "cls"))
    return next((spec[x.logits].channels - (x.background or 0) for x in sources if x.logits in spec), None)
