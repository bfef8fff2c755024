"""Keeps an exponential moving average of a student's weights and evaluates it alongside the student."""

import itertools
import logging

import torch
from detectron2.config import CfgNode
from detectron2.engine import hooks
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from kd_det.config import has_peers
from kd_det.errors import InputError

logger = logging.getLogger(__name__)


class AveragedStudent(AveragedModel):
    """Averages a student's weights over the updates; the count of updates stays on the CPU.

    The first update copies the student. Buffers are averaged like the parameters, so that the running statistics of
    batch norms belong to the averaged weights, not to the student's latest ones. Whole numbers are copied.

    Args:
        student: The student.
        decay: Weight of the average in an update, towards which the weight grows in the first updates.
    """

    def __init__(self, student: nn.Module, decay: float):
        super().__init__(student, use_buffers=True)
        self.decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Updates the average by the current weights of the student, without waiting for a GPU."""
        updates = int(self.n_averaged)
        # As in TensorFlow, the decay grows: after n updates the average spans at most n / 9 of them, so even a short
        # run forgets its initial weights.
        decay = min(self.decay, (1 + updates) / (10 + updates))
        averages: list[Tensor] = []
        currents: list[Tensor] = []
        students = itertools.chain(model.parameters(), model.buffers())
        for average, current in zip(
            itertools.chain(self.module.parameters(), self.module.buffers()), students, strict=True
        ):
            if updates and average.is_floating_point():
                averages.append(average)
                currents.append(current)
            else:
                average.copy_(current)
        if averages:
            torch._foreach_lerp_(averages, currents, 1 - decay)
        self.n_averaged += 1


def build_ema(cfg: CfgNode, student: nn.Module) -> AveragedStudent | None:
    """Builds the average that ``SOLVER.EMA_DECAY`` asks for; returns None if it is 0.

    Raises:
        InputError: If the decay is not below 1, or several students are trained.
    """
    decay = cfg.SOLVER.EMA_DECAY
    if not 0 <= decay < 1:
        raise InputError(f"SOLVER.EMA_DECAY: must be 0 or more and below 1, got {decay}.")
    if not decay:
        return None
    if has_peers(cfg):
        raise InputError(
            f"SOLVER.EMA_DECAY: got {decay}, but {cfg.MODEL.META_ARCHITECTURE} have no averages; allowed is 0."
        )
    return AveragedStudent(student, decay).requires_grad_(False)


class EMAEvaluation(hooks.EvalHook):
    """Evaluates the averaged student after the student itself; its results are ``ema/bbox/AP`` and the like.

    The evaluation writes its files below ``OUTPUT_DIR/ema``.

    Args:
        cfg: The whole config.
        ema: The averaged student.
    """

    def __init__(self, cfg: CfgNode, ema: AveragedStudent):
        super().__init__(cfg.TEST.EVAL_PERIOD, self._evaluate)
        self.cfg = cfg.clone()
        self.cfg.defrost()
        self.cfg.OUTPUT_DIR = f"{cfg.OUTPUT_DIR}/ema"
        self.ema = ema

    def _evaluate(self) -> dict:
        logger.info("The averaged weights:")
        results = {"ema": self.trainer.test(self.cfg, self.ema.module)}
        self.trainer._last_eval_results |= results
        return results
