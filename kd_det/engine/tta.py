"""Test-time augmentation, as Detectron2's ``tools/train_net.py`` does it: one more evaluation, after the run."""

import logging
from collections.abc import Callable

from detectron2.config import CfgNode
from detectron2.engine import hooks
from detectron2.modeling import GeneralizedRCNNWithTTA
from torch import nn

logger = logging.getLogger(__name__)


def evaluate_with_tta(test: Callable[[CfgNode, nn.Module], dict], cfg: CfgNode, model: nn.Module) -> dict:
    """Evaluate a detector on several sizes of each image, and flipped ones, as ``TEST.AUG`` says.

    What the evaluation writes is below ``OUTPUT_DIR/tta``.

    Args:
        test: Evaluates a model.
        cfg: The whole config.
        model: The detector.

    Returns:
        The results, named ``bbox_TTA`` and the like.
    """
    logger.info("With test-time augmentation:")
    cfg = cfg.clone()
    cfg.defrost()
    cfg.OUTPUT_DIR = f"{cfg.OUTPUT_DIR}/tta"
    found = test(cfg, GeneralizedRCNNWithTTA(cfg, model))
    return {f"{name}_TTA": results for name, results in found.items()}


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
        found = evaluate_with_tta(self.trainer.test, self.cfg, self.student)
        self.trainer._last_eval_results |= found
        return found
