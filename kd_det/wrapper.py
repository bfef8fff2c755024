"""Defines what the engine knows of a meta-architecture that wraps unmodified students to train them."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

import torch
from detectron2.config import CfgNode
from torch import nn

from kd_det.class_partition import ClassPartition
from kd_det.config import student_config
from kd_det.heads.build import student_signals
from kd_det.teacher import Teacher


@dataclass(frozen=True)
class Network:
    """Describes one of the networks that compute in a training step.

    Attributes:
        title: Its role in the run.
        model: The network.
        cfg: Its plain config.
        flip_channels: Whether it takes its images in reverse channel order.
        weights: Source of its weights, if they do not change in training.
        dtype: Precision of its forward pass; None if it is that of the run.
        classes: Division of its classes from the first student's; None if they are the same.
    """

    title: str
    model: nn.Module
    cfg: CfgNode
    flip_channels: bool = False
    weights: str = ""
    dtype: torch.dtype | None = None
    classes: ClassPartition | None = None


class StudentWrapper(nn.Module):
    """Trains unmodified students; the base of the meta-architectures that do so, such as ``TeacherStudent``.

    The engine trains, saves, resumes, evaluates, draws and summarises a wrapper by what is declared here alone. A
    wrapper of one's own sets `students`, implements ``forward``, overrides what differs from the defaults, and is
    registered twice: in Detectron2's ``META_ARCH_REGISTRY`` and in :data:`kd_det.WRAPPER_REGISTRY`. In its config
    ``KD.STUDENT_ARCHITECTURE`` is the meta-architecture of the first student, and ``MODEL`` describes the rest of it.

    In training, ``forward`` maps a batch to a dict of losses; in inference it runs the first student.

    Attributes:
        has_teacher: Whether ``KD.TEACHER`` and ``KD.HEADS`` apply, and with them the pre-training stage and
            generations.
        has_peers: Whether ``KD.MUTUAL.PEERS`` names further students.
        students: The students. The first one is ``"model"`` in a checkpoint.
        teacher: The teacher; None without one.
    """

    has_teacher: ClassVar[bool] = False
    has_peers: ClassVar[bool] = False

    students: nn.ModuleList | list[nn.Module]
    teacher: Teacher | None

    def __init__(self) -> None:
        super().__init__()
        self.teacher = None

    @property
    def turns(self) -> int:
        """Returns the number of updates in an iteration; if there are several, ``forward`` gets the update's index."""
        return 1

    @property
    def checkpointables(self) -> dict[str, object]:
        """Maps keys of a checkpoint to the objects that it holds alongside the first student."""
        return {}

    @property
    def stage_teachers(self) -> dict[str, Teacher]:
        """Maps the names of the teachers that a pre-training stage uses to them."""
        return {}

    @property
    def named_heads(self) -> dict[str, nn.Module]:
        """Maps the names in ``KD.HEADS`` to the heads."""
        return {}

    @property
    def compared(self) -> Collection[str]:
        """Returns the students' signals that are compared, whose maps are drawn."""
        return {name for head in self.named_heads.values() for name in student_signals(head)}

    def student_configs(self, cfg: CfgNode) -> list[CfgNode]:
        """Returns the plain config of each student, for code that evaluates or saves it.

        Args:
            cfg: The run's config.
        """
        return [student_config(cfg)]

    def networks(self, cfg: CfgNode) -> list[Network]:
        """Lists the networks of a training step, the students first.

        Args:
            cfg: The run's config.
        """
        return [Network("student", self.students[0], *self.student_configs(cfg))]

    def describe(self, cfg: CfgNode) -> list[str]:
        """Describes how the students are taught, in paragraphs of the summary.

        Args:
            cfg: The run's config.
        """
        return []


class PlainStudent(StudentWrapper):
    """Presents a plain model as a wrapper of itself."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.students = [model]


def as_wrapper(model: nn.Module) -> StudentWrapper:
    """Returns a model that is a wrapper, and presents any other model as one."""
    return model if isinstance(model, StudentWrapper) else PlainStudent(model)
