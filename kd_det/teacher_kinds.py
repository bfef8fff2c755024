"""Knows the kinds of teachers that ``KD.TEACHER`` can name: how each is described, built and loaded."""

import os
import shlex
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import ClassVar, cast

from detectron2 import model_zoo
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY
from omegaconf import DictConfig
from torch import nn

from kd_det.checkpoint import load_strictly
from kd_det.checkpoint_folder import FINAL
from kd_det.config import read_config, student_config
from kd_det.config_checks import check_network_values
from kd_det.config_files import is_zoo_name
from kd_det.construction import build_network
from kd_det.errors import InputError
from kd_det.fetching import find_file
from kd_det.lazy_configs import (
    add_model,
    build_lazy_model,
    describe_lazy_config,
    find_lazy_config,
    is_lazy_config,
    load_lazy_config,
)
from kd_det.timm_teachers import PREFIX, TimmFeatures, build_timm_teacher, describe_timm_teacher

CONFIG_KEY, OPTIONS_KEY, WEIGHTS_KEY = (f"KD.TEACHER.{key}" for key in ("CONFIG_FILE", "OPTS", "WEIGHTS"))


class TeacherKind(ABC):
    """Describes, builds and loads the teachers of one kind.

    Args:
        cfg: The student's config, whose ``KD.TEACHER`` names a teacher of this kind.

    Attributes:
        predicts: Whether its teachers predict anything that could be evaluated.
        without_data_sets: Overrides that remove the data sets from its configs, for messages.
    """

    predicts: ClassVar[bool] = True
    without_data_sets: ClassVar[str] = "[DATASETS.TEST, [], DATASETS.TRAIN, []]"

    def __init__(self, cfg: CfgNode):
        self.cfg = cfg
        self.name: str = cfg.KD.TEACHER.CONFIG_FILE
        self.options: Sequence = cfg.KD.TEACHER.OPTS
        self.source = f"{self.name} with {OPTIONS_KEY}"

    @staticmethod
    @abstractmethod
    def names(name: str) -> bool:
        """Returns whether ``KD.TEACHER.CONFIG_FILE`` names a teacher of this kind."""

    @cached_property
    def description(self) -> CfgNode:
        """Describes the teacher by a plain config, set to the student's device.

        Raises:
            InputError: If its config does not exist, or an override is wrong.
        """
        described = self._describe()
        described.MODEL.DEVICE = self.cfg.MODEL.DEVICE
        return described

    @abstractmethod
    def _describe(self) -> CfgNode:
        """Makes the plain config; the device is set by the caller."""

    @property
    def is_in_zoo(self) -> bool:
        """Returns whether the teacher's config is one of Detectron2's model zoo.

        Raises:
            InputError: If there is no such config.
        """
        return False

    @property
    def class_names(self) -> Sequence[str]:
        """Names the classes that the teacher itself declares, in the order of its indices; empty if it does not."""
        return ()

    @property
    def weights(self) -> str:
        """Returns the path or a description of the teacher's weights.

        Raises:
            InputError: If ``KD.TEACHER.WEIGHTS`` names none and there are no others.
        """
        return self.cfg.KD.TEACHER.WEIGHTS or self.default_weights()

    @property
    def untrained_weights(self) -> str:
        """Describes the weights of a teacher that is built, but not trained."""
        return "random"

    @abstractmethod
    def default_weights(self) -> str:
        """Returns the weights of a teacher for which ``KD.TEACHER.WEIGHTS`` names none.

        Raises:
            InputError: If there are none.
        """

    @abstractmethod
    def build(self, *, trained: bool) -> nn.Module:
        """Builds the model, and adds to :attr:`description` what only the model knows.

        Args:
            trained: Whether :meth:`load` follows.

        Raises:
            InputError: If it cannot be built.
        """

    def load(self, model: nn.Module) -> None:
        """Loads :attr:`weights` strictly.

        Raises:
            InputError: If they do not fit.
        """
        load_strictly(model, self.weights, key=WEIGHTS_KEY)


class YamlKind(TeacherKind):
    """Covers YAML configs: files, and names of configs of Detectron2's model zoo or of kd_det.

    A meta-architecture of a plugin may declare ``class_names``, the names of its classes, and ``loads_weights``: its
    constructor then loads the file that ``MODEL.WEIGHTS`` names, in whatever format, so that nothing else is loaded.
    """

    @staticmethod
    def names(name: str) -> bool:
        return True

    def _describe(self) -> CfgNode:
        # The teacher may be a student that was trained with heads of plugins.
        described = read_config(self.name, CONFIG_KEY, options=self.options, options_key=OPTIONS_KEY, other_heads=True)
        described = student_config(described)
        check_network_values(described, self.source)
        return described

    @property
    def is_in_zoo(self) -> bool:
        return is_zoo_name(self.name)

    @property
    def class_names(self) -> Sequence[str]:
        return getattr(self._architecture, "class_names", ())

    @property
    def _architecture(self) -> type[nn.Module]:
        return META_ARCH_REGISTRY.get(self.description.MODEL.META_ARCHITECTURE)

    @property
    def _loads_weights(self) -> bool:
        return getattr(self._architecture, "loads_weights", False)

    @property
    def untrained_weights(self) -> str:
        return self.weights if self._loads_weights else super().untrained_weights

    def default_weights(self) -> str:
        """Returns the zoo's trained model, else what a training of the config has left, else its MODEL.WEIGHTS.

        A training leaves its model in OUTPUT_DIR. It is not taken if the overrides set MODEL.WEIGHTS.
        """
        if self.is_in_zoo:
            return zoo_weights(self.name)
        trained = os.path.join(self.description.OUTPUT_DIR, FINAL)
        if os.path.isfile(trained) and "MODEL.WEIGHTS" not in self.options[::2]:
            return trained
        if not self.description.MODEL.WEIGHTS:
            raise InputError(
                f"{WEIGHTS_KEY}: no file is named, and MODEL.WEIGHTS of {self.name} is empty; train this teacher "
                f"first: {self._training_command}"
            )
        return self.description.MODEL.WEIGHTS

    @property
    def _training_command(self) -> str:
        """Returns the command that trains the teacher, whose weights :meth:`default_weights` then finds."""
        return shlex.join(["kd-det", "train", "--config-file", self.name, *map(str, self.options)])

    def build(self, *, trained: bool) -> nn.Module:
        if self._loads_weights:
            self.description.MODEL.WEIGHTS = find_file(self.weights, WEIGHTS_KEY)
        return build_network(self.description, self.source)

    def load(self, model: nn.Module) -> None:
        if self._loads_weights:
            return
        try:
            super().load(model)
        except InputError as error:
            if self.weights != self.description.MODEL.WEIGHTS:
                raise
            raise InputError(f"{error} If this teacher is not trained yet: {self._training_command}") from error


class LazyKind(TeacherKind):
    """Covers LazyConfigs, Detectron2's configs in Python; see :mod:`kd_det.lazy_configs`."""

    without_data_sets = "['dataloader.test.dataset.names=[]', 'dataloader.train.dataset.names=[]']"

    @staticmethod
    def names(name: str) -> bool:
        return is_lazy_config(name)

    @cached_property
    def _lazy(self) -> DictConfig:
        return load_lazy_config(self.name, CONFIG_KEY, options=self.options, options_key=OPTIONS_KEY)

    def _describe(self) -> CfgNode:
        return describe_lazy_config(self._lazy)

    @property
    def is_in_zoo(self) -> bool:
        return find_lazy_config(self.name, CONFIG_KEY) != os.path.expanduser(self.name)

    def default_weights(self) -> str:
        """Returns the zoo's trained model; other LazyConfigs have none."""
        if self.is_in_zoo:
            return zoo_weights(self.name)
        raise InputError(f"{WEIGHTS_KEY}: no file is named, and {self.name} is not one of the zoo's configs.")

    def build(self, *, trained: bool) -> nn.Module:
        model = build_lazy_model(self._lazy, self.description.MODEL.DEVICE, self.source)
        add_model(self.description, model, self.source)
        return model


class TimmKind(TeacherKind):
    """Covers networks of timm, which teach by their feature maps; see :mod:`kd_det.timm_teachers`."""

    predicts = False

    @staticmethod
    def names(name: str) -> bool:
        return name.startswith(PREFIX)

    def _describe(self) -> CfgNode:
        return describe_timm_teacher(self.cfg)

    def default_weights(self) -> str:
        """Describes timm's own weights, which are no file: timm loads them when it builds the network."""
        return "timm's weights"

    def build(self, *, trained: bool) -> nn.Module:
        return build_timm_teacher(self.cfg, pretrained=trained and not self.cfg.KD.TEACHER.WEIGHTS)

    def load(self, model: nn.Module) -> None:
        if self.cfg.KD.TEACHER.WEIGHTS:
            load_strictly(cast(TimmFeatures, model).backbone.net, self.weights, key=WEIGHTS_KEY)


# The first kind that knows a name is taken.
KINDS: tuple[type[TeacherKind], ...] = (LazyKind, TimmKind, YamlKind)


def teacher_kind(cfg: CfgNode) -> TeacherKind:
    """Returns the teacher that ``KD.TEACHER`` names, as one of its kind.

    Args:
        cfg: The student's config.

    Raises:
        InputError: If none is named.
    """
    name = cfg.KD.TEACHER.CONFIG_FILE
    if not name:
        raise InputError(f"{CONFIG_KEY}: no teacher is named; give a config file or the name of a zoo config.")
    return next(kind for kind in KINDS if kind.names(name))(cfg)


def zoo_weights(name: str) -> str:
    """Returns the URL of the trained model of a model-zoo config."""
    try:
        return model_zoo.get_checkpoint_url(name)
    except RuntimeError as error:
        raise InputError(f"{WEIGHTS_KEY}: no file is named, and {error}") from error
