"""Implements FGFI: the student's maps learn to resemble the teacher's where anchors nearly match an object."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import build_anchor_generator
from torch import Tensor, nn

from kd_det.config_kinds import has_lists
from kd_det.errors import InputError, check_choice
from kd_det.heads.boxes import (
    boxes_of_levels,
    check_detector,
    fine_grained_mask,
    finest_first,
    object_boxes,
    valid_region,
)
from kd_det.heads.build import check_feature_maps, select_specs
from kd_det.heads.connectors import build_faint_conv
from kd_det.losses import region_loss
from kd_det.losses.numerics import add_up, cast_for_layers
from kd_det.registry import KD_HEAD_REGISTRY
from kd_det.signals import Batch, Signals

KINDS = ("pyramid", "map")


@KD_HEAD_REGISTRY.register()
class FineGrainedHead(nn.Module):
    """Compares the cells with an anchor that overlaps an object nearly as well as the best anchor does.

    FGFI (Wang et al., CVPR 2019, https://arxiv.org/abs/1906.03609). An anchor counts if its IoU with an object is above
    half of that object's best IoU on the map; all anchors take part, also outside the image. The loss is half the mean
    squared difference over the cells of the batch that have such an anchor, averaged over maps; see
    :func:`kd_det.losses.region_loss`. It is 0 without objects, where the published code divides by 0. The student's map
    goes through a 3x3 convolution whose weights begin near zero. The kinds are:

    * ``pyramid``, the form of DeFeat's code (Guo et al., CVPR 2021, https://arxiv.org/abs/2103.14475) for an FPN: each
      object counts on the one map that suits its size, and the mean is over channels, too. Published WEIGHT: 3;
    * ``map``, the form of the paper's code for one map: all objects count on it, differences are summed over channels,
      and a ReLU follows the convolution. Published for VGG: WEIGHT 0.01, and SCHEDULE.START 400.

    Args:
        student_spec: Maps each compared feature map to its shape in the student, finest first.
        teacher_spec: Maps the same names to the shapes in the teacher.
        anchor_generator: Detectron2's generator of anchors for these maps.
        kind: "pyramid" or "map".
    """

    config: ClassVar[dict[str, Any]] = {
        "WEIGHT": 3.0,
        # Feature maps of the backbone. If MODEL.ANCHOR_GENERATOR has anchors for each map, these are as many maps.
        "IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"],
        # "pyramid": each object on the map that suits its size, mean over channels. "map": each object on every map,
        # sum over channels, a ReLU behind the convolution; published for one map with a WEIGHT of 0.01.
        "KIND": "pyramid",
    }

    @configurable
    def __init__(
        self,
        *,
        student_spec: Mapping[str, ShapeSpec],
        teacher_spec: Mapping[str, ShapeSpec],
        anchor_generator: nn.Module,
        kind: str = config["KIND"],
    ):
        super().__init__()
        self.signals = tuple(student_spec)
        self.strides = {name: shape.stride for name, shape in student_spec.items()}
        self.kind = kind
        self.anchor_generator = anchor_generator
        self.adapters = nn.ModuleDict(
            {
                name: build_faint_conv(shape.channels, teacher_spec[name].channels, rectified=kind == "map")
                for name, shape in student_spec.items()
            }
        )

    @classmethod
    def from_config(cls, cfg, student_spec, teacher_spec) -> dict:
        node = cfg.KD.FINE_GRAINED
        check_detector(cls.__name__, student_spec)
        check_feature_maps("KD.FINE_GRAINED.IN_FEATURES", node.IN_FEATURES, student_spec, teacher_spec)
        check_choice("KD.FINE_GRAINED.KIND", node.KIND, KINDS)
        check_anchor_lists(cfg, "KD.FINE_GRAINED.IN_FEATURES", node.IN_FEATURES)
        names = finest_first(node.IN_FEATURES, student_spec)
        return {
            **select_specs(names, student_spec, teacher_spec),
            "anchor_generator": build_anchor_generator(cfg, [student_spec[name] for name in names]),
            "kind": node.KIND,
        }

    def forward(self, student: Signals, teacher: Signals, batch: Batch) -> dict[str, Tensor]:
        maps = [student[name] for name in self.signals]
        if self.kind == "pyramid":
            boxes = boxes_of_levels(type(self).__name__, batch, maps[0], len(maps))
        else:
            boxes = [object_boxes(type(self).__name__, batch, maps[0])] * len(maps)
        with maps[0].device:  # Detectron2 makes anchors on the CPU unless another device is the default one.
            levels = self.anchor_generator(maps)
        losses = []
        for name, anchors, compared in zip(self.signals, levels, boxes, strict=True):
            s = self.adapters[name](cast_for_layers(student[name]))
            mask = torch.stack([fine_grained_mask(anchors.tensor, x, s.shape[2:]) for x in compared])[:, None]
            mask = valid_region(mask, batch.valid_mask(s, self.strides[name]))
            losses.append(region_loss(s, teacher[name], mask=mask, per_channel=self.kind == "pyramid"))
        return {"loss_kd_fine_grained": add_up(losses) / len(losses)}


def check_anchor_lists(cfg: CfgNode, key: str, names: Sequence[str]) -> None:
    """Checks that MODEL.ANCHOR_GENERATOR has one list of anchors, or one for each of the named maps.

    Args:
        cfg: The whole config.
        key: The config key that holds the names, for messages.

    Raises:
        InputError: If it has another number of lists.
    """
    for option in ("SIZES", "ASPECT_RATIOS"):
        lists = cfg.MODEL.ANCHOR_GENERATOR[option]
        if has_lists(lists) and len(lists) not in (1, len(names)):
            raise InputError(
                f"{key}: must name {len(lists)} maps, as many as MODEL.ANCHOR_GENERATOR.{option} has lists, got "
                f"{', '.join(names)}."
            )
