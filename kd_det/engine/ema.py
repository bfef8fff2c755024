"""Keeps an exponential moving average of a student's weights and evaluates it alongside the student."""

import logging
from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.engine import hooks
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from kd_det.config import has_peers
from kd_det.errors import InputError

logger = logging.getLogger(__name__)


def build_ema(cfg: CfgNode, student: nn.Module) -> AveragedModel | None:
    """Builds the average that ``SOLVER.EMA_DECAY`` asks for; returns None if it is 0.

    The first update copies the student. Buffers are averaged like the parameters, so that the running statistics of
    batch norms belong to the averaged weights, not to the student's latest ones.

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

    def average(averaged: Sequence[Tensor], current: Sequence[Tensor], updates: Tensor | int) -> None:
        # As in TensorFlow, the decay grows: after n updates the average spans at most n / 9 of them, so even a short
        # run forgets its initial weights.
        ramp = (1 + int(updates)) / (10 + int(updates))
        get_ema_multi_avg_fn(min(decay, ramp))(averaged, current, updates)

    return AveragedModel(student, multi_avg_fn=average, use_buffers=True).requires_grad_(False)


class EMAEvaluation(hooks.EvalHook):
    """Evaluates the averaged student after the student itself; its results are ``ema/bbox/AP`` and the like.

    The evaluation writes its files below ``OUTPUT_DIR/ema``.

    Args:
        cfg: The whole config.
        ema: The averaged student.
    """

    def __init__(self, cfg: CfgNode, ema: AveragedModel):
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
