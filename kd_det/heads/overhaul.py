"""Implements OFD: features before the ReLU learn to resemble the teacher's, except where both are inactive."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.utils import comm
from torch import Tensor, nn

from kd_det.errors import InputError, check_choice
from kd_det.heads.build import check_signals, select_specs
from kd_det.heads.connectors import build_connector
from kd_det.heads.norms import check_norm
from kd_det.heads.preactivations import check_stage_options, connect, sum_over_stages
from kd_det.losses import margin_from_batch_norm, overhaul_loss
from kd_det.losses.numerics import cast_up
from kd_det.registry import KD_HEAD_REGISTRY
from kd_det.signals import Batch, Signals

MARGINS = ("estimate", "batch_norm")


@KD_HEAD_REGISTRY.register()
class OverhaulHead(nn.Module):
    """Compares the values before each stage's last ReLU, except where student and teacher are both inactive.

    A comprehensive overhaul of feature distillation (OFD, Heo et al., ICCV 2019, https://arxiv.org/abs/1904.01866). A
    connector (1x1 convolution and batch norm) brings the student's channels to the teacher's. The loss is the sum of
    squared differences over elements, averaged over images. A teacher's value below the channel's margin, which is the
    mean of its negative values, is raised to the margin; where the result is not positive, a student's value below it
    costs nothing. The deepest stage has weight 1, each finer one half the weight of the next. The default weight 0.001
    is that of the published code on CIFAR, where the sum is divided by 1000; on ImageNet it is divided by 10000.

    The sum grows with the size of the map. "map_invariant" scales it to a deepest map of 8x8 cells, as on CIFAR; "code"
    leaves it as published.

    The published code computes the margins from the teacher's last batch norm of a stage, as if nothing were added to
    the output of that layer. This holds for a teacher that was trained with the batch norm, but not where the
    statistics were folded into weight and bias, as in Detectron2's converted ImageNet weights. By default the margins
    are therefore estimated from the first batches of the run.

    Args:
        student_spec: Maps each stage's ``<name>_preact`` to its shape in the student, finest first.
        teacher_spec: Maps the same names to the shapes in the teacher.
        norm: Normalisation in the connectors: "BN" (published code), "SyncBN", "GN" or "LN".
        margin: "estimate" or "batch_norm".
        margin_batches: Number of batches from which margins are estimated; the estimate is used from the first one on.
        scale: "map_invariant" or "code".
    """

    config: ClassVar[dict[str, Any]] = {
        "WEIGHT": 0.001,
        # Stages of the backbone, from the finest to the coarsest.
        "IN_FEATURES": ["res2", "res3", "res4", "res5"],
        # Normalisation in the connectors: BN (published), SyncBN, GN or LN.
        "NORM": "BN",
        # Source of the margins: "estimate", from the teacher's values in the first MARGIN_BATCHES batches;
        # "batch_norm", from its last batch norm of each stage (published; wrong where statistics were folded into it,
        # as in converted ImageNet weights).
        "MARGIN": "estimate",
        # Number of batches from which "estimate" takes the margins.
        "MARGIN_BATCHES": 200,
        # "map_invariant": equally strong at every map size, as on CIFAR. "code": the published sum over cells.
        "SCALE": "map_invariant",
    }

    batches: Tensor

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
            self.connectors[name] = build_connector(shape.channels, channels, norm=norm, msra=True)
            if margin == "estimate":
                # Holds the sum and the number of the teacher's negative values of each channel.
                self.register_buffer(f"{name}_negative", torch.zeros(2, channels))
        if margin == "estimate":
            self.register_buffer("batches", torch.zeros((), dtype=torch.long))
        # The same number on the CPU, which would wait for a GPU to read the buffer; None if it is to be read.
        self.counted: int | None = 0

    @classmethod
    def from_config(cls, cfg, student_spec, teacher_spec) -> dict:
        node, key = cfg.KD.OVERHAUL, "KD.OVERHAUL"
        check_stage_options(key, node, student_spec, teacher_spec)
        check_choice(f"{key}.MARGIN", node.MARGIN, MARGINS)
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
            **select_specs(names, student_spec, teacher_spec),
            "norm": node.NORM,
            "margin": node.MARGIN,
            "margin_batches": node.MARGIN_BATCHES,
            "scale": node.SCALE,
        }

    def forward(self, student: Signals, teacher: Signals, batch: Batch) -> dict[str, Tensor]:
        estimates = self.margin == "estimate" and self.training and self._takes_batch()
        losses = []
        for name, stride in self.strides.items():
            connected = connect(self.connectors[name], student[name])
            mask = batch.valid_mask(connected, stride)
            if estimates:
                self._count_negatives(name, teacher[name], mask)
            losses.append(overhaul_loss(connected, teacher[name], margin=self._margin(name, teacher), mask=mask))
        return {"loss_kd_overhaul": sum_over_stages(losses, connected, mask, scale=self.scale)}

    @torch.compiler.disable
    def _takes_batch(self) -> bool:
        """Reports whether margins are still estimated, and counts the batch if they are."""
        if self.counted is None:
            self.counted = int(self.batches)
        if self.counted >= self.margin_batches:
            return False
        self.counted += 1
        self.batches += 1
        return True

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        super()._load_from_state_dict(*arguments, **options)
        self.counted = None

    def _margin(self, name: str, teacher: Signals) -> Tensor:
        """Returns the margin of each of the teacher's channels, (C,); 0 where no negative value was seen yet."""
        if self.margin == "batch_norm":
            return margin_from_batch_norm(*(teacher[signal] for signal in norm_signals([name])))
        total, number = self.get_buffer(f"{name}_negative")
        return total / number.clamp(min=1)

    @torch.no_grad()
    def _count_negatives(self, name: str, t_pre: Tensor, mask: Tensor | None) -> None:
        negative = cast_up(t_pre).clamp(max=0)
        if mask is not None:
            negative = negative.masked_fill(~mask, 0)
        sums = torch.stack([negative.sum(dim=(0, 2, 3)), (negative < 0).to(negative).sum(dim=(0, 2, 3))])
        if comm.get_world_size() > 1:
            dist.all_reduce(sums)
        self.get_buffer(f"{name}_negative").add_(sums)


def norm_signals(names) -> list[str]:
    """Names weight and bias of the batch norms at the end of the stages whose ``<stage>_preact`` are given."""
    stages = [name.removesuffix("_preact") for name in names]
    return [f"{stage}_norm_{part}" for stage in stages for part in ("weight", "bias")]
