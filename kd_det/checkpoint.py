"""Saves and loads checkpoints: no code in a file is run, damaged files are skipped, and strict loading is available."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import parse_qs

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
from torch import Tensor, nn

from kd_det.checkpoint_folder import (
    TAG,
    find_earlier,
    find_superseded,
    read_headers,
    read_tag,
    record_run,
)
from kd_det.errors import InputError, UnreadableError, reason
from kd_det.fetching import find_file
from kd_det.files import write_whole
from kd_det.formats import fit_names, read_weights


class KDCheckpointer(DetectionCheckpointer):
    """Extends Detectron2's checkpointer with safe loading and atomic writing.

    With the student as `model` and the heads as the checkpointable ``kd_heads``, ``"model"`` in every file is the plain
    student. Loads what Detectron2 loads (``.pkl`` of its zoos, ``.pth``), and ResNets of torchvision and timm without
    conversion.

    Attributes:
        keep: Number of this run's newest checkpoints of iterations to keep; 0 keeps all.
        run: Id of the run that is saved; None without a run.
        loaded: The last file that was loaded, the number of the model's keys that it had, and the number of all keys of
            the model; None before the first load.

    Raises:
        InputError: When loading, if the file does not exist, cannot be read, holds anything but arrays and plain
            containers, shares no key with the model, or lacks a checkpointable that is to be loaded. When saving, if
            the file cannot be written; earlier checkpoints are then still there.
        FloatingPointError: When saving, if a weight is not finite.
    """

    keep = 0
    run: str | None = None
    loaded: tuple[str, int, int] | None = None

    def save(self, name: str, **kwargs: Any) -> None:
        """Writes a checkpoint atomically and makes it the one that the run is resumed from."""
        if not self.save_dir or not self.save_to_disk:
            return
        self._check_weights()
        self.write(name, **kwargs)
        self.tag_last_checkpoint(f"{name}.pth")
        if self.keep:
            for path in find_superseded(self.save_dir, self.run, kwargs.get("iteration"), keep=self.keep):
                os.remove(path)

    def write(self, name: str, **kwargs: Any) -> None:
        """Writes a checkpoint atomically, without making it the one that the run is resumed from."""
        data = {"model": self.model.state_dict()}
        data |= {key: value.state_dict() for key, value in self.checkpointables.items()}
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info("Saving checkpoint to %s", path)
        write_whole(path, lambda file: torch.save(data | kwargs, file))

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        if self.run:
            record_run(self.save_dir, self.run)
        path = os.path.join(self.save_dir, TAG)
        write_whole(path, lambda file: file.write(last_filename_basename.encode()))

    def get_checkpoint_file(self) -> str:
        return os.path.join(self.save_dir, read_tag(self.save_dir))

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Resumes from the last checkpoint or loads `path`, as in Detectron2.

        If the last checkpoint is damaged or gone, this run's newest earlier one is loaded.

        Raises:
            UnreadableError: If all checkpoints are damaged or gone.
            InputError: If the loaded checkpoint lacks keys of the model.
        """
        if not (resume and self.has_checkpoint()):
            return self.load(path, checkpointables=[])
        last = self.get_checkpoint_file()
        try:
            if not os.path.isfile(last):
                raise UnreadableError(f"{last}, which {TAG} names, is no file")
            return self._resume(last)
        except UnreadableError as error:
            reasons = [str(error)]
        earlier, further_reasons = find_earlier(last)
        reasons += further_reasons
        for file in earlier:
            try:
                loaded = self._resume(file)
            except UnreadableError as error:
                reasons.append(str(error))
                continue
            self.logger.warning("%s. Going on with the checkpoint before, %s.", "; ".join(reasons), file)
            return loaded
        raise UnreadableError(
            f"--resume: {'; '.join(reasons)}. No checkpoint of this run is left; without --resume the run begins anew."
        )

    def _resume(self, file: str) -> dict[str, Any]:
        loaded = self.load(file)
        _, matched, total = self.loaded
        if matched < total:
            raise InputError(
                f"--resume: {file} was written by a run with another config: {matched} of the model's {total} keys "
                "match."
            )
        return loaded

    def retreat(self, limit: int, *, begun: bool) -> None:
        """Makes the run resume from its newest checkpoint up to an iteration, if the last one is newer.

        Args:
            limit: The iteration.
            begun: Whether the run began in this process. If so, and there is no such checkpoint, the run begins anew
                when it is resumed; a run that was itself resumed keeps its last checkpoint instead.
        """
        if not self.save_to_disk or not self.has_checkpoint():
            return
        last = self.get_checkpoint_file()
        iterations = {path: x.iteration for path, x in read_headers(self.save_dir)[0].items() if x.run == self.run}
        if iterations.get(last, limit) <= limit:
            return
        earlier = [path for path, iteration in iterations.items() if iteration <= limit]
        if earlier:
            newest = os.path.basename(max(earlier, key=iterations.get))
            self.tag_last_checkpoint(newest)
            self.logger.warning("The training had diverged at %s: --resume goes on from %s.", last, newest)
        elif begun:
            os.remove(os.path.join(self.save_dir, TAG))
            self.logger.warning("The training had diverged at %s, its first checkpoint: --resume begins anew.", last)

    def _check_weights(self) -> None:
        parts = {"model": self.model} | {k: v for k, v in self.checkpointables.items() if isinstance(v, nn.Module)}
        weights = {f"{part}.{name}": p for part, module in parts.items() for name, p in module.named_parameters()}
        finite = torch.stack([p.isfinite().all() for p in weights.values()]).tolist()
        bad = [name for name, good in zip(weights, finite, strict=True) if not good]
        if bad:
            raise FloatingPointError(f"{len(bad)} of the weights' tensors are not finite: {shorten(bad)}")

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        self._required = list(self.checkpointables) if checkpointables is None else checkpointables
        self._path = path
        self._parsed_url_during_load = None  # A load that failed leaves this behind.
        return super().load(find_file(path, "MODEL.WEIGHTS") if path else path, checkpointables)

    def _load_file(self, filename: str) -> dict[str, Any]:
        queries = parse_qs(self._parsed_url_during_load.query)
        heuristics = {"matching_heuristics": True} if queries.pop("matching_heuristics", None) == ["True"] else {}
        if queries:
            raise InputError(
                f"{self._path}: ?{', '.join(queries)} is unknown; only ?matching_heuristics=True is allowed."
            )
        loaded = fit_names(read_weights(filename) | heuristics, self.model.state_dict(), filename)
        lacking = [key for key in self._required if key not in loaded]
        if lacking:
            there = ", ".join(map(str, loaded))
            raise InputError(f"{filename}: cannot be resumed: it has {there}, but no {', '.join(lacking)}.")
        return loaded

    def _load_model(self, checkpoint: dict[str, Any]):
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
        self.loaded = self._path, matched, len(keys)
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


class _StrictCheckpointer(KDCheckpointer):
    def _log_incompatible_keys(self, incompatible) -> None:
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


@contextmanager
def fits(key: str, path: str) -> Iterator[None]:
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


def is_counted(key: str) -> bool:
    """Returns whether a key is compared between checkpoint and model; leaves out num_batches_tracked of batch norms."""
    return not key.endswith("num_batches_tracked")


def counted_keys(model: nn.Module) -> set[str]:
    """Returns the keys of a model that a checkpoint is compared with."""
    return set(filter(is_counted, model.state_dict()))


def shorten(names: list[str], shown: int = 5) -> str:
    """Returns the first names of a list and the number of the others, as text."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
