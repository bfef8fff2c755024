"""Reads for the HTML report what ``kd-det relevance`` and ``kd-det noise`` found out about the models."""

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import cv2

from kd_det.analysis.compare_noise import SHOWN, shown_metrics
from kd_det.analysis.table import format_number
from kd_det.errors import InputError
from kd_det.reporting.gallery import embed
from kd_det.reporting.page import Cell, Illustration, Section, Table

SIDE = 1800  # Pixels on the longer side of a picture.


def read_learned(folder: str | Path) -> Section | None:
    """Reads the results of ``kd-det relevance`` and ``kd-det noise`` that lie in a folder.

    Args:
        folder: The folder, with ``relevance.json`` and ``relevance.png``, ``noise.json`` and ``noise.png``, or none.

    Returns:
        The section of the report; None without results.

    Raises:
        InputError: If a file is damaged, or a picture is missing.
    """
    tables: list[Table] = []
    pictures: list[Illustration] = []
    for name, make_tables, title in (
        (
            "relevance",
            relevance_tables,
            "Relevance: red pixels speak for the class, blue ones against it",
        ),
        ("noise", noise_tables, "Task loss and accuracy under noise in a feature"),
    ):
        path = Path(folder, f"{name}.json")
        if path.is_file():
            tables += read_tables(path, make_tables)
            pictures.append(Illustration(title, embed(read_picture(path.with_suffix(".png")), side=SIDE)))
    lead = "Relevance shows which pixels a class depends on; noise in a feature shows how flat a model's minimum is."
    return Section("learned", "What the students learned", lead, tables, pictures=pictures) if tables else None


def read_tables(path: Path, make_tables: Callable[[Mapping[str, Any]], list[Table]]) -> list[Table]:
    """Reads a JSON file and makes tables of its content.

    Raises:
        InputError: If it is not a file that this version of the command wrote.
    """
    try:
        return make_tables(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path}: is not what kd-det {path.stem} writes; delete it, or run that again.") from error


def read_picture(path: Path) -> Any:
    """Reads a picture, RGB uint8 (H, W, 3).

    Raises:
        InputError: If it is missing or damaged.
    """
    pixels = cv2.imread(str(path)) if path.is_file() else None
    if pixels is None:
        raise InputError(f"{path}: is missing or damaged; run kd-det {path.stem} again.")
    return pixels[..., ::-1]


def relevance_tables(results: Mapping[str, Any]) -> list[Table]:
    """Makes the table of :func:`kd_det.analysis.compare_relevance.compare_relevance`, one row per model or half."""
    counts = Counter(run["name"] for run in results["runs"])
    columns = list(next(iter(results["summary"].values()), {}))
    rows = [(name, [cell(x[column], counts[name]) for column in columns]) for name, x in results["summary"].items()]
    note = results["table"].rpartition("\n\n")[2]
    return [Table("Relevance", ("", *columns), rows, note)]


def noise_tables(results: Mapping[str, Any]) -> list[Table]:
    """Makes a table for each metric of :func:`kd_det.analysis.compare_noise.compare_noise`, one row per model."""
    curves = results["summary"]
    strengths = [f"{point['strength']:g}" for point in next(iter(curves.values()), [])]
    note = results["table"].rpartition("\n\n")[2]
    return [
        Table(
            f"{SHOWN[metric]} by strength of the noise in {results['feature']}",
            ("", *strengths),
            [(name, [cell(x["metrics"].get(metric), x["count"]) for x in points]) for name, points in curves.items()],
            note,
        )
        for metric in shown_metrics(curves)
    ]


def cell(value: Mapping[str, float | None] | None, count: int) -> Cell:
    """Formats a mean over runs, with its standard deviation if there are several; a dash if there is none."""
    if value is None or value["mean"] is None or math.isnan(value["mean"]):
        return Cell("-")
    return Cell(format_number({key: math.nan if x is None else x for key, x in value.items()}, 3, count))
