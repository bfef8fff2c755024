"""Checkpoints: loaded without running code from the file, strictly where asked; a damaged one is passed over."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils.file_io import PathManager
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from kd_det.checkpoint_files import check_damage, load_safely, readable, reason
from kd_det.checkpoint_folder import (
    TAG,
    find_earlier,
    find_superseded,
    read_headers,
    read_tag,
    record_run,
)
from kd_det.errors import InputError, UnreadableError
from kd_det.files import write_whole
from kd_det.formats import backbone_of_classifier, load_zoo_pickle, rename_torchvision_resnet


class KDCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer with safe loading and atomic writing.

    Given the student as `model` and the heads as the checkpointable ``kd_heads``, ``"model"`` in every file is
    the plain student. Loads what Detectron2 loads (``.pkl`` of its zoos, ``.pth``), and torchvision's ResNets as they
    come.

    Attributes:
        keep: How many checkpoints of iterations stay, this run's newest ones; 0: all.
        run: Id of the run that is saved; None where there is no run.
        loaded: The file that was loaded last, and how many of the model's keys were in it, of how many; None before.

    Raises:
        InputError: When loading, if the file does not exist, cannot be read, holds anything but arrays and plain
            containers, shares no key with the model, or lacks a checkpointable that is to be loaded. When saving, if
            the file cannot be written; the checkpoints before it are still there.
        FloatingPointError: When saving, if a weight is not finite.
    """

    keep = 0
    run: str | None = None
    loaded: tuple[str, int, int] | None = None

    def save(self, name: str, **kwargs: Any) -> None:
        """Write a checkpoint, whole or not at all; it becomes the one that a run is resumed from."""
        if not self.save_dir or not self.save_to_disk:
            return
        self._check_weights()
        self.write(name, **kwargs)
        self.tag_last_checkpoint(f"{name}.pth")
        if self.keep:
            for path in find_superseded(self.save_dir, self.run, kwargs.get("iteration"), keep=self.keep):
                os.remove(path)

    def write(self, name: str, **kwargs: Any) -> None:
        """Write a checkpoint that no run is resumed from."""
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
        """See Detectron2. Where the last checkpoint is damaged or gone, this run's newest one before it is loaded.

        Raises:
            UnreadableError: If all are damaged or gone.
            InputError: If the model has keys that the one which is loaded lacks.
        """
        if not (resume and self.has_checkpoint()):
            return self.load(path, checkpointables=[])
        last = self.get_checkpoint_file()
        try:
            if not os.path.isfile(last):
                raise UnreadableError(f"{last} does not exist")
            return self._resume(last)
        except UnreadableError as error:
            reasons = [str(error)]
        earlier, others = find_earlier(last)
        reasons += others
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
        """Let the run be resumed from its newest checkpoint up to an iteration, if the last one is newer.

        Args:
            limit: The iteration.
            begun: Whether the run began in this process; without such a checkpoint it will then begin anew. A resumed
                run keeps its last checkpoint in that case.
        """
        if not self.save_to_disk or not self.has_checkpoint():
            return
        last = self.get_checkpoint_file()
        own = {path: x.iteration for path, x in read_headers(self.save_dir)[0].items() if x.run == self.run}
        if own.get(last, limit) <= limit:
            return
        earlier = [path for path, iteration in own.items() if iteration <= limit]
        if earlier:
            newest = os.path.basename(max(earlier, key=own.get))
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
        self._parsed_url_during_load = None  # Left behind by a load that failed.
        return super().load(find_file(path, "MODEL.WEIGHTS") if path else path, checkpointables)

    def _load_file(self, filename: str) -> dict[str, Any]:
        check_damage(filename)
        with readable(filename):
            loaded = load_zoo_pickle(filename) if filename.endswith(".pkl") else super()._load_file(filename)
        model = loaded["model"]
        if isinstance(model, dict) and "state_dict" in model:  # as PyTorch's own training scripts save it
            loaded["model"] = model = model["state_dict"]
        if not isinstance(model, dict) or not all(isinstance(value, Tensor | np.ndarray) for value in model.values()):
            raise InputError(f"{filename}: not a checkpoint: neither it nor its 'model' maps names to tensors.")
        consume_prefix_in_state_dict_if_present(model, "module.")
        if "layer1.0.conv1.weight" in model:
            loaded = {"model": rename_torchvision_resnet(model), "matching_heuristics": True}
        elif "linear.weight" in model and "linear.weight" not in self.model.state_dict():
            loaded |= {"model": backbone_of_classifier(model), "matching_heuristics": True}
        lacking = [key for key in self._required if key not in loaded]
        if lacking:
            raise InputError(f"{filename}: cannot be resumed: it has {', '.join(loaded)}, but no {', '.join(lacking)}.")
        return loaded

    def _torch_load(self, f: str) -> dict[str, Any]:
        return load_safely(f)

    def _load_model(self, checkpoint: dict[str, Any]):
        offered = list(checkpoint["model"])
        incompatible = super()._load_model(checkpoint)
        own = counted_keys(self.model)
        matched = len(own - set(incompatible.missing_keys))
        self.logger.info("%d of the model's %d keys were in the checkpoint.", matched, len(own))
        self.loaded = self._path, matched, len(own)
        if not matched:
            raise InputError(
                f"{self._path}: the checkpoint has none of the {len(own)} keys of {type(self.model).__name__}; "
                f"it has {shorten(offered)}."
            )
        return incompatible


class _StrictCheckpointer(KDCheckpointer):
    def _log_incompatible_keys(self, incompatible) -> None:
        shapes = [f"{key} {found} instead of {own}" for key, found, own in incompatible.incorrect_shapes]
        wrong = {key for key, *_ in incompatible.incorrect_shapes}
        missing = [key for key in incompatible.missing_keys if key not in wrong]
        # Older zoo files hold the pixel statistics, which come from the config.
        unexpected = [key for key in incompatible.unexpected_keys if key not in ("pixel_mean", "pixel_std")]
        if not (missing or unexpected or shapes):
            return
        total = len(counted_keys(self.model))
        matched = total - len(incompatible.missing_keys)
        parts = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
        told = "; ".join(f"{len(keys)} {what}: {shorten(keys)}" for what, keys in parts.items() if keys)
        raise InputError(f"{matched} of {total} keys ({matched / total:.0%}) match; {told}.")


def load_strictly(model: nn.Module, path: str, *, key: str) -> dict[str, Any]:
    """Load weights that must fit a model key for key.

    Args:
        model: A model as :func:`build_model` makes it.
        path: Path or URL of a detector's checkpoint, ``.pth`` or ``.pkl``.
        key: The config key that names the file, for messages.

    Returns:
        What else the file holds.

    Raises:
        InputError: If there is no such file, it cannot be read, or keys are missing, unexpected or of another shape.
    """
    find_file(path, key)
    try:
        return _StrictCheckpointer(model).load(path)
    except InputError as error:
        raise InputError(f"{key}: {path} does not fit the config's {type(model).__name__}: {error}") from error


@contextmanager
def fits(key: str, path: str) -> Iterator[None]:
    """Around the loading of what a run wrote, of whatever parts.

    Raises:
        InputError: If a part does not fit what it is loaded into.
    """
    try:
        yield
    except (InputError, torch.cuda.OutOfMemoryError):
        raise
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        told = f"{type(error).__name__}: {reason(error)}"
        raise InputError(f"{key}: {path} was written by a run with another config ({told}).") from error


def find_file(path: str, key: str) -> str:
    """Local path of a file or URL, downloaded if need be; a query after ``?`` is kept.

    Raises:
        InputError: If it does not exist or cannot be fetched.
    """
    name, mark, query = path.partition("?")
    try:
        local = PathManager.get_local_path(name)
    except Exception as error:  # each handler of the path manager has its own
        raise InputError(f"{key}: {path} cannot be fetched: {reason(error)}") from error
    if not os.path.isfile(local):
        raise InputError(f"{key}: there is no file {path}.")
    return local + mark + query


def counted_keys(model: nn.Module) -> set[str]:
    """Keys that a checkpoint can match. Of BatchNorm's counters torch never tells that they are missing."""
    return {key for key in model.state_dict() if not key.endswith("num_batches_tracked")}


def shorten(names: list[str], shown: int = 5) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
