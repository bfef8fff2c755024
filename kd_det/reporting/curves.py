"""Reads the scalars of a run from ``metrics.json`` and thins them for drawing."""

import json
import math
import re
import sys
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# Maps the title of a group of charts to the names of its scalars.
GROUPS = {
    "Accuracy on the test set": re.compile(r"(.*/)?(AP|AP50|AR@100|top1)"),
    "Losses": re.compile(r"(.*/)?(total_loss|loss_.+)"),
    "Shares of the gradient in the backbone": re.compile(r"kd/gradient/.+"),
    "Weights of the heads and the learning rate": re.compile(r"kd/weight/.+|lr"),
}


@dataclass(frozen=True)
class Curve:
    """Holds the values of a scalar (N,) and their iterations (N,); NaN stands for a value that is not finite."""

    iterations: np.ndarray
    values: np.ndarray


def read_curves(path: str | Path) -> dict[str, Curve]:
    """Reads the scalars of :data:`GROUPS` from a run's ``metrics.json``.

    Lines that are not JSON objects with an iteration, such as one that a kill cut off, are skipped. A missing file has
    no scalars.

    Args:
        path: The file, one JSON object per line.

    Returns:
        The curve of each scalar by name, in ascending order of iterations.
    """
    columns: dict[str, tuple[array, array]] = {}
    wanted: dict[str, bool] = {}
    if not Path(path).is_file():
        return {}
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            scalars = read_line(line)
            iteration = _as_number(scalars.get("iteration"))
            if math.isnan(iteration):
                continue
            for name, value in scalars.items():
                if name not in wanted:
                    wanted[name] = any(pattern.fullmatch(name) for pattern in GROUPS.values())
                if wanted[name]:
                    iterations, values = columns.setdefault(name, (array("d"), array("d")))
                    iterations.append(iteration)
                    values.append(_as_number(value))
    return {name: _sorted(*column) for name, column in columns.items()}


def read_line(line: str | bytes) -> Mapping[str, object]:
    """Reads the scalars of a line of ``metrics.json``; returns {} if it is damaged or not a JSON object."""
    try:
        scalars = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return scalars if isinstance(scalars, dict) else {}


def _as_number(value: object) -> float:
    """Returns a number that is finite as it is, and NaN for everything else."""
    return float(value) if isinstance(value, int | float) and abs(value) <= sys.float_info.max else math.nan


def _sorted(iterations: array, values: array) -> Curve:
    order = np.argsort(iterations, kind="stable")
    return Curve(np.asarray(iterations)[order], np.asarray(values)[order])


def thin(curve: Curve, points: int) -> Curve:
    """Thins a curve to about `points` points, and keeps its first and last value and all of its peaks.

    The curve is cut into sections of equally many points, each of which keeps its lowest and its highest value.

    Args:
        curve: The curve.
        points: Maximum number of points; 2 more are possible, for the first and the last value.
    """
    count = len(curve.values)
    if count <= points:
        return curve
    kept = {0, count - 1}
    for section in np.array_split(np.arange(count), max(1, points // 2)):
        values = curve.values[section]
        if np.isnan(values).all():
            kept.add(int(section[0]))  # The gap stays visible.
        else:
            kept |= {int(section[np.nanargmin(values)]), int(section[np.nanargmax(values)])}
    chosen = sorted(kept)
    return Curve(curve.iterations[chosen], curve.values[chosen])
