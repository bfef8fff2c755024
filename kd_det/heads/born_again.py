"""Implements born-again networks: a student learns from the class probabilities of a teacher of the same kind."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from torch import Tensor, nn

from kd_det.errors import check_choice
from kd_det.heads.build import check_class_counts
from kd_det.losses import born_again_loss, confidence_weights, permute_dark_knowledge
from kd_det.losses.numerics import cast_up
from kd_det.registry import KD_HEAD_REGISTRY
from kd_det.signals import SOFTMAX_SOURCES, SOURCES, Batch, Signals

KINDS = ("ban", "cwtm", "dkpp")


@KD_HEAD_REGISTRY.register()
class BornAgainHead(nn.Module):
    """Teaches the student the class probabilities of the previous generation.

    Born-again networks (Furlanello et al., ICML 2018, https://arxiv.org/abs/1805.04770). The teacher is the previous
    generation: the same network from another seed. The temperature is 1, and the loss is one of:

    * ``ban``: cross-entropy with the teacher's probabilities, mean over rows;
    * ``dkpp``: the same, after the probabilities of all classes except the teacher's most probable one were permuted,
      separately for every row;
    * ``cwtm``: cross-entropy with the labels, each row weighted by the teacher's highest probability divided by the sum
      of these. On boxes only the foreground's share of the mean is distributed like this, and background rows keep
      the weight 1 / R: nearly all teachers are sure of background, which would leave no weight for objects.

    As published, this is the only loss on classes: it replaces the student's own ``loss_cls`` and nothing else, so a
    detector keeps the losses of its RPN, boxes and masks. With ``labels``, ``loss_cls`` is kept alongside. (This is
    independent of ``KD.TASK_WEIGHT``, which scales all of the student's own losses, including those of a detector.)

    Args:
        kind: "ban", "cwtm" or "dkpp".
        source: "roi", the sampled boxes of an R-CNN, or "cls", images.
        labels: Whether the student's own ``loss_cls`` is kept.
    """

    config: ClassVar[dict[str, Any]] = {
        "WEIGHT": 1.0,
        # "ban": cross-entropy with the teacher's probabilities. "dkpp": the same, with all classes except its most
        # probable one permuted. "cwtm": cross-entropy with the labels, weighted by the teacher's confidence.
        "KIND": "ban",
        # roi (classes of the sampled boxes) or cls (image classifiers).
        "SOURCE": "roi",
        # Keep the student's own loss_cls (BAN+L in the paper); otherwise this loss replaces it.
        "LABELS": False,
    }

    @configurable
    def __init__(self, *, kind: str = config["KIND"], source: str = config["SOURCE"], labels: bool = config["LABELS"]):
        super().__init__()
        self.kind = kind
        self.source = source
        self.signals = (SOURCES[source].logits,)
        self.replaces = () if labels else ("loss_cls",)
        self.reads_labels = kind == "cwtm"

    @classmethod
    def from_config(cls, cfg, student_spec, teacher_spec) -> dict:
        node = cfg.KD.BORN_AGAIN
        check_choice("KD.BORN_AGAIN.KIND", node.KIND, KINDS)
        check_choice("KD.BORN_AGAIN.SOURCE", node.SOURCE, SOFTMAX_SOURCES)
        check_class_counts("KD.BORN_AGAIN.SOURCE", SOURCES[node.SOURCE].logits, student_spec, teacher_spec)
        return {"kind": node.KIND, "source": node.SOURCE, "labels": node.LABELS}

    def forward(self, student: Signals, teacher: Signals, batch: Batch) -> dict[str, Tensor]:
        s_logits, t_logits = student[self.signals[0]], teacher[self.signals[0]]
        if self.kind == "cwtm":
            labels = student["roi_classes" if self.source == "roi" else "labels"]
            losses = F.cross_entropy(cast_up(s_logits), labels, reduction="none")
            return {"loss_kd_born_again": (self._weights(t_logits, labels) * losses).sum()}
        if self.kind == "dkpp":
            t_logits = permute_dark_knowledge(cast_up(t_logits).softmax(dim=1)).log()
        return {"loss_kd_born_again": born_again_loss(s_logits, t_logits)}

    def _weights(self, t_logits: Tensor, labels: Tensor) -> Tensor:
        """Computes the weight of each row, (N,); the weights sum to 1."""
        if self.source == "cls":
            return confidence_weights(t_logits)
        foreground, rows = labels < t_logits.shape[1] - 1, max(len(labels), 1)
        confidence = cast_up(t_logits.detach()).softmax(dim=1).amax(dim=1) * foreground
        return torch.where(foreground, confidence * (foreground.sum() / (rows * confidence.sum())), 1 / rows)
