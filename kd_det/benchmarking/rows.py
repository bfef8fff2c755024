"""Defines what is measured: the networks and the batch of a table, and the heads and options of each row."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from kd_det.errors import InputError


@dataclass(frozen=True)
class Setup:
    """Holds what all rows of a table share.

    Attributes:
        depths: Depths of the ResNets of student and teacher.
        batch: Number of images per step.
        size: Side of the images in pixels.
        rounds: Number of times that each part of a row is measured.
        teacher: Config of another teacher than the ResNet, and overrides of KD.TEACHER; () for the ResNet.
        further: The same of more teachers, whose probabilities all heads average with those of `teacher`.
        plugins: Files that register what the teachers are made of.
    """

    depths: tuple[int, int]
    batch: int
    size: int
    rounds: int
    teacher: tuple[str, ...] = ()
    further: tuple[tuple[str, ...], ...] = ()
    plugins: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """Describes a row of a table.

    Attributes:
        name: Text of the first column.
        heads: Names of the heads.
        options: Config keys and their values.
    """

    name: str
    heads: tuple[str, ...]
    options: Mapping[str, object] = field(default_factory=dict)


def mixed_precision(amp: str) -> dict[str, object]:
    """Returns the options that run both networks in mixed precision; "none" has no options."""
    if amp == "none":
        return {}
    return {"SOLVER.AMP.ENABLED": True, "SOLVER.AMP.DTYPE": amp, "KD.TEACHER.DTYPE": amp}


def combinations(names: Sequence[str], options: Mapping[str, object]) -> list[Row]:
    """Makes a row for each combination of heads, given as names joined by commas, or as "none"."""
    return [Row(name, tuple(name.split(",")) if name != "none" else (), options) for name in names]


def switches(row: Row) -> list[Row]:
    """Makes rows with one switch each that this machine supports, after one without any; the last one has them all.

    Switches that are on by default on a GPU are on in every row but their own.
    """
    cuda = torch.cuda.is_available()
    dtypes = ["bfloat16", "float16"] if cuda else ["bfloat16"]
    options: dict[str, dict[str, object]] = {}
    for dtype in dtypes:
        options[f"SOLVER.AMP {dtype}"] = {"SOLVER.AMP.ENABLED": True, "SOLVER.AMP.DTYPE": dtype}
    for dtype in dtypes:
        options[f"KD.TEACHER.DTYPE {dtype}"] = {"KD.TEACHER.DTYPE": dtype}
    keys = ["KD.TEACHER.FOLD_NORM", "SOLVER.CHANNELS_LAST", "KD.TEACHER.CHANNELS_LAST"]
    keys += ["KD.TEACHER.COMPILE", "KD.COMPILE_HEADS"]
    options |= {key: {key: True} for key in keys}
    if cuda:  # All other rows have it.
        options["KD.TEACHER.SIDE_STREAM False"] = {"KD.TEACHER.SIDE_STREAM": False}
        keys.append("KD.TEACHER.SIDE_STREAM")
    options["all, bfloat16"] = mixed_precision("bfloat16") | dict.fromkeys(keys, True)
    rows = [Row(name, row.heads, {**row.options, **switched}) for name, switched in options.items()]
    return [Row("all off", row.heads, row.options), *rows]


def with_teacher(rows: list[Row]) -> Row:
    """Returns the first row that has heads, and therefore a teacher.

    Raises:
        InputError: If no row has heads.
    """
    for row in rows:
        if row.heads:
            return row
    raise InputError("--heads: only 'none' is named, which has no teacher to measure.")
