"""Builds networks from configs, and turns what Detectron2, torch or timm reject in a config into an InputError."""

import logging
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from detectron2.config import CfgNode
from detectron2.modeling import build_backbone, build_model
from torch import nn

from kd_det.config import default_config, student_config, yacs_message
from kd_det.config_kinds import leaves
from kd_det.errors import InputError

logger = logging.getLogger(__name__)
# Errors that constructors raise for a value that they do not know or cannot use. Errors of the system are not among
# them.
REJECTIONS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)


def build_network(cfg: CfgNode, source: str) -> nn.Module:
    """Builds the model of a config, as Detectron2's ``build_model`` does; see :func:`naming_config`."""
    with naming_config(cfg, source):
        return build_model(cfg)


@contextmanager
def naming_config(cfg: CfgNode, source: str) -> Iterator[None]:
    """Names the config if a constructor rejects one of its values.

    An error that is raised in this package's own code, or in a plugin's, is a defect and passes through unchanged.

    Args:
        cfg: The config that a network is built from.
        source: Origin of the config, for messages.

    Raises:
        InputError: If a value is rejected; names the meta-architecture, the reason, and the keys that may be at fault.
    """
    try:
        yield
    except InputError:
        raise
    except REJECTIONS as error:
        if is_own(error):
            raise
        logger.debug("The construction failed:", exc_info=True)
        architecture = student_config(cfg).MODEL.META_ARCHITECTURE
        raise InputError(
            f"{source}: {architecture} cannot be built: {describe_rejection(error)}{suspects(cfg, error)}."
        ) from error


def is_own(error: Exception) -> bool:
    """Returns whether an error was raised by this package or a plugin rather than by a library."""
    frame = list(traceback.walk_tb(error.__traceback__))[-1][0]
    return re.match(r"kd_det(\.|_plugin_|$)", frame.f_globals.get("__name__", "")) is not None


def describe_rejection(error: Exception) -> str:
    """Describes an error by its message, or by the line that raised it if the message says nothing."""
    message = yacs_message(error)
    if isinstance(error, AssertionError) and not re.search(r"[a-z]{3}", str(error)):
        message = traceback.extract_tb(error.__traceback__)[-1].line or message
    return f"{type(error).__name__}: {message.rstrip('.')}"


def suspects(cfg: CfgNode, error: Exception) -> str:
    """Names the keys of MODEL whose values an error quotes, and the features that such keys may list."""
    message = yacs_message(error)
    quoted = {message, *re.findall(r"'([^']+)'", message), *(["GN"] if "num_groups" in message else [])}
    is_set = {
        key: value != default
        for key, value, default in leaves(cfg.MODEL, default_config().MODEL, "MODEL.")
        if (value in quoted if isinstance(value, str) else isinstance(value, list | tuple) and quoted & names(value))
    }
    # Keys that the user has set are the likeliest cause.
    keys = [key for key in is_set if is_set[key] or not any(is_set.values())]
    text = f"; see {', '.join(keys)}" if keys else ""
    if any(key.endswith("IN_FEATURES") for key in keys):
        with suppress(*REJECTIONS):
            text += f" (the backbone gives {', '.join(build_backbone(cfg).output_shape())})"
    return text


def names(values: list | tuple) -> set[str]:
    return {value for value in values if isinstance(value, str)}
