"""Implements relational distillation: rows that are alike for the teacher shall be alike for the student."""

from typing import Any, ClassVar

import torch
from detectron2.config import configurable
from torch import Tensor, nn

from kd_det.errors import InputError, check_choice
from kd_det.heads.build import check_signals
from kd_det.losses import angle_relation_loss, distance_relation_loss, similarity_loss
from kd_det.registry import KD_HEAD_REGISTRY
from kd_det.signals import Batch, Signals, boxes_per_image

KINDS = ("rkd", "sp", "cosine")
# Features of boxes: their rows are compared within each image.
OF_BOXES = ("roi_box_features", "roi_features", "roi_box_preact")


@KD_HEAD_REGISTRY.register()
class RelationHead(nn.Module):
    """Compares relations between rows: the boxes of an image, or the images of a batch.

    There is no adapter, since relations can be compared between features of any width. The kinds are:

    * ``rkd``, relational knowledge distillation (Park et al., CVPR 2019, https://arxiv.org/abs/1904.05068): distances
      of pairs and angles of triples;
    * ``sp``, similarity preservation (Tung and Mori, ICCV 2019, https://arxiv.org/abs/1907.09682): Gram matrices with
      rows of unit length; published with a WEIGHT of 3000 on the last map of a classifier;
    * ``cosine``, the edges of DSIG (Chen et al., ICCV 2021, https://arxiv.org/abs/2109.12862): cosines of all pairs.

    In an R-CNN the rows are sampled boxes of one image, objects first; the loss is averaged over images. In an image
    classifier they are the images of one GPU's batch.

    Args:
        in_feature: Name of the feature whose rows are compared.
        kind: "rkd", "sp" or "cosine".
        boxes: Largest number of boxes per image.
        distance_weight: Factor of the distances of "rkd".
        angle_weight: Factor of the angles of "rkd".
    """

    config: ClassVar[dict[str, Any]] = {
        "WEIGHT": 1.0,
        # Feature whose rows are compared: roi_box_features or roi_features of boxes; of a classifier a map, as
        # published for sp, or pooled, as published for rkd, whose angles between whole maps are slow.
        "IN_FEATURE": "roi_box_features",
        # "rkd" (distances and angles), "sp" (Gram matrices) or "cosine" (edges of DSIG).
        "KIND": "rkd",
        # Boxes per image, objects first. Angles need memory for the third power of this number.
        "BOXES": 32,
        # Factor of the distances of rkd; the paper's on CIFAR-100.
        "DISTANCE_WEIGHT": 25.0,
        # Factor of the angles of rkd; the paper's on CIFAR-100.
        "ANGLE_WEIGHT": 50.0,
    }

    @configurable
    def __init__(
        self,
        *,
        in_feature: str = config["IN_FEATURE"],
        kind: str = config["KIND"],
        boxes: int = config["BOXES"],
        distance_weight: float = config["DISTANCE_WEIGHT"],
        angle_weight: float = config["ANGLE_WEIGHT"],
    ):
        super().__init__()
        self.in_feature = in_feature
        self.signals = (in_feature,)
        self.kind = kind
        self.boxes = boxes
        self.distance_weight = distance_weight
        self.angle_weight = angle_weight

    @classmethod
    def from_config(cls, cfg, student_spec, teacher_spec) -> dict:
        node = cfg.KD.RELATION
        check_choice("KD.RELATION.KIND", node.KIND, KINDS)
        check_signals("KD.RELATION.IN_FEATURE", [node.IN_FEATURE], student_spec, teacher_spec)
        of_images = [name for name, x in student_spec.items() if x.stride or name == "pooled"]
        allowed = [name for name in OF_BOXES if name in student_spec]
        allowed += of_images if "logits" in student_spec else []
        check_choice("KD.RELATION.IN_FEATURE", node.IN_FEATURE, allowed)
        if node.BOXES < 2:
            raise InputError(f"KD.RELATION.BOXES: must be 2 or more, since pairs are compared, got {node.BOXES}.")
        for key in ("DISTANCE_WEIGHT", "ANGLE_WEIGHT"):
            if node[key] < 0:
                raise InputError(f"KD.RELATION.{key}: must be 0 or more, got {node[key]}.")
        return {
            "in_feature": node.IN_FEATURE,
            "kind": node.KIND,
            "boxes": node.BOXES,
            "distance_weight": node.DISTANCE_WEIGHT,
            "angle_weight": node.ANGLE_WEIGHT,
        }

    def forward(self, student: Signals, teacher: Signals, batch: Batch) -> dict[str, Tensor]:
        s, t = student[self.in_feature], teacher[self.in_feature]
        if self.in_feature not in OF_BOXES:
            return self._compare([(s, t)])
        counts = boxes_per_image(student, "roi", len(batch.image_sizes))
        pairs = zip(s.split(counts), t.split(counts), strict=True)
        return self._compare([(x[: self.boxes], y[: self.boxes]) for x, y in pairs])

    def _compare(self, pairs: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        if self.kind == "rkd":
            distances = [distance_relation_loss(s, t) for s, t in pairs]
            angles = [angle_relation_loss(s, t) for s, t in pairs]
            return {
                "loss_kd_relation_distance": self.distance_weight * torch.stack(distances).mean(),
                "loss_kd_relation_angle": self.angle_weight * torch.stack(angles).mean(),
            }
        kind = "gram" if self.kind == "sp" else "cosine"
        return {"loss_kd_relation": torch.stack([similarity_loss(s, t, kind=kind) for s, t in pairs]).mean()}
