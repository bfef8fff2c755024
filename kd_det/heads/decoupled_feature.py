"""Implements DeFeat: objects and background are compared apart, since the student can learn from both."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from kd_det.heads.boxes import check_detector, decoupled_masks, finest_first, object_boxes, valid_region
from kd_det.heads.build import check_feature_maps, select_specs
from kd_det.heads.connectors import build_faint_conv
from kd_det.losses import region_loss
from kd_det.losses.numerics import cast_for_layers
from kd_det.registry import KD_HEAD_REGISTRY
from kd_det.signals import Batch, Signals


@KD_HEAD_REGISTRY.register()
class DecoupledFeatureHead(nn.Module):
    """Compares the cells of objects, and all others, each by their own mean.

    DeFeat (Guo et al., CVPR 2021, https://arxiv.org/abs/2103.14475). Each object covers cells of the one map that suits
    its size; all other cells are background. For both regions the loss is half the mean squared difference over
    channels and over the cells of the batch, averaged over maps, where a map without objects counts as 0; see
    :func:`kd_det.losses.region_loss`. The student's map goes through a 3x3 convolution whose weights begin near zero.

    The factors are those of the published config for Faster R-CNN on Pascal VOC. It lists factors for the predictions
    of proposals, too, but does not use them; see :class:`SoftTargetHead`.

    Args:
        student_spec: Maps each compared feature map to its shape in the student, finest first.
        teacher_spec: Maps the same names to the shapes in the teacher.
        foreground_weight: Factor of the objects.
        background_weight: Factor of the background.
    """

    config: ClassVar[dict[str, Any]] = {
        "WEIGHT": 1.0,
        # Feature maps of the backbone. Objects of up to 111 pixels count on the finest one, up to 223 on the next, and
        # so on.
        "IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"],
        # Factor of the differences on objects.
        "FOREGROUND_WEIGHT": 3.0,
        # Factor of the differences on the background.
        "BACKGROUND_WEIGHT": 12.0,
    }

    @configurable
    def __init__(
        self,
        *,
        student_spec: Mapping[str, ShapeSpec],
        teacher_spec: Mapping[str, ShapeSpec],
        foreground_weight: float = config["FOREGROUND_WEIGHT"],
        background_weight: float = config["BACKGROUND_WEIGHT"],
    ):
        super().__init__()
        self.signals = tuple(student_spec)
        self.strides = {name: shape.stride for name, shape in student_spec.items()}
        self.foreground_weight = foreground_weight
        self.background_weight = background_weight
        self.adapters = nn.ModuleDict(
            {
                name: build_faint_conv(shape.channels, teacher_spec[name].channels)
                for name, shape in student_spec.items()
            }
        )

    @classmethod
    def from_config(cls, cfg, student_spec, teacher_spec) -> dict:
        node = cfg.KD.DECOUPLED_FEATURE
        check_detector(cls.__name__, student_spec)
        check_feature_maps("KD.DECOUPLED_FEATURE.IN_FEATURES", node.IN_FEATURES, student_spec, teacher_spec)
        names = finest_first(node.IN_FEATURES, student_spec)
        return {
            **select_specs(names, student_spec, teacher_spec),
            "foreground_weight": node.FOREGROUND_WEIGHT,
            "background_weight": node.BACKGROUND_WEIGHT,
        }

    def forward(self, student: Signals, teacher: Signals, batch: Batch) -> dict[str, Tensor]:
        maps = [student[name] for name in self.signals]
        boxes = object_boxes(type(self).__name__, batch, maps[0])
        sizes = [x.shape[2:] for x in maps]
        masks = zip(*(decoupled_masks(x, sizes, list(self.strides.values())) for x in boxes), strict=True)
        foreground, background = [], []
        for (name, stride), of_images in zip(self.strides.items(), masks, strict=True):
            s, t = self.adapters[name](cast_for_layers(student[name])), teacher[name]
            mask, valid = torch.stack(of_images)[:, None], batch.valid_mask(s, stride)
            foreground.append(region_loss(s, t, mask=valid_region(mask, valid)))
            background.append(region_loss(s, t, mask=valid_region(~mask, valid)))
        return {
            "loss_kd_decoupled_feature_foreground": self.foreground_weight * torch.stack(foreground).mean(),
            "loss_kd_decoupled_feature_background": self.background_weight * torch.stack(background).mean(),
        }
