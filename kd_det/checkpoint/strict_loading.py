"""Loads weights that must match a model key for key."""

from typing import Any

from fvcore.common.checkpoint import _IncompatibleKeys
from torch import nn

from kd_det.checkpoint.keys import counted_keys
from kd_det.checkpoint.safe_loading import SafeCheckpointer
from kd_det.errors import InputError, UnreadableError, shorten
from kd_det.fetching import find_file


class _StrictCheckpointer(SafeCheckpointer):
    """Refuses weights that do not match the model key for key."""

    def _log_incompatible_keys(self, incompatible: _IncompatibleKeys) -> None:
        shapes = [f"{key} {actual} instead of {expected}" for key, actual, expected in incompatible.incorrect_shapes]
        wrong = {key for key, *_ in incompatible.incorrect_shapes}
        missing = [key for key in incompatible.missing_keys if key not in wrong]
        # Older zoo files hold the pixel statistics, which come from the config.
        unexpected = [key for key in incompatible.unexpected_keys if key not in ("pixel_mean", "pixel_std")]
        if not (missing or unexpected or shapes):
            return
        total = len(counted_keys(self.model))
        matched = total - len(incompatible.missing_keys)
        parts = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
        message = "; ".join(f"{len(keys)} {what}: {shorten(keys)}" for what, keys in parts.items() if keys)
        raise InputError(f"{matched} of {total} keys ({matched / total:.0%}) match; {message}.")


def load_strictly(model: nn.Module, path: str, *, key: str) -> dict[str, Any]:
    """Loads weights that must match a model key for key.

    Args:
        model: A model of Detectron2's ``build_model``.
        path: Path or URL of a detector's checkpoint, ``.pth`` or ``.pkl``.
        key: The config key that names the file, for messages.

    Returns:
        The rest of the file's content.

    Raises:
        UnreadableError: If there is no such file, or it cannot be read.
        InputError: If keys are missing, unexpected or of another shape.
    """
    find_file(path, key)
    try:
        return _StrictCheckpointer(model).load(path)
    except UnreadableError as error:
        raise UnreadableError(f"{key}: {error}") from error
    except InputError as error:
        raise InputError(f"{key}: {path} does not fit the config's {type(model).__name__}: {error}") from error
