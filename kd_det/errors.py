"""The exceptions that stand for a user's mistake."""


class InputError(ValueError):
    """A mistake in a config, a file or an argument, told in one line.

    The message names the key or the file, what was found and what is allowed. The tools print it without a traceback
    and exit with status 1; every other exception is a defect and keeps its traceback.
    """


class UnreadableError(InputError):
    """A checkpoint that is damaged, or is no checkpoint."""
