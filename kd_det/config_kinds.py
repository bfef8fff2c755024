"""Checks the kinds of config values, which follow from the defaults."""

import reprlib
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from detectron2.config import CfgNode

from kd_det.errors import InputError

KINDS = {bool: "True or False", int: "a whole number", float: "a number", str: "text", list: "a list", tuple: "a list"}
# Maps patterns of keys whose default is an empty list to an example of an element; None allows any element.
ELEMENTS: dict[str, Any] = {
    "*.OPTS": None,
    "TEST.EXPECTED_RESULTS": [],
    "TEST.KEYPOINT_OKS_SIGMAS": 0.0,
    "*.STEPS": 0,
    "*": "",
}
# Maps patterns of keys whose default is None to an example of their other values.
OPTIONAL: dict[str, Any] = {"SOLVER.WEIGHT_DECAY_BIAS": 0.0, "KD.TEACHER*.SIDE_STREAM": False}


def first_match(table: Mapping[str, Any], key: str) -> Any:
    """Returns the value of the first :mod:`fnmatch` pattern that matches a key; None if none does."""
    return next((value for pattern, value in table.items() if fnmatchcase(key, pattern)), None)


def leaves(cfg: CfgNode, defaults: CfgNode, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yields the name, value and default of each key of a config that also has a default."""
    for key, default in defaults.items():
        if key not in cfg:
            continue
        if isinstance(default, CfgNode):
            yield from leaves(cfg[key], default, f"{path}{key}.")
        else:
            yield f"{path}{key}", cfg[key], default


def check_kinds(cfg: CfgNode, defaults: CfgNode, source: str) -> None:
    """Checks that each value is of the same kind as its default, and so are the elements of lists.

    Args:
        source: Origin of the config, for messages.

    Raises:
        InputError: If one is not.
    """
    for key, value, default in leaves(cfg, defaults):
        if default is None:
            default = first_match(OPTIONAL, key)
            if value is None or default is None:
                continue
            if isinstance(default, bool) and value == "auto":
                continue  # This is another way to write None.
        check_kind(f"{source}: {key}", value, default, first_match(ELEMENTS, key))


def check_kind(key: str, value: Any, default: Any, element: Any) -> None:
    """Checks a value and its elements.

    Args:
        default: An example of a correct value.
        element: An example of an element if the default is an empty list; None allows any element.
    """
    if not is_like(value, default):
        raise InputError(f"{key}: must be {KINDS[type(default)]}, got {show(value)}.")
    if isinstance(value, str) and not is_text(value):
        raise InputError(f"{key}: has characters that no name and no path has, got {show(value)}.")
    if isinstance(value, list | tuple):
        example = default[0] if default else element
        if isinstance(example, list | tuple) and "ANCHOR_GENERATOR" in key and not has_lists(value):
            example = example[0]  # The value is one list for all feature maps.
        if isinstance(example, int) and not isinstance(example, bool):
            example = 0.0  # A list may hold both kinds of numbers.
        for item in value if example is not None else ():
            check_kind(f"{key}: each element", item, example, None)


def show(value: Any) -> str:
    """Formats a value for a message; of a long value only a part is shown."""
    short = reprlib.Repr()
    short.maxlist = short.maxtuple = short.maxdict = 12
    short.maxstring = short.maxother = short.maxlong = 100
    return short.repr(value)


def is_like(value: Any, default: Any) -> bool:
    """Returns whether a value is of the same kind as a default."""
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    kind = next((kind for kind in ((list, tuple), str, int, (int, float)) if isinstance(default, kind)), object)
    return isinstance(value, kind)


def has_lists(value: Sequence) -> bool:
    return any(isinstance(item, list | tuple) for item in value)


def is_text(value: str) -> bool:
    """Returns whether a text can be the name of a file and can be printed."""
    return "\0" not in value and not any("\ud800" <= character <= "\udfff" for character in value)
