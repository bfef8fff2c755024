"""Born-again networks: a student of the teacher's own kind learns from its class probabilities."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from torch import Tensor, nn

from kd_det.errors import InputError
from kd_det.heads.build import check_class_counts
from kd_det.losses import born_again_loss, confidence_weights, permute_dark_knowledge
from kd_det.losses.numerics import cast_up
from kd_det.registry import KD_HEAD_REGISTRY
from kd_det.signals import Batch, Signals

KINDS = ("ban", "cwtm", "dkpp")
SOURCES = {"roi": "roi_logits", "cls": "logits"}


@KD_HEAD_REGISTRY.register()
class BornAgainHead(nn.Module):
    """Born-again networks (Furlanello et al., ICML 2018, https://arxiv.org/abs/1805.04770).

    The teacher is the previous generation: the same network from another seed. Temperature 1, one of:

    * ``ban``: cross-entropy with the teacher's probabilities, mean over rows;
    * ``dkpp``: the same, after the probabilities of all but the teacher's most probable class were permuted, anew for
      every row;
    * ``cwtm``: cross-entropy with the labels, each row weighted by the teacher's highest probability over the sum of
      these. On boxes the foreground's share of the mean is handed out like this, and background rows keep weight 1 / R:
      nearly all teachers are sure of background, which would leave no weight for objects.

    As published there are no labels beside it: this loss takes the place of the student's own ``loss_cls``, and of
    nothing else; on a detector the losses of the RPN, the boxes and the masks stay. With ``labels`` ``loss_cls`` stays
    too. (``KD.TASK_WEIGHT`` is another thing: it scales all of the student's own losses, on a detector also those.)

    Args:
        kind: "ban", "cwtm" or "dkpp".
        source: "roi", the sampled boxes of an R-CNN, or "cls", images.
        labels: Whether the student's own ``loss_cls`` stays.
    """

    config: ClassVar = {
        "WEIGHT": 1.0,
        # "ban": cross-entropy with the teacher's probabilities. "dkpp": the same with all but its most probable class
        # permuted. "cwtm": cross-entropy with the labels, weighted by the teacher's confidence.
        "KIND": "ban",
        # roi (classes of the sampled boxes) or cls (image classifiers).
        "SOURCE": "roi",
        # Keep the student's own loss_cls; otherwise this loss replaces it.
        "LABELS": False,
    }

    @configurable
    def __init__(self, *, kind: str = config["KIND"], source: str = config["SOURCE"], labels: bool = config["LABELS"]):
        super().__init__()
        self.kind = kind
        self.source = source
        self.signals = (SOURCES[source],)
        self.replaces = () if labels else ("loss_cls",)

    @classmethod
    def from_config(cls, cfg, student_spec, teacher_spec) -> dict:
        node = cfg.KD.BORN_AGAIN
        for key, allowed in (("KIND", KINDS), ("SOURCE", SOURCES)):
            if node[key] not in allowed:
                raise InputError(f"KD.BORN_AGAIN.{key}: {node[key]!r} is not one of {', '.join(allowed)}.")
        check_class_counts("KD.BORN_AGAIN.SOURCE", SOURCES[node.SOURCE], student_spec, teacher_spec)
        return {"kind": node.KIND, "source": node.SOURCE, "labels": node.LABELS}

    def forward(self, student: Signals, teacher: Signals, batch: Batch) -> dict[str, Tensor]:
        own, other = student[self.signals[0]], teacher[self.signals[0]]
        if self.kind == "cwtm":
            labels = student["roi_classes" if self.source == "roi" else "labels"]
            losses = F.cross_entropy(cast_up(own), labels, reduction="none")
            return {"loss_kd_born_again": (self._weights(other, labels) * losses).sum()}
        if self.kind == "dkpp":
            other = permute_dark_knowledge(cast_up(other).softmax(dim=1)).log()
        return {"loss_kd_born_again": born_again_loss(own, other)}

    def _weights(self, other: Tensor, labels: Tensor) -> Tensor:
        """Weight of each row in the sum, (N,); they sum to 1."""
        if self.source == "cls":
            return confidence_weights(other)
        weights = torch.full(labels.shape, 1 / max(len(labels), 1), dtype=cast_up(other).dtype, device=other.device)
        foreground = labels < other.shape[1] - 1
        weights[foreground] *= foreground.sum() * confidence_weights(other[foreground])
        return weights
