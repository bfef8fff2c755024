"""Implements ReviewKD: each student level, fused with the deeper ones, learns to resemble the teacher's level."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, ClassVar, cast

import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.layers import Conv2d, ShapeSpec
from fvcore.nn import weight_init
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kd_det.errors import InputError
from kd_det.heads.build import check_feature_maps, check_signals, without_relu
from kd_det.heads.norms import build_norm, check_norm
from kd_det.losses import hierarchical_context_loss
from kd_det.losses.numerics import add_up, cast_for_layers
from kd_det.registry import KD_HEAD_REGISTRY
from kd_det.signals import Batch, Signals


class AttentionFusion(nn.Module):
    """Fuses a student's level with the residual of the deeper levels by attention (ABF).

    Args:
        in_channels: Channels of the student's level.
        mid_channels: Channels of the residual that the next finer level takes.
        out_channels: Channels of the teacher's level.
        norm: Normalisation after both convolutions.
        fuse: Whether there is a deeper level to fuse with.
    """

    def __init__(self, in_channels: int, mid_channels: int, out_channels: int, *, norm: str, fuse: bool):
        super().__init__()
        self.reduce = Conv2d(in_channels, mid_channels, 1, bias=False, norm=build_norm(norm, mid_channels))
        self.expand = Conv2d(mid_channels, out_channels, 3, padding=1, bias=False, norm=build_norm(norm, out_channels))
        self.attention = Conv2d(2 * mid_channels, 2, 1) if fuse else None
        for conv in (self.reduce, self.expand):
            weight_init.c2_xavier_fill(conv)

    def forward(self, x: Tensor, deeper: Tensor | None) -> tuple[Tensor, Tensor]:
        """Fuses a level (N, C, H, W) with the residual of the deeper level (N, mid, h, w).

        Returns:
            The map to compare with the teacher (N, out, H, W), and the residual for the next finer level
            (N, mid, H, W).
        """
        x = self.fuse(x, deeper)
        return self.expand(x), x

    def fuse(self, x: Tensor, deeper: Tensor | None) -> Tensor:
        """Computes the residual for the next finer level, from which `expand` makes the map to compare."""
        x = self.reduce(x)
        if self.attention is not None and deeper is not None:
            # This equals a 1x1 convolution of the concatenated maps, but each map is convolved at its own resolution.
            x_weight, deeper_weight = self.attention.weight.split([x.shape[1], deeper.shape[1]], dim=1)
            attention = F.conv2d(x, x_weight, self.attention.bias)
            attention = attention + enlarge(F.conv2d(deeper, deeper_weight), x)
            x_share, deeper_share = attention.sigmoid().split(1, dim=1)
            x = x * x_share + enlarge(deeper, x) * deeper_share
        return x


def enlarge(x: Tensor, like: Tensor) -> Tensor:
    """Repeats the cells of a map until it has the height and width of another one."""
    return F.interpolate(x, like.shape[-2:], mode="nearest")


@KD_HEAD_REGISTRY.register()
class ReviewKDHead(nn.Module):
    """Compares each level of the teacher with the student's levels from that one to the deepest, fused by attention.

    Knowledge review (Chen et al., CVPR 2021, https://arxiv.org/abs/2104.09044). Starting from the deepest level,
    attention-based fusion joins each student level with the deeper ones; the hierarchical context loss compares the
    result with the teacher's level, summed over levels.

    In classifiers the deepest level may be ``pooled``; as published, they compare the student's features with the
    teacher's before the ReLU.

    Args:
        student_spec: Maps each level to its shape in the student, finest first.
        teacher_spec: Maps each level to its shape in the teacher, in the same order.
        mid_channels: Channels inside the fusion modules (published code: 256 for detectors).
        norm: "BN" (published code), "SyncBN", "GN" or "LN".
        recompute: Whether the maps inside the fusion modules are computed once more in the backward pass instead of
            being kept until then.
    """

    config: ClassVar[dict[str, Any]] = {
        "WEIGHT": 1.0,
        # Feature maps, from the finest level to the coarsest; in a classifier the last one may be "pooled".
        "IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"],
        # Channels inside the fusion modules.
        "MID_CHANNELS": 256,
        # Normalisation in the fusion modules: BN (published), SyncBN (needs GPUs), GN or LN.
        "NORM": "BN",
        # Compare with the teacher's features before the ReLU at the end of each stage (published for classifiers).
        "TEACHER_PREACT": False,
        # Compute the fusion modules once more in the backward pass, instead of keeping their maps until then: this
        # saves about half of the head's memory for a third more of its time. Losses and gradients are the same.
        "RECOMPUTE": False,
    }

    @configurable
    def __init__(
        self,
        *,
        student_spec: Mapping[str, ShapeSpec],
        teacher_spec: Mapping[str, ShapeSpec],
        mid_channels: int = config["MID_CHANNELS"],
        norm: str = config["NORM"],
        recompute: bool = config["RECOMPUTE"],
    ):
        super().__init__()
        self.recompute = recompute
        self.signals = tuple(student_spec)
        self.teacher_signals = tuple(teacher_spec)
        self.strides = {name: shape.stride for name, shape in student_spec.items()}
        self.fusions = nn.ModuleDict(
            {
                name: AttentionFusion(
                    shape.channels, mid_channels, teacher_shape.channels, norm=norm, fuse=name != self.signals[-1]
                )
                for (name, shape), teacher_shape in zip(student_spec.items(), teacher_spec.values(), strict=True)
            }
        )

    @classmethod
    def from_config(cls, cfg, student_spec, teacher_spec) -> dict:
        node, key = cfg.KD.REVIEW, "KD.REVIEW.IN_FEATURES"
        maps = [name for name in node.IN_FEATURES if name != "pooled"]
        teacher_maps = [f"{name}_preact" if node.TEACHER_PREACT else name for name in maps]
        without = without_relu(maps, teacher_spec)
        if node.TEACHER_PREACT and without:
            raise InputError(
                f"KD.REVIEW.TEACHER_PREACT: there is no ReLU at the end of the teacher's {', '.join(without)}; set it "
                f"to False, or choose other {key}."
            )
        check_feature_maps(key, maps, student_spec, teacher_spec, teacher_maps)
        pooled = ["pooled"] if "pooled" in node.IN_FEATURES else []
        check_signals(key, pooled, student_spec, teacher_spec)
        teacher_names = [*teacher_maps, *pooled]
        check_norm(cfg, "REVIEW", [node.MID_CHANNELS, *(teacher_spec[name].channels for name in teacher_names)])
        if node.RECOMPUTE and cfg.KD.COMPILE_HEADS:
            raise InputError("KD.REVIEW.RECOMPUTE: must be False where KD.COMPILE_HEADS is True, got True.")
        if node.MID_CHANNELS < 1:
            raise InputError(f"KD.REVIEW.MID_CHANNELS: must be 1 or more, got {node.MID_CHANNELS}.")
        strides = [student_spec[name].stride for name in maps]
        if strides != sorted(strides) or [*maps, *pooled] != list(node.IN_FEATURES):
            raise InputError(
                f"{key}: must go from the finest level to the coarsest, 'pooled' last, but the strides of "
                f"{', '.join(node.IN_FEATURES)} are {[student_spec[name].stride for name in node.IN_FEATURES]}."
            )
        return {
            "student_spec": {name: student_spec[name] for name in node.IN_FEATURES},
            "teacher_spec": {name: teacher_spec[name] for name in teacher_names},
            "mid_channels": node.MID_CHANNELS,
            "norm": node.NORM,
            "recompute": node.RECOMPUTE,
        }

    def forward(self, student: Signals, teacher: Signals, batch: Batch) -> dict[str, Tensor]:
        losses, residual = [], None
        for name, teacher_name in zip(reversed(self.signals), reversed(self.teacher_signals), strict=True):
            level = cast_for_layers(as_map(student[name]))
            residual = self._run(self._fusion(name).fuse, level, residual)
            losses.append(self._run(self._compare, name, residual, as_map(teacher[teacher_name]), batch))
        return {"loss_kd_review": add_up(losses)}

    def _fusion(self, name: str) -> AttentionFusion:
        return cast(AttentionFusion, self.fusions[name])

    def _compare(self, name: str, residual: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
        """Compares what a level's residual expands to with the teacher's level."""
        fused = self._fusion(name).expand(residual)
        mask = batch.valid_mask(fused, self.strides[name]) if self.strides[name] else None
        return hierarchical_context_loss(fused, teacher, mask=mask)

    def _run(self, function: Callable[..., Tensor], *arguments) -> Tensor:
        """Calls a function; with `recompute`, what it would keep is computed once more in the backward pass."""
        if not self.recompute:
            return function(*arguments)
        return checkpoint(
            function,
            *arguments,
            use_reentrant=False,
            preserve_rng_state=False,  # Nothing here is random.
            context_fn=lambda: (nullcontext(), WithoutStatistics(self.fusions)),
        )


class WithoutStatistics:
    """Context in which batch norms do not count a batch in their running statistics; it may be entered many times.

    Args:
        module: Contains the batch norms.
    """

    def __init__(self, module: nn.Module):
        self.norms = [x for x in module.modules() if isinstance(x, nn.modules.batchnorm._BatchNorm)]

    def __enter__(self) -> None:
        self.before = [(norm.momentum, norm.num_batches_tracked) for norm in self.norms]
        for norm, (_, count) in zip(self.norms, self.before, strict=True):
            norm.momentum = 0.0
            norm.num_batches_tracked = None if count is None else count.clone()

    def __exit__(self, *_: object) -> None:
        for norm, (momentum, count) in zip(self.norms, self.before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count


def as_map(x: Tensor) -> Tensor:
    """Turns a pooled feature (N, C) into a map of one cell, (N, C, 1, 1); maps stay as they are."""
    return x[:, :, None, None] if x.dim() == 2 else x
