"""Implements hints: the student's features, through a regressor, learn to resemble the teacher's."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from kd_det.errors import check_choice
from kd_det.heads.build import check_feature_maps, select_specs
from kd_det.heads.connectors import build_connector
from kd_det.heads.norms import check_norm
from kd_det.losses import hint_loss
from kd_det.losses.numerics import add_up, cast_for_layers
from kd_det.registry import KD_HEAD_REGISTRY
from kd_det.signals import Batch, Signals

REGRESSORS = ("linear", "rectified")


@KD_HEAD_REGISTRY.register()
class HintHead(nn.Module):
    """Regresses the teacher's features from the student's.

    FitNets' hints (Romero et al., ICLR 2015, https://arxiv.org/abs/1412.6550). A 1x1 convolution per feature map brings
    the student's channels to the teacher's; the loss is the mean squared error, summed over features. The paper takes
    half the squared norm per image (C H W / 2 times this) and a regressor with a nonlinearity. The ``rectified``
    regressor has a batch norm and a ReLU after the convolution, as in RepDistiller and mdistiller, whose weight of 100
    on CIFAR belongs to it; the ``linear`` one suits signed features, such as those of an FPN.

    With one stage, hints are trained together with the task. With two, as in the paper, a stage before the run trains
    the student up to the features on the hint alone; the run then starts from the result and has no loss of this head.

    Args:
        student_spec: Maps each compared feature map to its shape in the student.
        teacher_spec: Maps the same names to the shapes in the teacher.
        regressor: "linear" or "rectified".
        norm: Normalisation of the rectified regressor: "BN" (published code), "SyncBN", "GN" or "LN".
        stages: 1 or 2.
        weight: Factor of the loss in the stage before the run.
    """

    config: ClassVar[dict[str, Any]] = {
        # With STAGES 2 this weighs the loss of the pre-training stage, and SCHEDULE is not used.
        "WEIGHT": 1.0,
        # Feature maps of the backbone.
        "IN_FEATURES": ["p2", "p3", "p4", "p5"],
        # Maps the student's channels to the teacher's: "linear", a 1x1 convolution, or "rectified", with batch norm and
        # ReLU after it, for features that follow a ReLU; published weights on CIFAR assume the latter.
        "REGRESSOR": "linear",
        # Normalisation in the rectified regressor: BN (published), SyncBN, GN or LN.
        "NORM": "BN",
        # 1: train the hint together with the task. 2: train the student up to the features on the hint alone, in a
        # stage before the run (paper).
        "STAGES": 1,
    }

    @configurable
    def __init__(
        self,
        *,
        student_spec: Mapping[str, ShapeSpec],
        teacher_spec: Mapping[str, ShapeSpec],
        regressor: str = config["REGRESSOR"],
        norm: str = config["NORM"],
        stages: int = config["STAGES"],
        weight: float = config["WEIGHT"],
    ):
        super().__init__()
        self.stages = stages
        self.weight = weight
        self.pretrains_student = stages == 2
        self.pretrained = ("regressors",) if stages == 2 else ()
        self.signals = () if stages == 2 else tuple(student_spec)
        self.pretrain_signals = self.pretrain_teacher_signals = tuple(student_spec) if stages == 2 else ()
        self.strides = {name: shape.stride for name, shape in student_spec.items()}
        options: dict[str, Any] = {"norm": norm, "activation": F.relu} if regressor == "rectified" else {}
        self.regressors = nn.ModuleDict(
            {
                name: build_connector(shape.channels, teacher_spec[name].channels, **options)
                for name, shape in student_spec.items()
            }
        )

    @classmethod
    def from_config(cls, cfg, student_spec, teacher_spec) -> dict:
        names = cfg.KD.HINT.IN_FEATURES
        check_feature_maps("KD.HINT.IN_FEATURES", names, student_spec, teacher_spec)
        check_choice("KD.HINT.REGRESSOR", cfg.KD.HINT.REGRESSOR, REGRESSORS)
        rectified = cfg.KD.HINT.REGRESSOR == "rectified"
        check_norm(cfg, "HINT", [teacher_spec[name].channels for name in names] if rectified else [])
        check_choice("KD.HINT.STAGES", cfg.KD.HINT.STAGES, (1, 2))
        return {
            **select_specs(names, student_spec, teacher_spec),
            "regressor": cfg.KD.HINT.REGRESSOR,
            "norm": cfg.KD.HINT.NORM,
            "stages": cfg.KD.HINT.STAGES,
            "weight": cfg.KD.HINT.WEIGHT,
        }

    def pretrain(self, student: Signals, teacher: Signals, batch: Batch) -> dict[str, Tensor]:
        return {"loss_kd_hint": self.weight * self._compare(student, teacher, batch)}

    def forward(self, student: Signals, teacher: Signals, batch: Batch) -> dict[str, Tensor]:
        return {} if self.stages == 2 else {"loss_kd_hint": self._compare(student, teacher, batch)}

    def _compare(self, student: Signals, teacher: Signals, batch: Batch) -> Tensor:
        losses = [
            hint_loss(
                self.regressors[name](cast_for_layers(student[name])),
                teacher[name],
                mask=batch.valid_mask(student[name], stride),
            )
            for name, stride in self.strides.items()
        ]
        return add_up(losses)
