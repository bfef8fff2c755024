"""Defines the exceptions for a user's mistake, and the words of their messages."""

import textwrap
from collections.abc import Collection, Sequence


class InputError(ValueError):
    """Reports a mistake in a config, a file or an argument in one line.

    The message names the key or the file, what was found and what is allowed. The tools print it without a traceback
    and exit with status 1; every other exception is a defect and keeps its traceback.
    """


class UnreadableError(InputError):
    """Reports a file that is missing, damaged or not a checkpoint."""


def check_choice(key: str, value: object, allowed: Collection[object]) -> None:
    """Checks that a config key has one of the allowed values.

    Raises:
        InputError: If it has any other value.
    """
    if value not in allowed:
        choices = ", ".join(str(choice) or "''" for choice in allowed)
        raise InputError(f"{key}: {value!r} is not one of {choices}.")


def one_line(text: str) -> str:
    """Puts a text on one line."""
    return " ".join(text.split())


def shorten(names: Sequence[str], shown: int = 5) -> str:
    """Lists the first names, and counts the others."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def reason(error: Exception) -> str:
    """Returns the most informative line of an error's message, shortened if it is long."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    # If a state dict does not fit, the first line only says so; the next ones name the keys.
    first = lines[1] if lines[0].endswith(":") and len(lines) > 1 else lines[0]
    return textwrap.shorten(next((line for line in lines if "unsupported" in line.lower()), first), 300)
