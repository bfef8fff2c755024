"""What is measured: the networks and their batch, and what each row of a table has of its own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from kd_det.errors import InputError


@dataclass(frozen=True)
class Setup:
    """What all rows of a table share.

    Attributes:
        depths: Of the ResNets of student and teacher.
        batch: Images per step.
        size: Side of the images in pixels.
        rounds: How often each part of a row is measured.
    """

    depths: tuple[int, int]
    batch: int
    size: int
    rounds: int


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        name: What stands in its first column.
        heads: Names of the heads.
        options: Config keys and their values.
    """

    name: str
    heads: tuple[str, ...]
    options: Mapping[str, object] = field(default_factory=dict)


def mixed_precision(amp: str) -> dict[str, object]:
    """Options of both networks in a precision; none for "none"."""
    if amp == "none":
        return {}
    return {"SOLVER.AMP.ENABLED": True, "SOLVER.AMP.DTYPE": amp, "KD.TEACHER.DTYPE": amp}


def combinations(names: Sequence[str], options: Mapping[str, object]) -> list[Row]:
    """A row for each combination of heads: names joined by commas, or "none"."""
    return [Row(name, tuple(name.split(",")) if name != "none" else (), options) for name in names]


def switches(row: Row) -> list[Row]:
    """A row, and beside it rows with one switch each that this machine has; the last row has all of them at once."""
    cuda = torch.cuda.is_available()
    dtypes = ["bfloat16", "float16"] if cuda else ["bfloat16"]
    found = {f"SOLVER.AMP {dtype}": {"SOLVER.AMP.ENABLED": True, "SOLVER.AMP.DTYPE": dtype} for dtype in dtypes}
    found |= {f"KD.TEACHER.DTYPE {dtype}": {"KD.TEACHER.DTYPE": dtype} for dtype in dtypes}
    keys = ["SOLVER.CHANNELS_LAST", "KD.TEACHER.CHANNELS_LAST", "KD.TEACHER.COMPILE", "KD.COMPILE_HEADS"]
    keys += ["KD.TEACHER.SIDE_STREAM"] if cuda else []
    found |= {key: {key: True} for key in keys}
    found["all, bfloat16"] = mixed_precision("bfloat16") | dict.fromkeys(keys, True)
    rows = [Row(name, row.heads, {**row.options, **options}) for name, options in found.items()]
    return [Row("all off", row.heads, row.options), *rows]


def with_teacher(rows: list[Row]) -> Row:
    """Find the first row that has heads, and so a teacher.

    Raises:
        InputError: If there is none.
    """
    for row in rows:
        if row.heads:
            return row
    raise InputError("--heads: only 'none' is named, which has no teacher to measure.")
