"""Checks the values of a whole config."""

from detectron2.config import CfgNode

from kd_det.config import default_config
from kd_det.config_checks.bounds import check_bounds
from kd_det.config_checks.choices import check_listed_choice, check_unique
from kd_det.config_checks.networks import check_network
from kd_det.config_checks.parts import check_parts
from kd_det.config_checks.training import (
    check_augmentation,
    check_determinism,
    check_patience,
    check_solver,
    check_tta,
)
from kd_det.config_kinds import leaves
from kd_det.errors import InputError
from kd_det.registry import KD_HEAD_REGISTRY, config_key


def check_run_values(cfg: CfgNode) -> None:
    """Checks for values that Detectron2 would reject late, without naming the key, or misinterpret.

    Args:
        cfg: A config of the right kinds; see :mod:`kd_det.config_kinds`.

    Raises:
        InputError: If a value is not allowed; names the key, its value and what is allowed.
    """
    check_each(cfg)
    check_solver(cfg)
    check_network(cfg)
    check_augmentation(cfg)
    check_tta(cfg)
    check_patience(cfg)
    check_determinism(cfg)


def check_network_values(cfg: CfgNode, source: str) -> None:
    """Checks only those values of a config that describe a network and its images; see :func:`check_run_values`.

    Args:
        source: Origin of the config, for messages.

    Raises:
        InputError: If a value is not allowed, or names a class that is not registered.
    """
    check_parts(cfg, source)
    try:
        check_each(cfg, sections=("MODEL.", "INPUT."))
        check_network(cfg)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error


def check_each(cfg: CfgNode, *, sections: tuple[str, ...] = ("",)) -> None:
    """Checks each value on its own, for the keys that begin with one of the sections."""
    defaults = default_config(cfg.KD.TEACHERS)
    # A head that is defined outside this package checks its own values.
    foreign = tuple(f"KD.{config_key(name)}." for name, head in KD_HEAD_REGISTRY if not is_own(head))
    for key, value, _ in leaves(cfg, defaults):
        if key.startswith(sections) and not key.startswith(foreign):
            check_bounds(key, value)
            check_listed_choice(key, value)
            check_unique(key, value)
    if cfg.VERSION != defaults.VERSION:
        raise InputError(f"VERSION: must be {defaults.VERSION}, got {cfg.VERSION}.")


def is_own(head: type) -> bool:
    """Returns whether a head is defined in this package."""
    return head.__module__.partition(".")[0] == "kd_det"
