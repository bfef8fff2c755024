"""Finds the keypoints that swap places in a mirrored image, by their names."""

import re
from collections.abc import Sequence

SIDES = {"left": "right", "right": "left", "l": "r", "r": "l"}
WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")


def mirrored_pairs(names: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Pairs the names that differ only in left and right, such as eye.L and eye.R or left_eye and right_eye."""
    pairs = []
    for i, name in enumerate(names):
        other = WORD.sub(_other_side, name)
        if other in names[i + 1 :]:
            pairs.append((name, other))
    return tuple(pairs)


def _other_side(match: re.Match) -> str:
    word = match.group()
    other = SIDES.get(word.lower(), word)
    return other.upper() if word.isupper() else other.capitalize() if word.istitle() else other
