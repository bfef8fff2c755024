"""Hints: the student's features, through a regressor, resemble the teacher's."""

from collections.abc import Mapping

from detectron2.config import configurable
from detectron2.layers import Conv2d, ShapeSpec
from torch import Tensor, nn

from kd_det.heads.build import check_feature_maps
from kd_det.losses import hint_loss
from kd_det.registry import KD_HEAD_REGISTRY
from kd_det.signals import Batch, Signals


@KD_HEAD_REGISTRY.register()
class HintHead(nn.Module):
    """FitNets' hints, trained together with the task (Romero et al., ICLR 2015, https://arxiv.org/abs/1412.6550).

    A 1x1 convolution per feature map regresses the student's channels to the teacher's; the loss is the mean squared
    error, summed over features. The paper takes half the squared norm per image (C H W / 2 times this) and a regressor
    with a nonlinearity, and trains on the hint alone before the task.

    Args:
        student_spec: Name to shape of each compared feature map in the student.
        teacher_spec: The same in the teacher.
    """

    @configurable
    def __init__(self, *, student_spec: Mapping[str, ShapeSpec], teacher_spec: Mapping[str, ShapeSpec]):
        super().__init__()
        self.signals = tuple(student_spec)
        self.strides = {name: shape.stride for name, shape in student_spec.items()}
        self.regressors = nn.ModuleDict(
            {
                name: Conv2d(shape.channels, teacher_spec[name].channels, kernel_size=1)
                for name, shape in student_spec.items()
            }
        )

    @classmethod
    def from_config(cls, cfg, student_spec, teacher_spec) -> dict:
        names = cfg.KD.HINT.IN_FEATURES
        check_feature_maps("KD.HINT.IN_FEATURES", names, student_spec, teacher_spec)
        return {
            "student_spec": {name: student_spec[name] for name in names},
            "teacher_spec": {name: teacher_spec[name] for name in names},
        }

    def forward(self, student: Signals, teacher: Signals, batch: Batch) -> dict[str, Tensor]:
        losses = [
            hint_loss(
                self.regressors[name](student[name]),
                teacher[name],
                mask=batch.valid_mask(student[name], stride),
            )
            for name, stride in self.strides.items()
        ]
        return {"loss_kd_hint": sum(losses)}
