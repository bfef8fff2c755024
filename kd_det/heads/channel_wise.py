"""Implements CWD: each channel of the student's maps learns to be active where the teacher's is."""

from collections.abc import Mapping
from typing import Any, ClassVar

from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from kd_det.errors import InputError
from kd_det.heads.align import Aligners
from kd_det.heads.build import check_feature_maps, select_specs
from kd_det.losses import channel_wise_loss
from kd_det.losses.numerics import add_up
from kd_det.registry import KD_HEAD_REGISTRY
from kd_det.signals import Batch, Signals


@KD_HEAD_REGISTRY.register()
class ChannelWiseHead(nn.Module):
    """Compares where the channels of student and teacher are active, by a softmax over the cells of each channel.

    CWD (Shu et al., ICCV 2021, https://arxiv.org/abs/2011.13256): T^2 times the divergence of these softmaxes, averaged
    over channels and summed over maps; see :func:`kd_det.losses.channel_wise_loss`. Maps of the same width have no
    adapter. Others go through a 1x1 convolution, without the published norm and ReLU, since maps of an FPN have
    negative values.

    Args:
        student_spec: Maps each compared feature map to its shape in the student.
        teacher_spec: Maps the same names to the shapes in the teacher.
        temperature: T.
    """

    config: ClassVar[dict[str, Any]] = {
        "WEIGHT": 10.0,
        # Feature maps of the backbone.
        "IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"],
        # Temperature of the softmax over the cells of a channel.
        "TEMPERATURE": 1.0,
    }

    @configurable
    def __init__(
        self,
        *,
        student_spec: Mapping[str, ShapeSpec],
        teacher_spec: Mapping[str, ShapeSpec],
        temperature: float = config["TEMPERATURE"],
    ):
        super().__init__()
        self.signals = tuple(student_spec)
        self.strides = {name: shape.stride for name, shape in student_spec.items()}
        self.align = Aligners(student_spec, teacher_spec)
        self.temperature = temperature

    @classmethod
    def from_config(cls, cfg, student_spec, teacher_spec) -> dict:
        node = cfg.KD.CHANNEL_WISE
        check_feature_maps("KD.CHANNEL_WISE.IN_FEATURES", node.IN_FEATURES, student_spec, teacher_spec)
        if node.TEMPERATURE <= 0:
            raise InputError(f"KD.CHANNEL_WISE.TEMPERATURE: must be above 0, got {node.TEMPERATURE}.")
        return {
            **select_specs(node.IN_FEATURES, student_spec, teacher_spec),
            "temperature": node.TEMPERATURE,
        }

    def forward(self, student: Signals, teacher: Signals, batch: Batch) -> dict[str, Tensor]:
        losses = [
            channel_wise_loss(
                self.align(student, name),
                teacher[name],
                temperature=self.temperature,
                mask=batch.valid_mask(student[name], stride),
            )
            for name, stride in self.strides.items()
        ]
        return {"loss_kd_channel_wise": add_up(losses)}
