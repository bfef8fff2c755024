"""Implements FGD: objects, background and the places of high attention are compared apart, and the global context."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from kd_det.errors import check_choice
from kd_det.heads.align import SCALES, Aligners, sum_scale
from kd_det.heads.boxes import check_detector, focal_masks, object_boxes
from kd_det.heads.build import check_feature_maps, select_specs
from kd_det.losses import attention_loss, focal_loss, relation_loss
from kd_det.losses.numerics import add_up, cast_for_layers
from kd_det.registry import KD_HEAD_REGISTRY
from kd_det.signals import Batch, Signals

PARTS = ("foreground", "background", "attention", "relation")


@KD_HEAD_REGISTRY.register()
class FocalGlobalHead(nn.Module):
    """Compares maps by the teacher's attention, for objects and background apart, and by their global context.

    FGD (Yang et al., CVPR 2022, https://arxiv.org/abs/2111.11837). The loss has four parts, each summed over channels,
    cells and maps, mean over images:

    * foreground and background: squared differences, weighted by the teacher's attention. An object has the same weight
      whatever its size, and the background of an image the weight of one object; see
      :func:`kd_det.losses.focal_loss`. Every object counts on every map;
    * attention: absolute differences of the spatial and of the channel attention;
    * relation: squared differences of the outputs of two global context blocks, of student and teacher. Both are
      trained.

    Maps of the same width have no adapter; others go through a 1x1 convolution. Boxes are divided by the stride, where
    the published code divides by the size of the image before padding, which shifts the boxes of padded images. Where
    padding is masked, each image is compared as if its padding were cut off.

    The published factors of the parts are those of `config` for Faster and Mask R-CNN (p2 to p5); for RetinaNet (p3 to
    p7) they are 1e-3, 5e-4, 5e-4 and 5e-6. Gradients are clipped to a norm of 35 there.

    Args:
        student_spec: Maps each compared feature map to its shape in the student.
        teacher_spec: Maps the same names to the shapes in the teacher.
        foreground_weight: Factor of the foreground.
        background_weight: Factor of the background.
        attention_weight: Factor of the attention.
        relation_weight: Factor of the relation.
        scale: "map_invariant" or "code", see :func:`kd_det.heads.align.sum_scale`. It concerns the spatial attention
            and the relation; the other sums do not grow with the map.
    """

    config: ClassVar[dict[str, Any]] = {
        "WEIGHT": 1.0,
        # Feature maps of the backbone.
        "IN_FEATURES": ["p2", "p3", "p4", "p5"],
        # Factor of the differences on objects; published for RetinaNet: 1e-3.
        "FOREGROUND_WEIGHT": 5e-5,
        # Factor of the differences on the background; published for RetinaNet: 5e-4.
        "BACKGROUND_WEIGHT": 2.5e-5,
        # Factor of the differences between the attention of student and teacher; published for RetinaNet: 5e-4.
        "ATTENTION_WEIGHT": 5e-5,
        # Factor of the differences between the global contexts; published for RetinaNet: 5e-6.
        "RELATION_WEIGHT": 5e-7,
        # "code": sums over cells, as published, of which those of attention and relation grow with the images.
        # "map_invariant": as large as for images of 800 x 1344 pixels, whatever their size.
        "SCALE": "map_invariant",
    }

    @configurable
    def __init__(
        self,
        *,
        student_spec: Mapping[str, ShapeSpec],
        teacher_spec: Mapping[str, ShapeSpec],
        foreground_weight: float = config["FOREGROUND_WEIGHT"],
        background_weight: float = config["BACKGROUND_WEIGHT"],
        attention_weight: float = config["ATTENTION_WEIGHT"],
        relation_weight: float = config["RELATION_WEIGHT"],
        scale: str = config["SCALE"],
    ):
        super().__init__()
        self.signals = tuple(student_spec)
        self.strides = {name: shape.stride for name, shape in student_spec.items()}
        weights = (foreground_weight, background_weight, attention_weight, relation_weight)
        self.weights = dict(zip(PARTS, weights, strict=True))
        self.scale = scale
        self.align = Aligners(student_spec, teacher_spec)
        widths = {name: teacher_spec[name].channels for name in student_spec}
        self.student_context = nn.ModuleDict({name: ContextBlock(width) for name, width in widths.items()})
        self.teacher_context = nn.ModuleDict({name: ContextBlock(width) for name, width in widths.items()})

    @classmethod
    def from_config(cls, cfg, student_spec, teacher_spec) -> dict:
        node = cfg.KD.FOCAL_GLOBAL
        check_detector(cls.__name__, student_spec)
        check_feature_maps("KD.FOCAL_GLOBAL.IN_FEATURES", node.IN_FEATURES, student_spec, teacher_spec)
        check_choice("KD.FOCAL_GLOBAL.SCALE", node.SCALE, SCALES)
        return {
            **select_specs(node.IN_FEATURES, student_spec, teacher_spec),
            "scale": node.SCALE,
            **{f"{part}_weight": node[f"{part.upper()}_WEIGHT"] for part in PARTS},
        }

    def forward(self, student: Signals, teacher: Signals, batch: Batch) -> dict[str, Tensor]:
        boxes = object_boxes(type(self).__name__, batch, student[self.signals[0]])
        losses = []
        for name, stride in self.strides.items():
            s, t = self.align(student, name), teacher[name].detach()
            parts = [self._compare(name, s[x], t[x], boxes[x[0]]) for x in compared_regions(batch, s, stride)]
            losses.append(torch.stack(parts).mean(dim=0))
        weighted = zip(self.weights.items(), add_up(losses), strict=True)
        return {f"loss_kd_focal_global_{part}": weight * loss for (part, weight), loss in weighted}

    def _compare(self, name: str, s: Tensor, t: Tensor, boxes: list[Tensor]) -> Tensor:
        """Computes the parts of the loss on one map, in the order of ``PARTS``."""
        stride = self.strides[name]
        masks = [focal_masks(x, s.shape[2:], stride) for x in boxes]
        foreground, background = (torch.stack(x) for x in zip(*masks, strict=True))
        scale = sum_scale(s, stride, scale=self.scale)
        relation = relation_loss(
            self.student_context[name](cast_for_layers(s)), self.teacher_context[name](cast_for_layers(t))
        )
        return torch.stack(
            [
                focal_loss(s, t, weight=foreground),
                focal_loss(s, t, weight=background),
                attention_loss(s, t, spatial_scale=scale),
                scale * relation,
            ]
        )


class ContextBlock(nn.Module):
    """Adds to each cell the same transformation of the attended mean over all cells.

    The global context block (Cao et al., 2019, https://arxiv.org/abs/1904.11492) in the form and with the initial
    values that FGD takes: at the beginning it returns its input.
    """

    def __init__(self, channels: int):
        super().__init__()
        hidden = max(channels // 2, 1)
        # The published layer has a bias, which the softmax over cells would cancel.
        self.attend = nn.Conv2d(channels, 1, kernel_size=1, bias=False)
        self.transform = nn.Sequential(
            nn.Conv2d(channels, hidden, kernel_size=1),
            nn.LayerNorm([hidden, 1, 1]),
            nn.ReLU(),
            nn.Conv2d(hidden, channels, kernel_size=1),
        )
        nn.init.kaiming_normal_(self.attend.weight)
        for parameter in self.transform[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """Returns a map of the shape of x (N, C, H, W)."""
        attention = self.attend(x).flatten(2).softmax(dim=2)
        context = x.flatten(2) @ attention.mT
        return x + self.transform(context[..., None])


def compared_regions(batch: Batch, x: Tensor, stride: int) -> list[tuple[slice, ...]]:
    """Lists the parts of a map (N, C, H, W) to compare: all of it, or each image's own cells if padding is masked."""
    if not batch.mask_padding:
        return [(slice(None),)]
    cells = [[-(-side // stride) for side in size] for size in batch.image_sizes]
    return [(slice(i, i + 1), slice(None), slice(height), slice(width)) for i, (height, width) in enumerate(cells)]
