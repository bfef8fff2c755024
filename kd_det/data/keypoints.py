"""Names of keypoints that change places in a mirrored image."""

import re
from collections.abc import Sequence

SIDES = {"left": "right", "right": "left", "l": "r", "r": "l"}
WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")


def mirrored_pairs(names: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Return the pairs of names that differ in left and right alone: left_eye and right_eye, or eye.L and eye.R."""
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
