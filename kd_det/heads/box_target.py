"""Implements box targets: the student's boxes are compared with the teacher's."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from torch import Tensor, nn

from kd_det.errors import InputError, check_choice
from kd_det.heads.anchors import is_positive, positive_count
from kd_det.heads.build import check_class_counts
from kd_det.losses import bounded_regression_loss, box_overlap_loss, decode_boxes
from kd_det.losses.box_regression import encode_boxes
from kd_det.losses.numerics import cast_up, select_class
from kd_det.registry import KD_HEAD_REGISTRY
from kd_det.signals import Batch, Signals

SOURCES = ("roi", "rpn", "dense")
KINDS = ("smooth_l1", "giou", "bounded")
# Published factors of two kinds, with which a WEIGHT of 1 has the published strength.
GIOU_WEIGHT = 4.0
BOUNDED_WEIGHT = 0.5


@KD_HEAD_REGISTRY.register()
class BoxTargetHead(nn.Module):
    """Compares the student's boxes with the teacher's, on the same proposals and anchors.

    The kinds are:

    * ``smooth_l1``: smooth L1 between the box deltas, mean over boxes and the four deltas, of foreground boxes
      (``roi``) or of the anchors labelled as objects (``rpn``, ``dense``);
    * ``giou``, the boxes of BCKD (Yang et al., ICCV 2023, https://arxiv.org/abs/2308.14286): 4 times the sum of
      ``w (1 - GIoU)`` over all anchors that the student's own losses use, divided by the number of those labelled as
      objects. The weight w is the largest difference between the class probabilities of both networks, so that boxes
      count where the teacher still knows better what is there. Of ``roi``, for which nothing is published, the rows are
      the foreground boxes, and w is the difference at the labelled class. The anchors of ``rpn`` are the sample that
      the RPN's own losses take, and their labels count its objects; the classes of BCKD, ``ANCHORS: focal`` of
      :class:`kd_det.heads.SoftTargetHead`, take all anchors of an RPN, and count those in which the teacher sees an
      object. Nothing is published for an RPN;
    * ``bounded`` (Chen et al., NeurIPS 2017, "Learning Efficient Object Detection Models with Knowledge Distillation"),
      ``roi`` only: half the squared error of the student's deltas, summed over the four, mean over foreground boxes,
      where the student is not better than the teacher by a margin. It pulls towards the label; the teacher is a bound.

    Deltas of ``roi`` are those of the labelled class. Numbers of boxes or anchors that divide a sum over ``giou`` or
    anchors are averaged over processes.

    Args:
        sources: Any of "roi", "rpn", "dense".
        kind: "smooth_l1", "giou" or "bounded".
        margin: How far the squared error of "bounded" must lie below the teacher's.
    """

    config: ClassVar[dict[str, Any]] = {
        "WEIGHT": 1.0,
        # Any of roi (foreground boxes), rpn (anchors of an R-CNN), dense (anchors of a RetinaNet).
        "SOURCES": ["roi"],
        # "smooth_l1" between the deltas; "giou" between the boxes, weighted by how far the student's class
        # probabilities are from the teacher's (BCKD); "bounded", the squared distance to the label where the student is
        # not better than the teacher (Chen et al., 2017; roi only).
        "KIND": "smooth_l1",
        # How much smaller than the teacher's the student's squared error must be for bounded to let go of it.
        "MARGIN": 0.0,
    }

    @configurable
    def __init__(
        self,
        *,
        sources: Sequence[str] = config["SOURCES"],
        kind: str = config["KIND"],
        margin: float = config["MARGIN"],
    ):
        super().__init__()
        self.sources = tuple(sources)
        self.kind = kind
        self.margin = margin
        # The label of the background follows from the number of logits.
        self.signals = tuple(f"{source}_{name}" for source in sources for name in ("logits", "deltas"))

    @classmethod
    def from_config(cls, cfg, student_spec, teacher_spec) -> dict:
        node = cfg.KD.BOX_TARGET
        if not node.SOURCES or not set(node.SOURCES) <= set(SOURCES):
            raise InputError(f"KD.BOX_TARGET.SOURCES: got {node.SOURCES}; allowed are {', '.join(SOURCES)}.")
        check_choice("KD.BOX_TARGET.KIND", node.KIND, KINDS)
        if node.KIND == "bounded" and list(node.SOURCES) != ["roi"]:
            raise InputError(f"KD.BOX_TARGET.SOURCES: must be ['roi'] with KIND 'bounded', got {node.SOURCES}.")
        if node.MARGIN < 0 or (node.MARGIN > 0 and node.KIND != "bounded"):
            raise InputError(
                "KD.BOX_TARGET.MARGIN: must be 0 or more with KIND 'bounded', and 0 with the others, which have none; "
                f"got {node.MARGIN} with {node.KIND!r}."
            )
        for source in node.SOURCES:
            for name in ("logits", "deltas"):
                check_class_counts("KD.BOX_TARGET.SOURCES", f"{source}_{name}", student_spec, teacher_spec)
        return {"sources": node.SOURCES, "kind": node.KIND, "margin": node.MARGIN}

    def forward(self, student: Signals, teacher: Signals, batch: Batch) -> dict[str, Tensor]:
        compare = {"roi": self._rois, "rpn": self._anchors, "dense": self._anchors}
        return {f"loss_kd_box_target_{source}": compare[source](student, teacher, source) for source in self.sources}

    def _rois(self, student: Signals, teacher: Signals, source: str) -> Tensor:
        background = student["roi_logits"].shape[1] - 1
        rows = torch.nonzero(student["roi_classes"] < background).flatten()
        classes = student["roi_classes"][rows]
        s_deltas, t_deltas = (
            select_class(cast_up(side["roi_deltas"])[rows], classes, per_class=4) for side in (student, teacher)
        )
        if self.kind == "smooth_l1":
            return F.smooth_l1_loss(s_deltas, t_deltas.detach(), reduction="sum") / max(s_deltas.numel(), 1)
        boxes = student["roi_boxes"][rows, 1:]
        if self.kind == "bounded":
            targets = encode_boxes(student["roi_gt_boxes"][rows], boxes, weights=student["roi_scales"].tolist())
            return BOUNDED_WEIGHT * bounded_regression_loss(s_deltas, t_deltas, targets, margin=self.margin)
        s_probs, t_probs = (
            cast_up(side["roi_logits"])[rows].softmax(dim=1).gather(1, classes[:, None]) for side in (student, teacher)
        )
        count = positive_count(student["roi_classes"], background=background, dtype=s_deltas.dtype)
        weights = (t_probs - s_probs).abs().squeeze(1)
        return self._overlap(s_deltas, t_deltas, boxes, student["roi_scales"], weights, count)

    def _anchors(self, student: Signals, teacher: Signals, source: str) -> Tensor:
        (s_logits, t_logits), (s_deltas, t_deltas) = (
            [cast_up(side[f"{source}_{name}"]) for side in (student, teacher)] for name in ("logits", "deltas")
        )
        labels, background = student[f"{source}_labels"], 0 if source == "rpn" else s_logits.shape[-1]
        count = positive_count(labels, background=background, dtype=s_deltas.dtype)
        if self.kind == "smooth_l1":
            errors = F.smooth_l1_loss(s_deltas, t_deltas.detach(), reduction="none").mean(dim=-1)
            return errors.masked_fill(~is_positive(labels, background=background), 0).sum() / count
        weights = (t_logits.sigmoid() - s_logits.sigmoid()).abs().amax(dim=-1) * (labels >= 0)
        anchors = student[f"{source}_anchors"].repeat(len(s_deltas), 1)
        rows = s_deltas.flatten(0, 1), t_deltas.flatten(0, 1), anchors
        return self._overlap(*rows, student[f"{source}_scales"], weights.flatten(), count)

    def _overlap(
        self, s_deltas: Tensor, t_deltas: Tensor, boxes: Tensor, scales: Tensor, weights: Tensor, count: Tensor
    ) -> Tensor:
        """Compares what the deltas make of the boxes."""
        s_boxes, t_boxes = (decode_boxes(x, boxes, weights=scales.tolist()) for x in (s_deltas, t_deltas.detach()))
        return GIOU_WEIGHT * box_overlap_loss(s_boxes, t_boxes, weights=weights, normalizer=count)
