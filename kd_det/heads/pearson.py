"""Implements PKD: the channels of the student's maps learn to correlate with the teacher's."""

from collections.abc import Mapping
from typing import Any, ClassVar

from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from kd_det.heads.align import Aligners
from kd_det.heads.build import check_feature_maps, select_specs
from kd_det.losses import pearson_loss
from kd_det.losses.numerics import add_up
from kd_det.registry import KD_HEAD_REGISTRY
from kd_det.signals import Batch, Signals


@KD_HEAD_REGISTRY.register()
class PearsonHead(nn.Module):
    """Maximises the correlation between each channel of student and teacher, over the cells of the batch.

    PKD (Cao et al., NeurIPS 2022, https://arxiv.org/abs/2207.02039): the mean squared difference between standardised
    channels, halved and summed over maps; see :func:`kd_det.losses.pearson_loss`. Magnitudes do not matter, so one
    weight serves teachers of other architectures, and the loss does not depend on the size of the map. The statistics
    are those of one GPU's batch, as published. Maps of the same width have no adapter; others go through a 1x1
    convolution.

    Published weights are 6 for Faster R-CNN (p2 to p5), and 10 for RetinaNet (p3 to p6). The gradient of a channel that
    hardly varies in the student grows as the inverse of its standard deviation.

    Args:
        student_spec: Maps each compared feature map to its shape in the student.
        teacher_spec: Maps the same names to the shapes in the teacher.
    """

    config: ClassVar[dict[str, Any]] = {
        "WEIGHT": 6.0,
        # Feature maps of the backbone.
        "IN_FEATURES": ["p2", "p3", "p4", "p5"],
    }

    @configurable
    def __init__(self, *, student_spec: Mapping[str, ShapeSpec], teacher_spec: Mapping[str, ShapeSpec]):
        super().__init__()
        self.signals = tuple(student_spec)
        self.strides = {name: shape.stride for name, shape in student_spec.items()}
        self.align = Aligners(student_spec, teacher_spec)

    @classmethod
    def from_config(cls, cfg, student_spec, teacher_spec) -> dict:
        names = cfg.KD.PEARSON.IN_FEATURES
        check_feature_maps("KD.PEARSON.IN_FEATURES", names, student_spec, teacher_spec)
        return select_specs(names, student_spec, teacher_spec)

    def forward(self, student: Signals, teacher: Signals, batch: Batch) -> dict[str, Tensor]:
        losses = [
            pearson_loss(self.align(student, name), teacher[name], mask=batch.valid_mask(student[name], stride))
            for name, stride in self.strides.items()
        ]
        return {"loss_kd_pearson": add_up(losses)}
