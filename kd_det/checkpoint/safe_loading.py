"""Loads weights from files that may be damaged, malicious, or meant for another model."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlparse

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
from fvcore.common.checkpoint import _IncompatibleKeys
from torch import Tensor

from kd_det.checkpoint.keys import counted_keys, is_counted
from kd_det.errors import InputError, reason, shorten
from kd_det.fetching import find_file
from kd_det.formats import fit_names, read_weights


class Loaded(NamedTuple):
    """Describes the last file that was loaded.

    Attributes:
        path: Path of the file; "" before the first load.
        matched: Number of the model's keys that the file had.
        total: Number of all keys of the model.
    """

    path: str
    matched: int
    total: int


class SafeCheckpointer(DetectionCheckpointer):
    """Extends Detectron2's checkpointer with safe loading.

    Loads what Detectron2 loads (``.pkl`` of its zoos, ``.pth``), and ResNets of torchvision and timm without
    conversion.

    Attributes:
        loaded: Describes the last file that was loaded.

    Raises:
        InputError: When loading, if the file does not exist, cannot be read, holds anything but arrays and plain
            containers, shares no key with the model, or lacks a checkpointable that is to be loaded.
    """

    loaded = Loaded("", 0, 0)

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        found = find_file(path, "MODEL.WEIGHTS") if path else path
        # A part that says so may be missing from checkpoints that were written before it existed.
        required = [key for key, part in self.checkpointables.items() if not getattr(part, "optional", False)]
        self._required = required if checkpointables is None else checkpointables
        self._path, self._query = path, urlparse(found).query
        self._parsed_url_during_load = None  # A load that failed leaves this behind.
        return super().load(found, checkpointables)

    def _load_file(self, filename: str) -> dict[str, Any]:
        queries = parse_qs(self._query)
        heuristics = {"matching_heuristics": True} if queries.pop("matching_heuristics", None) == ["True"] else {}
        if queries:
            raise InputError(
                f"{self._path}: ?{', '.join(queries)} is unknown; only ?matching_heuristics=True is allowed."
            )
        content = fit_names(read_weights(filename) | heuristics, self.model.state_dict(), filename)
        lacking = [key for key in self._required if key not in content]
        if lacking:
            there = ", ".join(map(str, content))
            raise InputError(f"{filename}: cannot be resumed: it has {there}, but no {', '.join(lacking)}.")
        return content

    def _load_model(self, checkpoint: dict[str, Any]) -> _IncompatibleKeys:
        offered = list(checkpoint["model"])
        keys = counted_keys(self.model)
        try:
            if checkpoint.pop("matching_heuristics", False):
                checkpoint["model"] = align_and_update_state_dicts(
                    self.model.state_dict(), checkpoint["model"], checkpoint.get("__author__") == "Caffe2"
                )
            self._check_types(checkpoint["model"])
            incompatible = super()._load_model(checkpoint)
        except (AssertionError, IndexError, KeyError, RuntimeError, ValueError) as error:
            if isinstance(error, InputError | torch.cuda.OutOfMemoryError):
                raise
            name = type(self.model).__name__
            raise InputError(
                f"{self._path}: its weights do not fit {name}: {type(error).__name__}: {reason(error)}"
            ) from error
        # The counters of batch norms do not matter: frozen ones have none, and torch supplies those that are missing.
        incompatible.missing_keys[:] = filter(is_counted, incompatible.missing_keys)
        incompatible.unexpected_keys[:] = filter(is_counted, incompatible.unexpected_keys)
        matched = len(keys - set(incompatible.missing_keys))
        self.logger.info("%d of the model's %d keys were in the checkpoint.", matched, len(keys))
        self.loaded = Loaded(self._path, matched, len(keys))
        if not matched:
            raise InputError(
                f"{self._path}: the checkpoint has none of the {len(keys)} keys of {type(self.model).__name__}; "
                f"it has {shorten(offered)}."
            )
        return incompatible

    def _check_types(self, state: dict[str, Tensor]) -> None:
        """Checks that the model's floating-point weights are loaded as such, and logs changes of precision."""
        expected = self.model.state_dict()
        pairs = {key: (value.dtype, expected[key].dtype) for key, value in state.items() if key in expected}
        others = {key: types for key, types in pairs.items() if types[1].is_floating_point and types[0] != types[1]}
        wrong = [f"{key} is {a} instead of {b}" for key, (a, b) in others.items() if not a.is_floating_point]
        if wrong:
            raise InputError(f"{self._path}: {len(wrong)} weights are of another type: {shorten(wrong)}.")
        for theirs, ours in sorted(set(others.values()), key=str):
            self.logger.info("Weights in %s are converted to %s.", theirs, ours)


@contextmanager
def loading_checkpoint(key: str, path: str) -> Iterator[None]:
    """Turns errors from loading a checkpoint that does not match this config into an InputError.

    Args:
        key: The config key or argument that names the checkpoint, for messages.
        path: The checkpoint or its folder, for messages.

    Raises:
        InputError: If a part of the checkpoint does not fit the object that loads it.
    """
    try:
        yield
    except (InputError, torch.cuda.OutOfMemoryError):
        raise
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        message = f"{type(error).__name__}: {reason(error)}"
        raise InputError(f"{key}: {path} was written by a run with another config ({message}).") from error
