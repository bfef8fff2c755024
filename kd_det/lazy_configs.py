"""Reads LazyConfigs, Detectron2's configs in Python, and builds their models."""

import builtins
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode, LazyConfig, instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from kd_det.config import default_config
from kd_det.config_files import zoo_configs
from kd_det.config_kinds import show
from kd_det.construction import REJECTIONS, describe_rejection, is_own
from kd_det.errors import InputError, reason
from kd_det.fetching import is_url

# Real paths of the files outside the model zoo whose code may run.
_allowed: set[str] = set()


def is_lazy_config(path: str) -> bool:
    """Returns whether a path or name is that of a LazyConfig."""
    return path.endswith(".py")


def allow_lazy_config(path: str) -> None:
    """Allows this process to run the code of a LazyConfig that lies outside Detectron2's model zoo.

    The command line allows the file that it names. Code that names one in a config itself calls this function first.

    Args:
        path: The file, as the config names it.
    """
    _allowed.add(os.path.realpath(os.path.expanduser(path)))


def find_lazy_config(path: str, key: str) -> str:
    """Returns the path of a LazyConfig, or of the one of that name in Detectron2's model zoo.

    Args:
        path: A file, or a name such as ``new_baselines/mask_rcnn_R_101_FPN_400ep_LSJ.py``.
        key: The key that names it, for messages.

    Raises:
        InputError: If there is no such file, or its code may not run.
    """
    path = os.path.expanduser(path)
    if is_url(path):
        raise InputError(f"{key}: {path} is Python code at a URL, which is not run; download it and name the file.")
    in_zoo = zoo_configs() / path
    if not os.path.isfile(path):
        if not in_zoo.is_file():
            raise InputError(
                f"{key}: there is no such file, and {path} is not the name of a config of Detectron2's model zoo "
                f"({zoo_configs()})."
            )
        path = str(in_zoo)
    real = os.path.realpath(path)
    if zoo_configs().resolve() not in Path(real).parents and real not in _allowed:
        raise InputError(
            f"{key}: {path} is Python code, which runs with all your rights; if you trust it, name it on the command "
            f"line: --teacher {path}. A config file cannot allow it, nor can the config.yaml of a run that is resumed."
        )
    return path


def load_lazy_config(path: str, key: str, *, options: Sequence = (), options_key: str) -> DictConfig:
    """Runs a LazyConfig and overrides some of its values.

    Args:
        path: See :func:`find_lazy_config`.
        key: The key that names it, for messages.
        options: Overrides in LazyConfig's syntax, such as ``model.roi_heads.num_classes=3``.
        options_key: The key that holds the overrides, for messages.

    Raises:
        InputError: If the file does not exist, may not run or fails, describes no model, or an override is wrong.
    """
    found = find_lazy_config(path, key)
    with _restoring_import():
        try:
            lazy = LazyConfig.load(found)
        except Exception as error:  # The code in the file may raise anything.
            raise InputError(f"{key}: {path} fails: {type(error).__name__}: {reason(error)}") from error
    if not isinstance(lazy.get("model"), DictConfig) or "_target_" not in lazy.model:
        raise InputError(f"{key}: {path} describes no model: it must set model = LazyCall(...)(...).")
    for option in options:
        _override(lazy, option, options_key)
    return lazy


def _override(lazy: DictConfig, option: Any, key: str) -> None:
    """Sets one value. An override may stand in a YAML file and therefore must not choose what is called."""
    name, equals, _ = option.partition("=") if isinstance(option, str) else ("", "", "")
    if not equals:
        raise InputError(
            f"{key}: must be overrides of a LazyConfig, such as ['model.roi_heads.num_classes=3'], got {show(option)}."
        )
    if "_target_" in option or "{" in option:
        raise InputError(f"{key}: {option!r} is refused: only numbers, text and lists can be overridden.")
    if not name.startswith("+") and not _has(lazy, name):
        raise InputError(f"{key}: the config has no {name!r}; write +{option} to add it.")
    try:
        LazyConfig.apply_overrides(lazy, [option])
    except Exception as error:  # The parser of the overrides raises errors of several packages.
        raise InputError(f"{key}: {option!r}: {reason(error)}") from error


def _has(lazy: DictConfig, name: str) -> bool:
    parent, _, last = name.rpartition(".")
    node = select(lazy, parent) if parent else lazy
    return isinstance(node, DictConfig) and last in node


def select(lazy: DictConfig, name: str) -> Any:
    """Returns a value of a LazyConfig; None if there is none, or it refers to one that does not exist."""
    try:
        return OmegaConf.select(lazy, name)
    except (OmegaConfBaseException, TypeError):
        return None


def build_lazy_model(lazy: DictConfig, device: str, source: str) -> nn.Module:
    """Builds the model of a LazyConfig.

    Args:
        device: The device that it is moved to.
        source: Origin of the config, for messages.

    Raises:
        InputError: If a constructor rejects a value.
    """
    try:
        model = instantiate(lazy.model)
    except InputError:
        raise
    except (*REJECTIONS, OmegaConfBaseException) as error:
        if is_own(error):
            raise
        raise InputError(f"{source}: the model cannot be built: {describe_rejection(error)}.") from error
    if not isinstance(model, nn.Module):
        raise InputError(f"{source}: model must describe a torch.nn.Module, got {type(model).__name__}.")
    return model.to(device)


def describe_lazy_config(lazy: DictConfig) -> CfgNode:
    """Returns a plain config with what can be read from a LazyConfig before its model is built.

    These are the data sets, the channel order of the images and their size in tests; all else has Detectron2's default.
    """
    cfg = default_config()
    cfg.MODEL.META_ARCHITECTURE = _class_name(lazy.model)
    cfg.MODEL.MASK_ON = select(lazy, "model.roi_heads.mask_head") is not None
    cfg.MODEL.KEYPOINT_ON = select(lazy, "model.roi_heads.keypoint_head") is not None
    for part in ("train", "test"):
        names = select(lazy, f"dataloader.{part}.dataset.names")
        names = [names] if isinstance(names, str) else list(names) if isinstance(names, ListConfig) else []
        cfg.DATASETS[part.upper()] = tuple(filter(lambda name: isinstance(name, str), names))
    keys = ("model.input_format", "dataloader.test.mapper.image_format", "dataloader.train.mapper.image_format")
    cfg.INPUT.FORMAT = next((value for value in (select(lazy, key) for key in keys) if isinstance(value, str)), "")
    for augmentation in select(lazy, "dataloader.test.mapper.augmentations") or ():
        if isinstance(augmentation, DictConfig) and isinstance(augmentation.get("short_edge_length"), int):
            cfg.INPUT.MIN_SIZE_TEST = augmentation.short_edge_length
            cfg.INPUT.MAX_SIZE_TEST = augmentation.get("max_size", cfg.INPUT.MAX_SIZE_TEST)
    return cfg


def add_model(cfg: CfgNode, model: nn.Module, source: str) -> None:
    """Adds to a config of :func:`describe_lazy_config` what only the model itself knows.

    These are the channel order and the statistics of its images, its class and that of its backbone, and the largest
    image that fits into its square padding.

    Args:
        cfg: The config, which is changed in place.
        source: Origin of the config, for messages.

    Raises:
        InputError: If neither the model nor the config says in which order the channels of an image come.
    """
    cfg.INPUT.FORMAT = getattr(model, "input_format", None) or cfg.INPUT.FORMAT
    if not cfg.INPUT.FORMAT:
        raise InputError(
            f"{source}: the order of the channels is unknown: the model has no input_format, and the config no "
            "dataloader.test.mapper.image_format; set either to BGR or RGB."
        )
    for key in ("pixel_mean", "pixel_std"):
        statistics = getattr(model, key, None)
        cfg.MODEL[key.upper()] = [] if statistics is None else statistics.flatten().tolist()
    cfg.MODEL.META_ARCHITECTURE = type(model).__name__
    backbone = getattr(model, "backbone", None)
    bottom_up = getattr(backbone, "bottom_up", None) or getattr(backbone, "net", None)
    below = f"({type(bottom_up).__name__})" if bottom_up is not None else ""
    cfg.MODEL.BACKBONE.NAME = f"{type(backbone).__name__}{below}"
    square = getattr(backbone, "padding_constraints", {}).get("square_size", 0)
    if square:
        cfg.INPUT.MIN_SIZE_TEST = min(cfg.INPUT.MIN_SIZE_TEST, square)
        cfg.INPUT.MAX_SIZE_TEST = min(cfg.INPUT.MAX_SIZE_TEST, square)


def _class_name(node: DictConfig) -> str:
    target = node["_target_"]
    return target.rpartition(".")[2] if isinstance(target, str) else getattr(target, "__name__", str(target))


@contextmanager
def _restoring_import() -> Iterator[None]:
    """Restores Python's import afterwards, which Detectron2 replaces and leaves replaced if a config fails."""
    original = builtins.__import__
    try:
        yield
    finally:
        builtins.__import__ = original
