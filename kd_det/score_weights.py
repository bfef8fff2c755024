"""Weighs labels by their scores: a box counts in the classification losses of an R-CNN as much as its score says."""

from collections.abc import Sequence
from types import MethodType
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import CascadeROIHeads, FastRCNNOutputLayers
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn
from torch.nn import functional as F

from kd_det.errors import InputError

# Name of the attribute in which a proposal network keeps the weights of its anchors between two of its methods.
WEIGHTS = "_weights_of_anchors"


def weighted_datasets(cfg: CfgNode) -> list[str]:
    """Returns the names of the data sets of DATASETS.TRAIN whose scores are weights."""
    entries = cfg.DATASETS.COCO_FORMAT
    return [name for name in cfg.DATASETS.TRAIN if entries.get(name, {}).get("SCORES") == "weight"]


def weigh_by_scores(model: nn.Module, datasets: Sequence[str]) -> None:
    """Makes the classification losses of an R-CNN weigh each box by its score from now on.

    The cross-entropies of a region that belongs to an object, in the box heads, and of an anchor that does so, in the
    proposal network, are multiplied by the object's score (``gt_scores`` of the targets); those of the background keep
    the weight 1, and so do images without scores. The losses are still divided by the number of all regions or anchors.
    Where all scores are 1, the losses are those of the stock model, bit for bit.

    Methods of the model's parts are replaced by ones that call them; no weight is added.

    Args:
        model: The detector.
        datasets: Names of the data sets that ask for it, for messages.

    Raises:
        InputError: If the model is not an R-CNN, or computes its classification loss in its own way.
    """
    key = f"DATASETS.COCO_FORMAT.{datasets[0]}.SCORES"
    found = False
    for part in model.modules():
        if isinstance(part, FastRCNNOutputLayers):
            if part.use_fed_loss or type(part).losses is not FastRCNNOutputLayers.losses:
                reason = "a federated loss" if part.use_fed_loss else f"the loss of {type(part).__name__}"
                raise InputError(f"{key}: 'weight' is not possible with {reason}; allowed is ignore.")
            _replace(part, losses=region_losses)
        elif isinstance(part, RPN):
            _replace(part, label_and_sample_anchors=label_and_weigh_anchors, losses=anchor_losses)
        elif isinstance(part, CascadeROIHeads):
            _replace(part, _match_and_label_boxes=match_and_weigh_boxes)
        found |= isinstance(part, FastRCNNOutputLayers | RPN)
    if not found:
        raise InputError(
            f"{key}: 'weight' is for R-CNNs, whose regions and anchors are weighted, got {type(model).__name__}; "
            "allowed is ignore."
        )


def _replace(part: nn.Module, **methods: Any) -> None:
    for name, method in methods.items():
        setattr(part, name, MethodType(method, part))


def region_losses(
    self: FastRCNNOutputLayers, predictions: tuple[Tensor, Tensor], proposals: list[Instances]
) -> dict[str, Tensor]:
    """Computes the losses of a box predictor, with weighted regions; see :func:`weigh_by_scores`."""
    losses = type(self).losses(self, predictions, proposals)
    scores = predictions[0]
    weights = [
        x.gt_scores.where(x.gt_classes != self.num_classes, 1.0) if x.has("gt_scores") else scores.new_ones(len(x))
        for x in proposals
    ]
    light = torch.cat(weights) < 1
    if not light.any():
        return losses
    classes, logits = torch.cat([x.gt_classes for x in proposals])[light], scores[light]
    if self.use_sigmoid_ce:
        targets = F.one_hot(classes, self.num_classes).to(logits)
        each = F.binary_cross_entropy_with_logits(logits[:, :-1], targets, reduction="none").sum(dim=1)
    else:
        each = F.cross_entropy(logits, classes, reduction="none")
    surplus = ((1 - torch.cat(weights)[light]) * each).sum() / len(scores)
    return losses | {"loss_cls": losses["loss_cls"] - self.loss_weight.get("loss_cls", 1.0) * surplus}


def label_and_weigh_anchors(
    self: RPN, anchors: list[Boxes], gt_instances: list[Instances]
) -> tuple[list[Tensor], list[Tensor]]:
    """Labels anchors, and keeps the weights of those that belong to objects for :func:`anchor_losses`."""
    labels, boxes = type(self).label_and_sample_anchors(self, anchors, gt_instances)
    weights = []
    for label, box, instances in zip(labels, boxes, gt_instances, strict=True):
        weight = torch.ones_like(label, dtype=torch.float32)
        if instances.has("gt_scores"):
            weight[label == 1] = scores_of(box[label == 1], instances)
        weights.append(weight)
    setattr(self, WEIGHTS, weights)
    return labels, boxes


def anchor_losses(
    self: RPN,
    anchors: list[Boxes],
    pred_objectness_logits: list[Tensor],
    gt_labels: list[Tensor],
    pred_anchor_deltas: list[Tensor],
    gt_boxes: list[Tensor],
) -> dict[str, Tensor]:
    """Computes the losses of a proposal network, with weighted anchors; see :func:`weigh_by_scores`."""
    losses = type(self).losses(self, anchors, pred_objectness_logits, gt_labels, pred_anchor_deltas, gt_boxes)
    weights = torch.stack(vars(self).pop(WEIGHTS))
    light = weights < 1
    if not light.any():
        return losses
    logits = torch.cat(pred_objectness_logits, dim=1)[light]
    each = F.binary_cross_entropy_with_logits(logits, torch.ones_like(logits), reduction="none")
    surplus = ((1 - weights[light]) * each).sum() / (self.batch_size_per_image * len(gt_labels))
    return losses | {"loss_rpn_cls": losses["loss_rpn_cls"] - self.loss_weight.get("loss_rpn_cls", 1.0) * surplus}


def match_and_weigh_boxes(
    self: CascadeROIHeads, proposals: list[Instances], stage: int, targets: list[Instances]
) -> list[Instances]:
    """Labels the boxes of a later stage of a cascade, and gives them the scores of their objects."""
    proposals = type(self)._match_and_label_boxes(self, proposals, stage, targets)
    for boxes, instances in zip(proposals, targets, strict=True):
        if instances.has("gt_scores") and len(instances):
            boxes.gt_scores = scores_of(boxes.gt_boxes.tensor, instances)
    return proposals


def scores_of(boxes: Tensor, instances: Instances) -> Tensor:
    """Returns the scores of the objects that boxes were matched with.

    Of objects with the very same box, the highest score counts.

    Args:
        boxes: (N, 4), each of them the box of an object.
        instances: The objects of the image.

    Returns:
        (N,) scores.
    """
    if not len(boxes):
        return boxes.new_zeros(0)
    is_same = (boxes[:, None] == instances.gt_boxes.tensor).all(dim=2)
    return (is_same * instances.gt_scores).amax(dim=1)
