"""Implements DSIG: an image's boxes are nodes of a graph, whose nodes and edges resemble the teacher's."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from kd_det.heads.align import Aligners
from kd_det.heads.build import check_class_counts, check_pooled_sizes, check_signals
from kd_det.losses import edge_loss
from kd_det.losses.instances import node_errors
from kd_det.losses.numerics import cast_up
from kd_det.registry import KD_HEAD_REGISTRY
from kd_det.signals import Batch, Signals, boxes_per_image

NODES = "roi_features"
PARTS = ("foreground", "background", "edge")
# Factor of the background's nodes: this times the number of objects' boxes per box of the background.
BACKGROUND_RATIO = 7.5
# The background joins the graph where the teacher's cross-entropy with it is at least this.
MINED_ENTROPY = 0.6
# Images on a GPU for which the factors were published; losses are the mean over images, times this.
PUBLISHED_IMAGES = 2


@KD_HEAD_REGISTRY.register()
class InstanceGraphHead(nn.Module):
    """Compares the pooled features of an image's boxes, and the cosines between them.

    DSIG (Chen et al., ICCV 2021, https://arxiv.org/abs/2109.12862) for detectors with proposals. The nodes are the
    ``roi_features`` of the boxes that the student sampled. Of each image three parts are computed:

    * foreground: the mean squared difference on the boxes of objects;
    * background: the same on all others, times 7.5 times the number of boxes of objects over that of the others;
    * edge: half the mean squared difference of the cosines between all pairs of nodes. Of the background, only those
      boxes are nodes that the teacher takes for an object with a cross-entropy of 0.6 or more.

    The published code adds up the images of a GPU, which were two; here the mean over images is doubled, so that the
    factors hold for any number. Images without objects are compared by their edges
    alone, where the published code gives NaN. Features of
    the same width have no adapter; others go through a 1x1 convolution.

    The published factors are those of `config` for ResNet-50 from ResNet-101. For small students edges have a factor of
    2, and losses of maps and predictions are added.

    Args:
        student_spec: ``roi_features`` with its shape in the student.
        teacher_spec: ``roi_features`` with its shape in the teacher.
        foreground_weight: Factor of the objects' nodes.
        background_weight: Factor of the background's nodes.
        edge_weight: Factor of the edges.
    """

    config: ClassVar[dict[str, Any]] = {
        "WEIGHT": 1.0,
        # Factor of the differences between the features of objects' boxes.
        "FOREGROUND_WEIGHT": 0.5,
        # Factor of the differences between the features of the other boxes.
        "BACKGROUND_WEIGHT": 0.5,
        # Factor of the differences between the cosines of pairs of boxes; published for small students: 2.
        "EDGE_WEIGHT": 1.0,
    }

    signals = (NODES,)
    teacher_signals = (NODES, "roi_logits")

    @configurable
    def __init__(
        self,
        *,
        student_spec: Mapping[str, ShapeSpec],
        teacher_spec: Mapping[str, ShapeSpec],
        foreground_weight: float = config["FOREGROUND_WEIGHT"],
        background_weight: float = config["BACKGROUND_WEIGHT"],
        edge_weight: float = config["EDGE_WEIGHT"],
    ):
        super().__init__()
        self.weights = dict(zip(PARTS, (foreground_weight, background_weight, edge_weight), strict=True))
        self.align = Aligners(student_spec, teacher_spec)

    @classmethod
    def from_config(cls, cfg, student_spec, teacher_spec) -> dict:
        key = f"KD.HEADS: {cls.__name__}"
        check_signals(key, [NODES], student_spec, teacher_spec)
        check_class_counts(key, "roi_logits", student_spec, teacher_spec)
        check_pooled_sizes(key, student_spec, teacher_spec)
        node = cfg.KD.INSTANCE_GRAPH
        return {
            "student_spec": {NODES: student_spec[NODES]},
            "teacher_spec": {NODES: teacher_spec[NODES]},
            **{f"{part}_weight": node[f"{part.upper()}_WEIGHT"] for part in PARTS},
        }

    def forward(self, student: Signals, teacher: Signals, batch: Batch) -> dict[str, Tensor]:
        s, t, logits = self.align(student, NODES), teacher[NODES], cast_up(teacher["roi_logits"].detach())
        foreground = student["roi_classes"] < logits.shape[1] - 1
        # Cross-entropy with the background, which is the last class.
        mined = -F.log_softmax(logits, dim=1)[:, -1] >= MINED_ENTROPY
        counts = boxes_per_image(student, "roi", len(batch.image_sizes))
        nodes = (foreground | mined).split(counts)
        # The CPU waits for a GPU here, and nowhere else.
        numbers = torch.stack([x.sum() for x in nodes]).cpu().tolist()
        rows = zip(node_errors(s, t).split(counts), foreground.split(counts), strict=True)
        images = zip(rows, s.split(counts), t.split(counts), nodes, numbers, strict=True)
        parts = []
        for (errors, of_objects), s_boxes, t_boxes, marked, number in images:
            objects, others = of_objects.sum(), (~of_objects).sum().clamp(min=1)
            ratio = BACKGROUND_RATIO * objects.to(logits) / others
            row = marked.nonzero_static(size=number).flatten()
            parts += [
                errors.masked_fill(~of_objects, 0).sum() / objects.clamp(min=1),
                ratio * errors.masked_fill(of_objects, 0).sum() / others,
                edge_loss(s_boxes[row], t_boxes[row]),
            ]
        means = PUBLISHED_IMAGES * torch.stack(parts).view(-1, len(PARTS)).mean(dim=0)
        losses = zip(self.weights.items(), means, strict=True)
        return {f"loss_kd_instance_graph_{part}": weight * loss for (part, weight), loss in losses}
