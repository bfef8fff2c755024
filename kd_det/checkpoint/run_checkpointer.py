"""Saves the checkpoints of a run, and resumes it from the newest one that is whole."""

import os
from typing import Any

import torch
from torch import nn

from kd_det.checkpoint.safe_loading import SafeCheckpointer
from kd_det.checkpoint_folder import TAG, find_earlier, find_superseded, read_headers, read_tag, record_run
from kd_det.errors import InputError, UnreadableError, shorten
from kd_det.files import write_whole


class KDCheckpointer(SafeCheckpointer):
    """Extends Detectron2's checkpointer with safe loading and atomic writing.

    With the student as `model` and the heads as the checkpointable ``kd_heads``, ``"model"`` in every file is the plain
    student.

    Attributes:
        keep: Number of this run's newest checkpoints of iterations to keep; 0 keeps all.
        run: Id of the run that is saved; None without a run.

    Raises:
        InputError: When loading, for the reasons of :class:`SafeCheckpointer`. When saving, if the file cannot be
            written; earlier checkpoints are then still there.
        FloatingPointError: When saving, if a weight is not finite.
    """

    keep = 0
    run: str | None = None

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

    def has_checkpoint(self) -> bool:
        return os.path.lexists(os.path.join(self.save_dir, TAG))

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
                content = self._resume(file)
            except UnreadableError as error:
                reasons.append(str(error))
                continue
            self.logger.warning("%s. Going on with the checkpoint before, %s.", "; ".join(reasons), file)
            return content
        raise UnreadableError(
            f"--resume: {'; '.join(reasons)}. No checkpoint of this run is left; without --resume the run begins anew."
        )

    def _resume(self, file: str) -> dict[str, Any]:
        content = self.load(file)
        _, matched, total = self.loaded
        if matched < total:
            raise InputError(
                f"--resume: {file} was written by a run with another config: {matched} of the model's {total} keys "
                "match."
            )
        return content

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
            newest = os.path.basename(max(earlier, key=iterations.__getitem__))
            self.tag_last_checkpoint(newest)
            self.logger.warning("The training had diverged at %s: --resume continues from %s.", last, newest)
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
