"""Implements activation boundaries: in a stage before the run, the student learns where the teacher's neurons fire."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from kd_det.heads.build import select_specs
from kd_det.heads.connectors import build_connector
from kd_det.heads.norms import check_norm
from kd_det.heads.preactivations import check_stage_options, connect, sum_over_stages
from kd_det.heads.scalars import log_scalar
from kd_det.losses import activation_boundary_loss, activation_disagreement
from kd_det.registry import KD_HEAD_REGISTRY
from kd_det.signals import Batch, Signals


@KD_HEAD_REGISTRY.register()
class ActivationBoundaryHead(nn.Module):
    """Trains the student to activate the same neurons as the teacher, in a stage before the run.

    Activation boundaries (AB, Heo et al., AAAI 2019, https://arxiv.org/abs/1811.03233). The stage trains the student on
    this loss alone; the run then starts from the result and has no loss of this head. Before the last ReLU of each
    backbone stage, the student's values must have the sign of the teacher's, with a margin of 1. A connector (1x1
    convolution and batch norm) brings the student's channels to the teacher's where they differ. The loss is the sum of
    the squared shortfalls over elements, averaged over images. The deepest backbone stage has weight 1, each finer one
    half the weight of the next. The default weight 0.003 is that of the published code on CIFAR, which multiplies the
    sum by 3 / 1000.

    The sum grows with the size of the map. "map_invariant" scales it to a deepest map of 8x8 cells, as on CIFAR; "code"
    leaves it as published.

    The scalar ``kd/ab_disagreement`` is the share of neurons that are active in only one of the two networks, averaged
    over backbone stages.

    Args:
        student_spec: Maps each backbone stage's ``<name>_preact`` to its shape in the student, finest first.
        teacher_spec: Maps the same names to the shapes in the teacher.
        norm: Normalisation in the connectors: "BN" (published code), "SyncBN", "GN" or "LN".
        weight: Factor of the loss in the stage before the run.
        scale: "map_invariant" or "code".
    """

    config: ClassVar[dict[str, Any]] = {
        # Weighs the loss of the pre-training stage; SCHEDULE is not used.
        "WEIGHT": 0.003,
        # Stages of the backbone, from the finest to the coarsest.
        "IN_FEATURES": ["res2", "res3", "res4", "res5"],
        # Normalisation in the connectors, where the channels differ: BN (published), SyncBN, GN or LN.
        "NORM": "BN",
        # "map_invariant": equally strong at every map size, as on CIFAR. "code": the published sum over cells.
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
            channels = shape.channels, teacher_spec[name].channels
            same = channels[0] == channels[1]
            self.connectors[name] = nn.Identity() if same else build_connector(*channels, norm=norm, msra=True)

    @classmethod
    def from_config(cls, cfg, student_spec, teacher_spec) -> dict:
        node = cfg.KD.ACTIVATION_BOUNDARY
        check_stage_options("KD.ACTIVATION_BOUNDARY", node, student_spec, teacher_spec)
        names = [f"{name}_preact" for name in node.IN_FEATURES]
        check_norm(cfg, "ACTIVATION_BOUNDARY", [teacher_spec[name].channels for name in names])
        return {
            **select_specs(names, student_spec, teacher_spec),
            "norm": node.NORM,
            "weight": node.WEIGHT,
            "scale": node.SCALE,
        }

    def pretrain(self, student: Signals, teacher: Signals, batch: Batch) -> dict[str, Tensor]:
        losses, compared = [], []
        for name, stride in self.strides.items():
            connected = connect(self.connectors[name], student[name])
            mask = batch.valid_mask(connected, stride)
            losses.append(activation_boundary_loss(connected, teacher[name], mask=mask))
            compared.append((connected, teacher[name], mask))
        log_scalar("kd/ab_disagreement", lambda: mean_disagreement(compared))
        loss = sum_over_stages(losses, connected, mask, scale=self.scale)
        return {"loss_kd_activation_boundary": self.weight * loss}

    def forward(self, student: Signals, teacher: Signals, batch: Batch) -> dict[str, Tensor]:
        return {}


def mean_disagreement(compared: Sequence[tuple[Tensor, Tensor, Tensor | None]]) -> Tensor:
    """Averages the share of neurons that are active in only one network over pairs of maps with their masks."""
    shares = [activation_disagreement(student, teacher, mask=mask) for student, teacher, mask in compared]
    return torch.stack(shares).mean()
