"""The exceptions that stand for a user's mistake."""

import textwrap
from collections.abc import Collection


class InputError(ValueError):
    """A mistake in a config, a file or an argument, told in one line.

    The message names the key or the file, what was found and what is allowed. The tools print it without a traceback
    and exit with status 1; every other exception is a defect and keeps its traceback.
    """


class UnreadableError(InputError):
    """A file that is missing, or a checkpoint that is damaged or is none."""


def check_choice(key: str, value: object, allowed: Collection[object]) -> None:
    """Checks that a config key has one of the allowed values.

    Raises:
        InputError: If it has another one.
    """
    if value not in allowed:
        choices = ", ".join(str(choice) or "''" for choice in allowed)
        raise InputError(f"{key}: {value!r} is not one of {choices}.")


def reason(error: Exception) -> str:
    """The line of an error's message that tells most, cut where it is long."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    # Of a state that does not fit, the first line only says so; the others have its keys.
    first = lines[1] if lines[0].endswith(":") and len(lines) > 1 else lines[0]
    return textwrap.shorten(next((line for line in lines if "unsupported" in line.lower()), first), 300)
