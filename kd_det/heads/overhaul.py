"""Overhaul: the student's features before the ReLU resemble the teacher's, except where both are inactive."""

from collections.abc import Mapping
from functools import partial
from typing import ClassVar

import torch
import torch.distributed as dist
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.utils import comm
from torch import Tensor, nn

from kd_det.errors import InputError
from kd_det.heads.build import check_signals
from kd_det.heads.norms import check_norm
from kd_det.heads.preactivations import (
    build_connector,
    check_stage_options,
    connect,
    sum_over_cells,
    sum_over_stages,
)
from kd_det.losses import margin_from_batch_norm, overhaul_loss
from kd_det.losses.numerics import cast_up
from kd_det.registry import KD_HEAD_REGISTRY
from kd_det.signals import Batch, Signals

MARGINS = ("estimate", "batch_norm")


@KD_HEAD_REGISTRY.register()
class OverhaulHead(nn.Module):
    """A comprehensive overhaul of feature distillation (OFD, Heo et al., ICCV 2019, https://arxiv.org/abs/1904.01866).

    Each stage's values before its last ReLU, of the student through a connector (1x1 convolution and batch norm), are
    compared with the teacher's: squared differences, summed over elements, mean over images. A teacher's value below
    the channel's margin, the mean of its negative values, is raised to it; where the result is not positive, a student
    below it costs nothing. The deepest stage weighs 1, each finer one half of the next. The weight 0.001 is that of the
    published code on CIFAR, where the sum is divided by 1000; on ImageNet it is divided by 10000.

    The sum grows with the size of the map. "map_invariant" scales it to a deepest map of 8x8 cells, the one of CIFAR;
    "code" leaves it as published.

    The published code computes the margins from the teacher's last batch norm of a stage, as if nothing were added to
    its output. That holds for a teacher that was trained with it, but not where its statistics were folded into weight
    and bias, as in Detectron2's converted ImageNet weights. Therefore they are estimated by default, from the first
    batches of the run.

    Args:
        student_spec: Name to shape of each stage's ``<name>_preact`` in the student, finest first.
        teacher_spec: The same of the teacher.
        norm: Of the connectors: "BN" (published code), "SyncBN", "GN" or "LN".
        margin: "estimate" or "batch_norm".
        margin_batches: Batches from which margins are estimated; from the first of them on they are in use.
        scale: "map_invariant" or "code".
    """

    config: ClassVar = {
        "WEIGHT": 0.001,
        # Stages of the backbone, from the finest to the coarsest.
        "IN_FEATURES": ["res2", "res3", "res4", "res5"],
        # Normalisation in the connectors: BN (published), SyncBN, GN or LN.
        "NORM": "BN",
        # Source of the margins: "estimate", from the teacher's first MARGIN_BATCHES batches; "batch_norm", from its
        # last batch norm of each stage (published; wrong where statistics were folded into it, as in converted ImageNet
        # weights).
        "MARGIN": "estimate",
        "MARGIN_BATCHES": 200,
        # "map_invariant": the strength it has on CIFAR, at every map size. "code": the published sum over cells.
        "SCALE": "map_invariant",
    }

    @configurable
    def __init__(
        self,
        *,
        student_spec: Mapping[str, ShapeSpec],
        teacher_spec: Mapping[str, ShapeSpec],
        norm: str = config["NORM"],
        margin: str = config["MARGIN"],
        margin_batches: int = config["MARGIN_BATCHES"],
        scale: str = config["SCALE"],
    ):
        super().__init__()
        self.signals = tuple(student_spec)
        norms = norm_signals(self.signals) if margin == "batch_norm" else []
        self.teacher_signals = (*self.signals, *norms)
        self.strides = {name: shape.stride for name, shape in student_spec.items()}
        self.margin = margin
        self.margin_batches = margin_batches
        self.scale = scale
        self.connectors = nn.ModuleDict()
        for name, shape in student_spec.items():
            channels = teacher_spec[name].channels
            self.connectors[name] = build_connector(shape.channels, channels, norm=norm)
            if margin == "estimate":
                # Per channel: sum and number of the teacher's negative values.
                self.register_buffer(f"{name}_negative", torch.zeros(2, channels))
        if margin == "estimate":
            self.register_buffer("batches", torch.zeros((), dtype=torch.long))

    @classmethod
    def from_config(cls, cfg, student_spec, teacher_spec) -> dict:
        node, key = cfg.KD.OVERHAUL, "KD.OVERHAUL"
        check_stage_options(key, node, student_spec, teacher_spec)
        if node.MARGIN not in MARGINS:
            raise InputError(f"{key}.MARGIN: {node.MARGIN!r} is not one of {', '.join(MARGINS)}.")
        if node.MARGIN_BATCHES < 1:
            raise InputError(f"{key}.MARGIN_BATCHES: must be 1 or more, got {node.MARGIN_BATCHES}.")
        names = [f"{name}_preact" for name in node.IN_FEATURES]
        check_norm(cfg, "OVERHAUL", [teacher_spec[name].channels for name in names])
        if node.MARGIN == "batch_norm":
            try:
                check_signals(f"{key}.MARGIN", [], student_spec, teacher_spec, norm_signals(names))
            except InputError as error:
                raise InputError(
                    f"{error} A batch norm whose statistics were folded into weight and bias gives no margins; "
                    "'estimate' takes them from features."
                ) from error
        return {
            "student_spec": {name: student_spec[name] for name in names},
            "teacher_spec": {name: teacher_spec[name] for name in names},
            "norm": node.NORM,
            "margin": node.MARGIN,
            "margin_batches": node.MARGIN_BATCHES,
            "scale": node.SCALE,
        }

    def forward(self, student: Signals, teacher: Signals, batch: Batch) -> dict[str, Tensor]:
        counts = self.margin == "estimate" and self.training and self.batches < self.margin_batches
        losses = []
        for name, stride in self.strides.items():
            own, other = connect(self.connectors[name], student[name]), teacher[name]
            mask = batch.valid_mask(own, stride)
            if counts:
                self._count_negatives(name, other, mask)
            loss = partial(overhaul_loss, margin=self._margin(name, teacher))
            losses.append(sum_over_cells(loss, own, other, mask))
        if counts:
            self.batches += 1
        return {"loss_kd_overhaul": sum_over_stages(losses, own, mask, scale=self.scale)}

    def _margin(self, name: str, teacher: Signals) -> Tensor:
        """Margin of each of the teacher's channels, (C,); 0 where no negative value was seen yet."""
        if self.margin == "batch_norm":
            return margin_from_batch_norm(*(teacher[signal] for signal in norm_signals([name])))
        total, number = self.get_buffer(f"{name}_negative")
        return total / number.clamp(min=1)

    @torch.no_grad()
    def _count_negatives(self, name: str, other: Tensor, mask: Tensor | None) -> None:
        negative = cast_up(other).clamp(max=0)
        if mask is not None:
            negative = negative.masked_fill(~mask, 0)
        found = torch.stack([negative.sum(dim=(0, 2, 3)), (negative < 0).to(negative).sum(dim=(0, 2, 3))])
        if comm.get_world_size() > 1:
            dist.all_reduce(found)
        self.get_buffer(f"{name}_negative").add_(found)


def norm_signals(names) -> list[str]:
    """Names of weight and bias of the batch norms at the end of the stages whose ``<stage>_preact`` are named."""
    stages = [name.removesuffix("_preact") for name in names]
    return [f"{stage}_norm_{part}" for stage in stages for part in ("weight", "bias")]
