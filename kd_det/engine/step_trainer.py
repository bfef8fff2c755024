"""Runs training steps in mixed precision, with several updates, or split into micro-batches to save memory."""

import time
from contextlib import AbstractContextManager, nullcontext

import torch
from detectron2.config import CfgNode
from detectron2.engine import AMPTrainer, SimpleTrainer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from kd_det.errors import InputError

AMP_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class AccumulatingTrainer(SimpleTrainer):
    """Accumulates gradients over micro-batches and synchronises them once per step; losses are averaged.

    Operations on a whole batch, such as batch normalisation, see one micro-batch at a time.

    Args:
        parts: Number of micro-batches per batch; it divides the number of images.
        turns: Number of updates per iteration, all on the same batch. If there are several, the model receives the
            index of the update, from 0; parameters that its losses do not depend on are not updated.
    """

    def __init__(self, *arguments, parts: int, turns: int = 1, **options):
        super().__init__(*arguments, **options)
        self.parts = parts
        self.turns = [(turn,) for turn in range(turns)] if turns > 1 else [()]

    def run_step(self) -> None:
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        means: dict[str, Tensor] = {}
        for turn in self.turns:
            self.optimizer.zero_grad()
            means |= self._run_parts(data, turn)
            self.after_backward()
            if turn is self.turns[-1]:
                self._write_metrics(means, data_time)  # This stops the run if a loss is not finite.
            self._update()

    def _run_parts(self, data: list[dict], turn: tuple[int, ...]) -> dict[str, Tensor]:
        """Runs forward and backward for all micro-batches; returns the means of their losses."""
        size = len(data) // self.parts
        means: dict[str, Tensor] = {}
        for i in range(self.parts):
            with nullcontext() if i == self.parts - 1 else self._unsynchronised():
                with self._precision():
                    losses = self.model(data[i * size : (i + 1) * size], *turn)
                    loss = sum(losses.values()) / self.parts
                self._backward(loss)
            for key, value in losses.items():
                means[key] = means.get(key, 0.0) + value.detach() / self.parts
        return means

    def _unsynchronised(self) -> AbstractContextManager:
        return self.model.no_sync() if isinstance(self.model, DistributedDataParallel) else nullcontext()

    def _precision(self) -> AbstractContextManager:
        return nullcontext()

    def _backward(self, loss: Tensor) -> None:
        loss.backward()

    def _update(self) -> None:
        self.optimizer.step()


class AccumulatingAMPTrainer(AccumulatingTrainer, AMPTrainer):
    """Does the same in mixed precision on any device; Detectron2's own trainer supports only GPUs."""

    def _precision(self) -> AbstractContextManager:
        return torch.autocast(next(self.model.parameters()).device.type, dtype=self.precision)

    def _backward(self, loss: Tensor) -> None:
        self.grad_scaler.scale(loss).backward()

    def _update(self) -> None:
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()


def build_step_trainer(
    cfg: CfgNode, model: nn.Module, loader, optimizer: Optimizer, *, turns: int = 1
) -> SimpleTrainer:
    """Builds what runs one iteration: Detectron2's trainer, or one of these for mixed precision, parts or turns.

    Args:
        turns: Number of updates per iteration.

    Raises:
        InputError: If SOLVER.ACCUMULATE does not divide the images of a process, or SOLVER.AMP.DTYPE is unknown.
    """
    parts, images = cfg.SOLVER.ACCUMULATE, loader.batch_sampler.batch_size
    if parts < 1 or images % parts:
        raise InputError(f"SOLVER.ACCUMULATE: got {parts}; it must divide the {images} image(s) of a process and step.")
    if cfg.SOLVER.AMP.DTYPE not in AMP_DTYPES:
        raise InputError(f"SOLVER.AMP.DTYPE: got {cfg.SOLVER.AMP.DTYPE!r}; allowed are {', '.join(AMP_DTYPES)}.")
    if cfg.SOLVER.AMP.ENABLED:
        dtype, device = AMP_DTYPES[cfg.SOLVER.AMP.DTYPE], torch.device(cfg.MODEL.DEVICE).type
        # Gradients in bfloat16 have the range of float32 and need no scaling.
        scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
        options = {"precision": dtype, "grad_scaler": scaler}
        return AccumulatingAMPTrainer(model, loader, optimizer, parts=parts, turns=turns, **options)
    if max(parts, turns) > 1:
        return AccumulatingTrainer(model, loader, optimizer, parts=parts, turns=turns)
    return SimpleTrainer(model, loader, optimizer)
