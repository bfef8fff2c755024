"""Writes a run's scalars and pictures to the terminal, ``metrics.json``, Weights & Biases and TensorBoard."""

import json
import logging
import math
import os
from collections import defaultdict
from functools import cached_property
from typing import Any

import numpy as np
import torch
import yaml
from detectron2.config import CfgNode
from detectron2.engine import TrainerBase
from detectron2.utils.events import CommonMetricPrinter, EventWriter, TensorboardXWriter, get_event_storage
from torch import Tensor

from kd_det.errors import InputError
from kd_det.files import naming, write_whole
from kd_det.reporting.curves import read_line

logger = logging.getLogger(__name__)


class ProgressPrinter(CommonMetricPrinter):
    """Extends Detectron2's printer, which may divide by zero when an error makes it print an iteration twice.

    Args:
        cfg: The run's config.
        trainer: The trainer; nothing is printed after its last iteration, which may come before SOLVER.MAX_ITER.
    """

    last = -1

    def __init__(self, cfg: CfgNode, trainer: TrainerBase):
        super().__init__(cfg.SOLVER.MAX_ITER)
        self.trainer = trainer

    def write(self) -> None:
        iteration = get_event_storage().iter
        if iteration != self.last and iteration < self.trainer.max_iter:
            self.last = iteration
            super().write()


class MetricsWriter(EventWriter):
    """Writes scalars as lines of JSON, one per iteration, in Detectron2's format.

    Unlike Detectron2's own writer, it writes them in the order of the iterations, writes null for NaN, which JSON does
    not have, and keeps no file open, so that lines can be dropped.

    Args:
        path: The file that new lines are appended to.
    """

    def __init__(self, path: str):
        self.path = path
        self.last = -1

    def write(self) -> None:
        with naming(self.path), open(self.path, "a", encoding="utf-8") as file:
            for iteration, scalars in new_scalars(self.last).items():
                finite = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
                file.write(json.dumps(finite | {"iteration": iteration}, sort_keys=True) + "\n")
                self.last = iteration


class TensorBoardWriter(TensorboardXWriter):
    """Extends Detectron2's writer: its errors name the file, for example on a full disk."""

    def __init__(self, folder: str):
        super().__init__(folder)
        self.path = os.path.join(folder, "events.out.tfevents.*")

    def write(self) -> None:
        with naming(self.path):
            super().write()

    def close(self) -> None:
        with naming(self.path):
            super().close()


class WandbWriter(EventWriter):
    """Sends scalars, pictures and the config to Weights & Biases.

    A resumed run continues the same Weights & Biases run, whose id is stored in the checkpoint. Iterations that are
    recomputed are not logged twice: Weights & Biases keeps the values that it already has.

    It must write before :class:`TensorBoardWriter`, which clears the pictures.

    Args:
        cfg: The run's config.
        trainer: The trainer; its ``run`` is read at the first write, after a checkpoint has been loaded.

    Raises:
        InputError: If the package is missing.
    """

    def __init__(self, cfg: CfgNode, trainer: TrainerBase):
        try:
            import wandb
        except ImportError as error:
            raise InputError(
                f"WANDB.PROJECT: got {cfg.WANDB.PROJECT!r}, which needs wandb ({error}): pip install wandb."
            ) from error
        self.wandb = wandb
        self.cfg = cfg
        self.trainer = trainer
        self.last = -1

    @cached_property
    def run(self) -> Any:
        return self.wandb.init(
            project=self.cfg.WANDB.PROJECT,
            name=self.cfg.WANDB.NAME or self.cfg.OUTPUT_DIR,
            id=self.trainer.run,
            resume="allow",
            dir=self.cfg.OUTPUT_DIR,
            config=yaml.safe_load(self.cfg.dump()),
        )

    def write(self) -> None:
        values = new_scalars(self.last)
        for name, image, iteration in get_event_storage()._vis_data:
            values.setdefault(iteration, {})[name] = self.wandb.Image(as_uint8(image))
        for iteration, logged in sorted(values.items()):
            self.run.log(logged, step=iteration)
            self.last = iteration

    def close(self) -> None:
        if "run" in vars(self):
            self.run.finish(exit_code=int(self.trainer.iter < self.trainer.max_iter))


def build_writers(cfg: CfgNode, trainer: TrainerBase) -> list[EventWriter]:
    """Builds the writers of a run, and makes the folder that they write to.

    Raises:
        InputError: If WANDB.PROJECT is set and the package is missing.
    """
    os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    return [
        ProgressPrinter(cfg, trainer),
        MetricsWriter(metrics_path(cfg)),
        *([WandbWriter(cfg, trainer)] if cfg.WANDB.PROJECT else []),
        TensorBoardWriter(cfg.OUTPUT_DIR),
    ]


def metrics_path(cfg: CfgNode) -> str:
    return os.path.join(cfg.OUTPUT_DIR, "metrics.json")


def new_scalars(last: int) -> dict[int, dict[str, float]]:
    """Maps each iteration after `last` to its scalars by name; losses and times are medians of 20 iterations."""
    scalars: defaultdict[int, dict[str, float]] = defaultdict(dict)
    for name, (value, iteration) in get_event_storage().latest_with_smoothing_hint().items():
        if iteration > last:
            scalars[iteration][name] = value
    return dict(sorted(scalars.items()))


def as_uint8(image: Tensor | np.ndarray) -> np.ndarray:
    """Converts a picture of the storage, (3, H, W), floats from 0 to 1 or uint8, to uint8 (H, W, 3)."""
    image = torch.as_tensor(image).detach().cpu().permute(1, 2, 0)
    return (image if image.dtype == torch.uint8 else (255 * image).byte()).numpy()


def drop_lines(path: str, start: int) -> None:
    """Drops the lines of ``metrics.json`` that a run will write again, and a line that a kill cut off.

    Other lines that do not belong to an iteration are dropped too, and quoted in the log.

    Args:
        path: The file; nothing happens without one.
        start: The iteration from which the run continues.
    """
    if not os.path.isfile(path):
        return
    with open(path, "rb") as file:
        lines = file.readlines()
    end = len(lines)
    while end and not (lines[end - 1].endswith(b"\n") and -1 < logged_iteration(lines[end - 1]) < start):
        end -= 1
    for number, line in enumerate(lines[end:], end + 1):
        if line.endswith(b"\n") and logged_iteration(line) < 0:
            logger.warning("%s: drops line %d, which belongs to no iteration: %r", path, number, line[:200])
    if end < len(lines):
        write_whole(path, lambda file: file.writelines(lines[:end]))


def last_iteration(path: str) -> float:
    """Finds the last iteration in ``metrics.json``; returns -1 if there is none."""
    if not os.path.isfile(path):
        return -1
    with open(path, "rb") as file:
        return next((x for x in map(logged_iteration, reversed(file.readlines())) if x >= 0), -1)


def logged_iteration(line: bytes) -> float:
    """Reads the iteration of a line of ``metrics.json``; returns -1 if the line has none."""
    return logged_number(line, "iteration")


def logged_number(line: bytes, name: str) -> float:
    """Reads a scalar of a line of ``metrics.json`` that is 0 or more; returns -1 if the line has none or is damaged."""
    number = read_line(line).get(name)
    return number if isinstance(number, int | float) and number >= 0 else -1
