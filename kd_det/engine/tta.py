"""Evaluates once more after a run with test-time augmentation, as Detectron2's ``tools/train_net.py`` does."""

import logging
from collections.abc import Callable

from detectron2.config import CfgNode
from detectron2.engine import hooks
from detectron2.modeling import GeneralizedRCNNWithTTA
from torch import nn

logger = logging.getLogger(__name__)


def evaluate_with_tta(test: Callable[[CfgNode, nn.Module], dict], cfg: CfgNode, model: nn.Module) -> dict:
    """Evaluates a detector on several sizes of each image, also flipped, as ``TEST.AUG`` says.

    The evaluation writes its files below ``OUTPUT_DIR/tta``.

    Args:
        test: Function that evaluates a model.
        cfg: The whole config.
        model: The detector.

    Returns:
        The results, named ``bbox_TTA`` and the like.
    """
    logger.info("With test-time augmentation:")
    cfg = cfg.clone()
    cfg.defrost()
    cfg.OUTPUT_DIR = f"{cfg.OUTPUT_DIR}/tta"
    results = test(cfg, GeneralizedRCNNWithTTA(cfg, model))
    return {f"{name}_TTA": metrics for name, metrics in results.items()}


class TTAEvaluation(hooks.EvalHook):
    """Evaluates the student with test-time augmentation once, when the run is over.

    Args:
        cfg: The whole config.
        student: The detector.
    """

    def __init__(self, cfg: CfgNode, student: nn.Module):
        super().__init__(0, self._evaluate)
        self.cfg = cfg
        self.student = student

    def _evaluate(self) -> dict:
        results = evaluate_with_tta(self.trainer.test, self.cfg, self.student)
        self.trainer._last_eval_results |= results
        return results
