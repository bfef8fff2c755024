"""Reads from which of several named teachers each head learns, and presents each teacher as if it were the only one."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from detectron2.config import CfgNode

from kd_det.config import UNNAMED
from kd_det.errors import InputError, check_choice
from kd_det.registry import config_key

AVERAGES = ("arithmetic", "geometric")


@dataclass(frozen=True)
class TeacherChoice:
    """Says from which teachers a head learns.

    Attributes:
        names: Names of the teachers; the class probabilities of several are averaged.
        average: Mean of their probabilities: "arithmetic" or "geometric".

    Example:
        >>> str(TeacherChoice()), str(TeacherChoice(("small", "large"), "geometric"))
        ('teacher', 'geometric mean of small, large')
    """

    names: tuple[str, ...] = (UNNAMED,)
    average: str = "arithmetic"

    def __str__(self) -> str:
        mean = f"{self.average} mean of " if len(self.names) > 1 else ""
        return f"{mean}{', '.join(self.names)}"


def choose_teachers(cfg: CfgNode) -> dict[str, TeacherChoice]:
    """Maps each of ``KD.HEADS`` to the teachers that its keys TEACHERS and AVERAGE name.

    Raises:
        InputError: If a head names a teacher twice, or one that there is not, or an unknown mean.
    """
    choices = {}
    for head in cfg.KD.HEADS:
        key = f"KD.{config_key(head)}"
        node = cfg.KD.get(config_key(head), CfgNode())  # An unknown head has none, and is refused where it is built.
        names, average = node.get("TEACHERS") or [UNNAMED], node.get("AVERAGE", AVERAGES[0])
        for i, name in enumerate(names):
            if name != UNNAMED and name not in cfg.KD.TEACHERS:
                known = f"are {', '.join(cfg.KD.TEACHERS)}" if cfg.KD.TEACHERS else "is none"
                raise InputError(
                    f"{key}.TEACHERS: {name!r} is not a teacher; in KD.TEACHERS there {known}, and {UNNAMED!r} is "
                    "KD.TEACHER."
                )
            if name in names[:i]:
                raise InputError(f"{key}.TEACHERS: {name!r} is named twice; a teacher may stand there once.")
        if len(names) > 1:
            check_choice(f"{key}.AVERAGE", average, AVERAGES)
        choices[head] = TeacherChoice(tuple(names), average)
    return choices


def used_teachers(cfg: CfgNode) -> list[str]:
    """Lists the names of the teachers from which some head learns, or a student inherits; the unnamed one is first."""
    chosen = {name for choice in choose_teachers(cfg).values() for name in choice.names}
    chosen |= {UNNAMED} if cfg.KD.INHERIT else set()
    return [name for name in (UNNAMED, *cfg.KD.TEACHERS) if name in chosen]


def heads_of(name: str, cfg: CfgNode, heads: Collection[str]) -> list[str]:
    """Selects the heads that learn from a teacher; a head that the config does not know learns from the unnamed one.

    Args:
        name: Name of the teacher.
        cfg: The run's config.
        heads: Names of heads.
    """
    choices = choose_teachers(cfg)
    return [head for head in heads if name in choices.get(head, TeacherChoice()).names]


@contextmanager
def select_teacher(cfg: CfgNode, name: str) -> Iterator[CfgNode]:
    """Presents a teacher as if it were the only one.

    Args:
        cfg: The run's config.
        name: Name of the teacher.

    Yields:
        A config whose ``KD.TEACHER`` describes this teacher.

    Raises:
        InputError: If the body raises one; the message has the keys that the teacher has in `cfg`.
    """
    selected = cfg
    if name != UNNAMED:
        selected = cfg.clone()
        selected.defrost()
        selected.KD.TEACHER = selected.KD.TEACHERS[name]
    with naming_teacher(name):
        yield selected


@contextmanager
def naming_teacher(name: str) -> Iterator[None]:
    """Gives the keys of ``KD.TEACHER`` in the errors of the body the names that they have for a named teacher."""
    try:
        yield
    except InputError as error:
        if name == UNNAMED:
            raise
        raise type(error)(with_keys_of(name, str(error))) from error


def with_keys_of(name: str, message: str) -> str:
    """Replaces ``KD.TEACHER``, and the argument that sets it, in a message by the keys of a named teacher.

    Example:
        >>> with_keys_of("small", "KD.TEACHER.SCALE: must be above 0.")
        'KD.TEACHERS.small.SCALE: must be above 0.'
    """
    if name == UNNAMED:
        return message
    return message.replace("KD.TEACHER.", f"KD.TEACHERS.{name}.").replace(
        "--teacher ", f"KD.TEACHERS.{name}.CONFIG_FILE "
    )
