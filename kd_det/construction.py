"""The construction of networks from configs: what Detectron2, torch or timm reject in a config is a user's mistake."""

import logging
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from detectron2.config import CfgNode
from detectron2.modeling import build_backbone, build_model
from torch import nn

from kd_det.config import default_config, one_line, student_config
from kd_det.config_kinds import leaves
from kd_det.errors import InputError

logger = logging.getLogger(__name__)
# What constructors raise for a value that they do not know or cannot use; errors of the system are others.
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
    """Build the model of a config, as Detectron2's ``build_model`` does; see :func:`naming_config`."""
    with naming_config(cfg, source):
        return build_model(cfg)


@contextmanager
def naming_config(cfg: CfgNode, source: str) -> Iterator[None]:
    """Name the config where a constructor rejects one of its values.

    An error that is raised in this package's own code, or in a plugin's, is a defect and stays what it is.

    Args:
        cfg: What is built.
        source: What the config was read from, for messages.

    Raises:
        InputError: Naming the meta-architecture, the reason, and the keys that may be meant.
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
        raise InputError(f"{source}: {architecture} cannot be built: {reason(error)}{suspects(cfg, error)}.") from error


def is_own(error: BaseException) -> bool:
    """Whether an error comes from the code of this package, or of a plugin, rather than from a library."""
    frame = list(traceback.walk_tb(error.__traceback__))[-1][0]
    return re.match(r"kd_det(\.|_plugin_|$)", frame.f_globals.get("__name__", "")) is not None


def reason(error: BaseException) -> str:
    """Describe an error by its message, or by the line that raised it where it has none that says something."""
    message = one_line(error)
    if isinstance(error, AssertionError) and not re.search(r"[a-z]{3}", str(error)):
        message = traceback.extract_tb(error.__traceback__)[-1].line or message
    return f"{type(error).__name__}: {message.rstrip('.')}"


def suspects(cfg: CfgNode, error: BaseException) -> str:
    """Name the keys of MODEL that hold what an error quotes, and the features that they may name."""
    message = one_line(error)
    quoted = {message, *re.findall(r"'([^']+)'", message), *(["GN"] if "num_groups" in message else [])}
    found = {
        key: value != default
        for key, value, default in leaves(cfg.MODEL, default_config().MODEL, "MODEL.")
        if (value in quoted if isinstance(value, str) else isinstance(value, list | tuple) and quoted & names(value))
    }
    # Those that the user has set come to mind first.
    found = [key for key in found if found[key] or not any(found.values())]
    text = f"; see {', '.join(found)}" if found else ""
    if any(key.endswith("IN_FEATURES") for key in found):
        with suppress(*REJECTIONS):
            text += f" (the backbone gives {', '.join(build_backbone(cfg).output_shape())})"
    return text


def names(values: list | tuple) -> set[str]:
    return {value for value in values if isinstance(value, str)}
