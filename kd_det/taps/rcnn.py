"""Implements the tap of Faster and Mask R-CNN, with FPN or C4, and of Cascade R-CNN."""

from collections.abc import Collection, Sequence
from contextlib import ExitStack
from typing import TypeAlias

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec, cat
from detectron2.modeling import GeneralizedRCNN, RetinaNet
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.meta_arch.dense_detector import DenseDetector, permute_to_N_HWA_K
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import CascadeROIHeads, FastRCNNOutputLayers, Res5ROIHeads, StandardROIHeads
from detectron2.modeling.roi_heads.box_head import FastRCNNConvFCHead
from detectron2.modeling.roi_heads.keypoint_head import BaseKeypointRCNNHead
from detectron2.modeling.roi_heads.mask_head import BaseMaskRCNNHead
from detectron2.structures import Boxes, ImageList
from torch import Tensor, nn

from kd_det.errors import InputError
from kd_det.registry import TAP_REGISTRY
from kd_det.signals import Signals, boxes_per_image
from kd_det.taps.backbone import BackboneTap, hook, wrap

# Predictors of box deltas.
BoxPredictor: TypeAlias = RPN | RetinaNet | FastRCNNOutputLayers


@TAP_REGISTRY.register()
class GeneralizedRCNNTap(BackboneTap):
    """Taps the backbone, the RPN, and the heads of boxes, masks and keypoints of a ``GeneralizedRCNN``.

    ROI heads must be ``StandardROIHeads``, ``Res5ROIHeads``, ``CascadeROIHeads`` (last stage) or a subclass; with other
    ROI heads only the backbone and the RPN are tapped. The sampled boxes and their classes are read where the predictor
    receives them to compute its losses, the one place that all these heads share.
    """

    model: GeneralizedRCNN
    box_features = ("roi_features",)

    @classmethod
    def feature_levels(cls, cfg: CfgNode) -> list[str]:
        return list(cfg.MODEL.RPN.IN_FEATURES)

    def spec(self) -> dict[str, ShapeSpec]:
        spec = super().spec()
        if hasattr(self.model.proposal_generator, "rpn_head"):
            spec |= {"rpn_logits": ShapeSpec(channels=1), "rpn_deltas": ShapeSpec(channels=4)}
        heads = self.model.roi_heads
        if self._has_boxes:
            predictor = self._predictor
            height, width = self._pooler.output_size
            channels = spec[
                heads.box_in_features[0] if hasattr(heads, "box_in_features") else heads.in_features[0]
            ].channels
            spec |= {
                "roi_features": ShapeSpec(channels=channels, height=height, width=width),
                "roi_box_features": ShapeSpec(channels=predictor.cls_score.in_features),
                "roi_logits": ShapeSpec(channels=predictor.cls_score.out_features),
                "roi_logits_weight": ShapeSpec(channels=predictor.cls_score.in_features),
                "roi_logits_bias": ShapeSpec(channels=predictor.cls_score.out_features),
                "roi_deltas": ShapeSpec(channels=predictor.bbox_pred.out_features),
                "roi_deltas_weight": ShapeSpec(channels=predictor.bbox_pred.in_features),
                "roi_deltas_bias": ShapeSpec(channels=predictor.bbox_pred.out_features),
            }
        if self._last_fc is not None:
            spec["roi_box_preact"] = ShapeSpec(channels=self._last_fc.out_features)
        if self._has_masks:
            spec["mask_logits"] = ShapeSpec(channels=heads.mask_head.predictor.out_channels)
        if self._has_keypoints:
            spec["keypoint_logits"] = ShapeSpec(channels=heads.keypoint_head.num_keypoints)
        return spec

    @property
    def cut_signals(self) -> Collection[str]:
        return {"rpn_logits", "rpn_deltas"}

    def check_alignment(self, teacher: BackboneTap, names) -> None:
        super().check_alignment(teacher, names)
        if any(name.startswith("rpn_") for name in names):
            check_anchors(
                self.model.proposal_generator.anchor_generator,
                teacher.model.get_submodule("proposal_generator.anchor_generator"),
            )
        taps = [tap for tap in (self, teacher) if isinstance(tap, GeneralizedRCNNTap)]
        if "roi_logits" in names and any(tap._predictor.use_sigmoid_ce for tap in taps):
            raise InputError(
                "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE: must be False in all networks whose class predictions of boxes are "
                "compared, since these are taken for those of a softmax."
            )
        if "rpn_deltas" in names:
            check_box_weights(
                "MODEL.RPN.BBOX_REG_WEIGHTS",
                self.model.proposal_generator,
                teacher.model.get_submodule("proposal_generator"),
            )
        if "roi_deltas" in names:
            check_box_weights("MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS", *(tap._predictor for tap in taps))
        if "keypoint_logits" in names:
            sizes = [tap.model.roi_heads.keypoint_pooler.output_size[0] for tap in taps]
            check_equal("MODEL.ROI_KEYPOINT_HEAD.POOLER_RESOLUTION", "heatmaps", sizes)

    def class_layers(self) -> list[nn.Module]:
        heads = self.model.roi_heads
        if not self._has_boxes:
            return [heads]
        predictors = heads.box_predictor if isinstance(heads, CascadeROIHeads) else [heads.box_predictor]
        layers = [predictor.cls_score for predictor in predictors]
        layers += [x.bbox_pred for x in predictors if x.bbox_pred.out_features > 4]
        if self._has_masks and heads.mask_head.predictor.out_channels > 1:
            layers.append(heads.mask_head.predictor)
        return layers

    def check_replaced(self, head: str, losses: Collection[str]) -> None:
        heads = self.model.roi_heads
        if "loss_cls" in losses and isinstance(heads, CascadeROIHeads):
            stages = ", ".join(f"loss_cls_stage{i}" for i in range(heads.num_cascade_stages))
            raise InputError(
                f"KD.HEADS: {head} takes the place of loss_cls, but the student's losses are {stages}, as it is a "
                "Cascade R-CNN; choose other MODEL.ROI_HEADS, or keep its losses (KD.BORN_AGAIN.LABELS True)."
            )

    @property
    def _has_boxes(self) -> bool:
        heads = self.model.roi_heads
        return isinstance(heads, StandardROIHeads | Res5ROIHeads) and isinstance(self._predictor, FastRCNNOutputLayers)

    @property
    def _has_masks(self) -> bool:
        head = getattr(self.model.roi_heads, "mask_head", None)
        return self._has_boxes and isinstance(head, BaseMaskRCNNHead) and hasattr(head, "predictor")

    @property
    def _has_keypoints(self) -> bool:
        head = getattr(self.model.roi_heads, "keypoint_head", None)
        return self._has_boxes and isinstance(head, BaseKeypointRCNNHead)

    @property
    def _predictor(self) -> FastRCNNOutputLayers:
        predictor = self.model.roi_heads.box_predictor
        return predictor[-1] if isinstance(self.model.roi_heads, CascadeROIHeads) else predictor

    @property
    def _last_fc(self) -> nn.Linear | None:
        """Returns the last linear layer of the box head, which is followed by a ReLU."""
        heads = self.model.roi_heads
        head = heads.box_head[-1] if isinstance(heads, CascadeROIHeads) else getattr(heads, "box_head", None)
        return head.fcs[-1] if self._has_boxes and isinstance(head, FastRCNNConvFCHead) and head.fcs else None

    @property
    def _pooler(self) -> ROIPooler:
        heads = self.model.roi_heads
        return heads.pooler if isinstance(heads, Res5ROIHeads) else heads.box_pooler

    def attach(self, stack: ExitStack, signals: Signals, names: set[str]) -> None:
        super().attach(stack, signals, names)

        def store(**values: Tensor) -> None:
            signals.update({name: value for name, value in values.items() if name in names})

        if names & {"rpn_logits", "rpn_deltas"}:
            rpn = self.model.proposal_generator
            hook(stack, rpn.rpn_head, lambda _, out: store(**flatten_rpn(*map(self._cut_levels, out))))
            record_anchors(stack, self.model.proposal_generator, "rpn", signals)
        if "roi_box_preact" in names and self._last_fc is not None:
            hook(stack, self._last_fc, lambda _, out: store(roi_box_preact=out))
        if "roi_features" in names:
            hook(stack, self._pooler, lambda _, out: store(roi_features=out))
        if any(name.startswith("roi_") for name in names):
            hook(
                stack,
                self._predictor,
                lambda args, out: store(
                    roi_box_features=args[0],
                    roi_logits=out[0],
                    roi_deltas=out[1],
                    roi_logits_weight=self._predictor.cls_score.weight,
                    roi_logits_bias=self._predictor.cls_score.bias,
                    roi_deltas_weight=self._predictor.bbox_pred.weight,
                    roi_deltas_bias=self._predictor.bbox_pred.bias,
                ),
            )
            wrap(
                stack,
                self._predictor,
                "losses",
                lambda args, _: signals.update(
                    roi_boxes=join_boxes(args[1]),
                    roi_counts=count_boxes(args[1]),
                    roi_classes=join_classes(args[1]),
                    roi_gt_boxes=join_targets(args[1]),
                    roi_scales=box_scales(self._predictor),
                ),
            )
        if "mask_logits" in names:
            head = self.model.roi_heads.mask_head
            wrap(stack, head, "layers", lambda _, out: store(mask_logits=out))
            hook(
                stack,
                head,
                lambda args, _: signals.update(
                    mask_boxes=join_boxes(args[1]),
                    mask_counts=count_boxes(args[1]),
                    mask_classes=join_classes(args[1]),
                ),
            )
        if "keypoint_logits" in names:
            head = self.model.roi_heads.keypoint_head
            wrap(stack, head, "layers", lambda _, out: store(keypoint_logits=out))
            hook(
                stack,
                head,
                lambda args, _: signals.update(
                    keypoint_boxes=join_boxes(args[1]),
                    keypoint_counts=count_boxes(args[1]),
                    keypoint_labels=join_keypoints(args[1], signals["keypoint_logits"]),
                ),
            )

    def forward(self, batched_inputs: list[dict], names: set[str], student: Signals) -> None:
        images = self.padded_images(batched_inputs)
        if self.run_bottom_up(images.tensor, names):
            return
        features = self.model.backbone(images.tensor)
        if any(name.startswith("roi_") for name in names) and "roi_boxes" not in student:
            student = {"roi_boxes": self._propose(images, features)}
        self.run(features, names, student)

    def _cut_levels(self, levels: list[Tensor]) -> list[Tensor]:
        """Cuts the RPN's predictions on each level."""
        strides = self.model.proposal_generator.anchor_generator.strides
        return [self.cut(level, stride) for level, stride in zip(levels, strides, strict=True)]

    def _propose(self, images: ImageList, features: dict[str, Tensor]) -> Tensor:
        """Proposes boxes by the model's own RPN, (R, 5), as many per image as ROIs are sampled in training."""
        proposals, _ = self.model.proposal_generator(images, features, None)
        return join_boxes([x[: self.model.roi_heads.batch_size_per_image] for x in proposals])

    def run(self, features: dict[str, Tensor], names: set[str], student: Signals) -> None:
        if names & {"rpn_logits", "rpn_deltas"}:
            rpn = self.model.proposal_generator
            rpn.rpn_head([features[f] for f in rpn.in_features])
        images = len(next(iter(features.values())))
        # Boxes come last: in a C4 model masks go through the same pooler, and roi_features must be those of the boxes.
        if "mask_logits" in names:
            self._run_masks(features, split_boxes(student, "mask", images))
        if "keypoint_logits" in names:
            self._run_keypoints(features, split_boxes(student, "keypoint", images))
        wanted = {name for name in names if name.startswith("roi_")}
        if wanted:
            boxes = split_boxes(student, "roi", images)
            self._run_boxes(features, boxes, pool_only=wanted == {"roi_features"})

    def _run_boxes(self, features: dict[str, Tensor], boxes: list[Boxes], *, pool_only: bool) -> None:
        heads = self.model.roi_heads
        levels = heads.in_features if isinstance(heads, Res5ROIHeads) else heads.box_in_features
        pooled = self._pooler([features[level] for level in levels], boxes)
        if pool_only:
            return
        if isinstance(heads, Res5ROIHeads):
            box_features = heads.res5(pooled).mean(dim=[2, 3])
        else:
            box_head = heads.box_head[-1] if isinstance(heads, CascadeROIHeads) else heads.box_head
            box_features = box_head(pooled)
        self._predictor(box_features)

    def _run_masks(self, features: dict[str, Tensor], boxes: list[Boxes]) -> None:
        heads = self.model.roi_heads
        if isinstance(heads, Res5ROIHeads):
            mask_features = heads.res5(heads.pooler([features[f] for f in heads.in_features], boxes))
        else:
            mask_features = heads.mask_pooler([features[f] for f in heads.mask_in_features], boxes)
        heads.mask_head.layers(mask_features)

    def _run_keypoints(self, features: dict[str, Tensor], boxes: list[Boxes]) -> None:
        heads = self.model.roi_heads
        pooled = heads.keypoint_pooler([features[f] for f in heads.keypoint_in_features], boxes)
        heads.keypoint_head.layers(pooled)


def flatten_rpn(logits: list[Tensor], deltas: list[Tensor]) -> Signals:
    """Concatenates the levels of an RPN head's outputs.

    Args:
        logits: Logits of each level, (N, A, H, W).
        deltas: Box deltas of each level, (N, 4 A, H, W).

    Returns:
        ``rpn_logits`` (N, anchors, 1) and ``rpn_deltas`` (N, anchors, 4), ordered by level, row, column and anchor.
    """
    return {
        "rpn_logits": cat([permute_to_N_HWA_K(x, 1) for x in logits], dim=1),
        "rpn_deltas": cat([permute_to_N_HWA_K(x, 4) for x in deltas], dim=1),
    }


def check_anchors(student: DefaultAnchorGenerator, teacher: DefaultAnchorGenerator) -> None:
    """Checks that two anchor generators make the same anchors, to within a hundredth of a pixel.

    Their cells lie on the same grid only if their offsets are equal, too.

    Raises:
        InputError: If they do not.
    """
    cells = [[len(level) for level in generator.cell_anchors] for generator in (student, teacher)]
    if (
        list(student.strides) != list(teacher.strides)
        or student.offset != teacher.offset
        or cells[0] != cells[1]
        or any(
            not torch.allclose(a.cpu(), b.cpu(), atol=0.01)
            for a, b in zip(student.cell_anchors, teacher.cell_anchors, strict=True)
        )
    ):
        raise InputError(
            "MODEL.ANCHOR_GENERATOR: must be equal in student and teacher, since their predictions for anchors are "
            f"compared; got strides {list(student.strides)} and {list(teacher.strides)}, anchors per cell {cells[0]} "
            f"and {cells[1]}, offsets {student.offset} and {teacher.offset}."
        )


def check_box_weights(key: str, student: BoxPredictor, teacher: BoxPredictor) -> None:
    """Checks that the box deltas of two predictors are scaled alike.

    Args:
        key: The config key of the scales, for messages.

    Raises:
        InputError: If they are not.
    """
    check_equal(key, "box deltas", [tuple(module.box2box_transform.weights) for module in (student, teacher)])


def check_equal(key: str, what: str, values: Sequence[object]) -> None:
    """Checks that a value of the student and that of the teacher are equal.

    Args:
        key: The config key of the value, for messages.
        what: What is compared and depends on it, for messages.
        values: The student's value and the teacher's.

    Raises:
        InputError: If they differ.
    """
    if values[0] != values[1]:
        raise InputError(
            f"{key}: must be equal in student and teacher, since their {what} are compared; got {values[0]} and "
            f"{values[1]}."
        )


def record_anchors(stack: ExitStack, model: RPN | DenseDetector, prefix: str, signals: Signals) -> None:
    """Records the anchors that a model trains on, with their labels, until `stack` closes.

    Args:
        stack: Detaches the hook when it closes.
        model: An RPN, a RetinaNet or an FCOS, whose ``losses`` receive the anchors and their labels.
        prefix: First part of the names of the signals.
        signals: The dict that receives ``<prefix>_anchors``, ``<prefix>_labels``, ``<prefix>_counts`` and
            ``<prefix>_scales``, which an FCOS does not have.
    """

    def store(args: tuple, _) -> None:
        levels = [boxes.tensor for boxes in args[0]]
        signals[f"{prefix}_anchors"] = cat(levels)
        signals[f"{prefix}_labels"] = torch.stack(args[2])
        signals[f"{prefix}_counts"] = torch.tensor([len(level) for level in levels])
        if isinstance(model, RPN | RetinaNet):
            signals[f"{prefix}_scales"] = box_scales(model)

    wrap(stack, model, "losses", store)


def box_scales(predictor: BoxPredictor) -> Tensor:
    """Returns the factors (4,) by which the box deltas of a predictor are multiplied, on the CPU."""
    return torch.tensor(predictor.box2box_transform.weights)


def join_boxes(instances) -> Tensor:
    """Concatenates the proposal boxes of all images as (R, 5): image, x0, y0, x1, y1."""
    return cat(
        [
            torch.cat([x.proposal_boxes.tensor.new_full((len(x), 1), i), x.proposal_boxes.tensor.detach()], dim=1)
            for i, x in enumerate(instances)
        ]
    )


def join_classes(instances) -> Tensor:
    """Concatenates the labelled classes of all images' proposals, (R,)."""
    return cat([x.gt_classes for x in instances])


def join_targets(instances) -> Tensor:
    """Concatenates the ground-truth boxes that all images' proposals are matched with, (R, 4).

    In an image without objects they are the proposals themselves, as in Detectron2's own losses.
    """
    return cat([(x.gt_boxes if x.has("gt_boxes") else x.proposal_boxes).tensor.detach() for x in instances])


def join_keypoints(instances, logits: Tensor) -> Tensor:
    """Concatenates the cells in which the labelled keypoints of all images' proposals lie, (F, P).

    Args:
        instances: The proposals of each image, with their ground truth.
        logits: Logits of the heatmaps, (F, P, m, m).

    Returns:
        Indices of cells, row by row; -1 where the keypoint is not visible or lies outside the proposal.
    """
    cells = [logits.new_zeros(0, logits.shape[1], dtype=torch.int64)]
    for x in instances:
        if len(x):
            indices, valid = x.gt_keypoints.to_heatmap(x.proposal_boxes.tensor, logits.shape[-1])
            cells.append(indices.masked_fill(valid == 0, -1))
    return torch.cat(cells)


def count_boxes(instances) -> Tensor:
    """Returns the number of proposals of each image, (N,), on the CPU."""
    return torch.tensor([len(x) for x in instances])


def split_boxes(signals: Signals, prefix: str, images: int) -> list[Boxes]:
    """Splits the boxes (R, 5) of signals, which are named by their prefix, by image; inverts :func:`join_boxes`."""
    boxes = signals[f"{prefix}_boxes"][:, 1:]
    return [Boxes(x) for x in boxes.split(boxes_per_image(signals, prefix, images))]
