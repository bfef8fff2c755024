"""Checks polygons and RLE masks of COCO annotations before they reach pycocotools, which trusts its input."""

from typing import Any, TypeGuard

import numpy as np
import pycocotools.mask as mask_util
from detectron2.structures import PolygonMasks

# Largest coordinate in pixels; beyond it, pycocotools overflows its integers or runs out of memory.
FARTHEST = 1e6


def are_numbers(values: Any) -> TypeGuard[list[float]]:
    """Returns whether a value is a list of finite numbers that can be pixel coordinates."""
    if not isinstance(values, list) or not set(map(type, values)) <= {int, float}:
        return False
    try:
        return sum(map(abs, values)) <= FARTHEST * len(values)  # This is False if one of them is nan.
    except OverflowError:
        return False


def read_segmentation(value: Any) -> list[list[float]] | dict[str, Any] | None:
    """Returns the part of a segmentation that pycocotools and Detectron2 can read.

    Returns:
        Polygons of three points or more, [] if all polygons have fewer, an RLE mask, or None without a mask.

    Raises:
        ValueError: If it is neither polygons nor RLE; the message says what is needed.
    """
    if value is None or value in ([], {}):
        return None
    if isinstance(value, dict):
        return _read_rle(value)
    polygons = [value] if are_numbers(value) else value
    if not isinstance(polygons, list) or not all(map(are_numbers, polygons)):
        raise ValueError("a list of polygons, each a list of numbers x, y, x, y, ..., or an RLE mask")
    whole = [polygon for polygon in polygons if len(polygon) % 2 == 0 and len(polygon) >= 6]
    return polygons if len(whole) == len(polygons) else whole


def mask_area(segmentation: list[list[float]] | dict[str, Any]) -> float:
    """Returns the area of a mask, computed as Detectron2 does when it writes a COCO file."""
    if isinstance(segmentation, list):
        return float(PolygonMasks([segmentation]).area()[0])
    counts = segmentation["counts"]
    return float(sum(counts[1::2]) if isinstance(counts, list) else mask_util.area(segmentation))


def _read_rle(value: dict[str, Any]) -> dict[str, Any]:
    size, counts = value.get("size"), value.get("counts")
    if not (are_numbers(size) and len(size) == 2 and all(side == int(side) > 0 for side in size)):
        raise ValueError("an RLE mask: its size must be [height, width]")
    try:
        runs = np.array(counts) if are_numbers(counts) else _decode_runs(counts)
    except (AttributeError, ValueError):
        raise ValueError("an RLE mask: its counts must be a list of numbers or compressed text") from None
    height, width = map(int, size)
    if (runs < 0).any() or (runs != runs.astype(np.int64)).any() or runs.sum() != height * width:
        raise ValueError(f"an RLE mask: its counts must be whole numbers that add up to its size, {height} x {width}")
    if all(type(number) is int for number in (*size, *(counts if isinstance(counts, list) else ()))):
        return value
    return {"size": [height, width], "counts": runs.astype(int).tolist() if isinstance(counts, list) else counts}


def _decode_runs(counts: Any) -> np.ndarray:
    """Returns the run lengths of a compressed RLE mask, which pycocotools would read unchecked.

    A run is written in groups of five bits, lowest first, each with a bit that says whether another group follows. From
    the fourth run on, the value is the difference from the run two places before.
    """
    codes = np.frombuffer(counts.encode("ascii"), np.uint8).astype(np.int64) - 48
    if not len(codes) or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        raise ValueError(counts)
    ends = np.flatnonzero(codes & 32 == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 7:  # The value has more than 32 bits.
        raise ValueError(counts)
    places = np.arange(len(codes)) - np.repeat(starts, lengths)
    runs = np.add.reduceat((codes & 31) << 5 * places, starts) - ((codes[ends] & 16) // 16 << 5 * lengths)
    for first in (1, 2):
        runs[first::2] = np.cumsum(runs[first::2])
    return runs
