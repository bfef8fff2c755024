"""Activation boundaries: before its run the student learns where the teacher's neurons are active."""

from collections.abc import Mapping
from typing import ClassVar

from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.utils.events import get_event_storage, has_event_storage
from torch import Tensor, nn

from kd_det.heads.norms import check_norm
from kd_det.heads.preactivations import (
    build_connector,
    check_stage_options,
    connect,
    sum_over_cells,
    sum_over_stages,
)
from kd_det.losses import activation_boundary_loss, activation_disagreement
from kd_det.registry import KD_HEAD_REGISTRY
from kd_det.signals import Batch, Signals


@KD_HEAD_REGISTRY.register()
class ActivationBoundaryHead(nn.Module):
    """Activation boundaries (AB, Heo et al., AAAI 2019, https://arxiv.org/abs/1811.03233).

    A stage before the run trains the student on this loss alone; the run then starts from it and has no loss of this
    head. Each stage's values before its last ReLU, of the student through a connector (1x1 convolution and batch norm,
    where the channels differ), are to have the sign of the teacher's by a margin of 1: squared shortfalls, summed over
    elements, mean over images. The deepest stage weighs 1, each finer one half of the next. The weight 0.003 is that of
    the published code on CIFAR, which multiplies the sum by 3 / 1000.

    The sum grows with the size of the map. "map_invariant" scales it to a deepest map of 8x8 cells, the one of CIFAR;
    "code" leaves it as published.

    The scalar ``kd/ab_disagreement`` is the share of neurons that are active in one network alone, mean over stages.

    Args:
        student_spec: Name to shape of each stage's ``<name>_preact`` in the student, finest first.
        teacher_spec: The same of the teacher.
        norm: Of the connectors: "BN" (published code), "SyncBN", "GN" or "LN".
        weight: Factor of the loss in the stage.
        scale: "map_invariant" or "code".
    """

    config: ClassVar = {
        # Weighs the loss of the pre-training stage; SCHEDULE is not used.
        "WEIGHT": 0.003,
        # Stages of the backbone, from the finest to the coarsest.
        "IN_FEATURES": ["res2", "res3", "res4", "res5"],
        # Normalisation in the connectors, where the channels differ: BN (published), SyncBN, GN or LN.
        "NORM": "BN",
        # "map_invariant": the strength it has on CIFAR, at every map size. "code": the published sum over cells.
        "SCALE": "map_invariant",
    }

    signals = ()
    pretrained = ("connectors",)
    pretrains_student = True

    @configurable
    def __init__(
        self,
        *,
        student_spec: Mapping[str, ShapeSpec],
        teacher_spec: Mapping[str, ShapeSpec],
        norm: str = config["NORM"],
        weight: float = config["WEIGHT"],
        scale: str = config["SCALE"],
    ):
        super().__init__()
        self.pretrain_signals = self.pretrain_teacher_signals = tuple(student_spec)
        self.strides = {name: shape.stride for name, shape in student_spec.items()}
        self.weight = weight
        self.scale = scale
        self.connectors = nn.ModuleDict()
        for name, shape in student_spec.items():
            own, other = shape.channels, teacher_spec[name].channels
            self.connectors[name] = nn.Identity() if own == other else build_connector(own, other, norm=norm)

    @classmethod
    def from_config(cls, cfg, student_spec, teacher_spec) -> dict:
        node = cfg.KD.ACTIVATION_BOUNDARY
        check_stage_options("KD.ACTIVATION_BOUNDARY", node, student_spec, teacher_spec)
        names = [f"{name}_preact" for name in node.IN_FEATURES]
        check_norm(cfg, "ACTIVATION_BOUNDARY", [teacher_spec[name].channels for name in names])
        return {
            "student_spec": {name: student_spec[name] for name in names},
            "teacher_spec": {name: teacher_spec[name] for name in names},
            "norm": node.NORM,
            "weight": node.WEIGHT,
            "scale": node.SCALE,
        }

    def pretrain(self, student: Signals, teacher: Signals, batch: Batch) -> dict[str, Tensor]:
        losses, disagreements = [], []
        for name, stride in self.strides.items():
            own = connect(self.connectors[name], student[name])
            mask = batch.valid_mask(own, stride)
            losses.append(sum_over_cells(activation_boundary_loss, own, teacher[name], mask))
            disagreements.append(activation_disagreement(own, teacher[name], mask=mask))
        if has_event_storage():
            get_event_storage().put_scalar("kd/ab_disagreement", sum(disagreements) / len(disagreements))
        return {"loss_kd_activation_boundary": self.weight * sum_over_stages(losses, own, mask, scale=self.scale)}

    def forward(self, student: Signals, teacher: Signals, batch: Batch) -> dict[str, Tensor]:
        return {}
