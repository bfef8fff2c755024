"""Implements MGD: from a part of the student's map, two convolutions generate the teacher's whole map."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.utils import comm
from torch import Tensor, nn

from kd_det.errors import InputError, check_choice
from kd_det.heads.align import SCALES, Aligners, sum_scale
from kd_det.heads.build import check_feature_maps, select_specs
from kd_det.losses import masked_generation_loss
from kd_det.losses.numerics import add_up, cast_for_layers
from kd_det.registry import KD_HEAD_REGISTRY
from kd_det.signals import Batch, Signals


@KD_HEAD_REGISTRY.register()
class MaskedGenerationHead(nn.Module):
    """Hides random cells of the student's maps and generates the teacher's maps from the rest.

    MGD (Yang et al., ECCV 2022, https://arxiv.org/abs/2205.01529). A 1x1 convolution brings the student's map to the
    teacher's width where they differ. Then a share of the cells, drawn anew in each step, is set to zero in all
    channels, and two 3x3 convolutions with a ReLU between them generate the teacher's map. The loss is the squared
    difference, summed over channels, cells and maps, mean over images; see
    :func:`kd_det.losses.masked_generation_loss`.

    The published weights are 5e-7 with a share of 0.45 for Faster and Mask R-CNN (p2 to p5) and 2e-5 with 0.65 for
    RetinaNet (p3 to p7), both for teachers and students of 256 channels and with gradients clipped to a norm of 35. The
    convolutions cost 1.2 million multiply-adds per cell of 256 channels.

    Args:
        student_spec: Maps each compared feature map to its shape in the student.
        teacher_spec: Maps the same names to the shapes in the teacher.
        mask_ratio: Probability that a cell is hidden.
        scale: "map_invariant" or "code", see :func:`kd_det.heads.align.sum_scale`.
    """

    config: ClassVar[dict[str, Any]] = {
        "WEIGHT": 5e-7,
        # Feature maps of the backbone.
        "IN_FEATURES": ["p2", "p3", "p4", "p5"],
        # Probability that a cell of the student's map is hidden.
        "MASK_RATIO": 0.45,
        # "code": the sum over cells, as published, which grows with the images. "map_invariant": as large as for images
        # of 800 x 1344 pixels, whatever their size.
        "SCALE": "map_invariant",
    }

    @configurable
    def __init__(
        self,
        *,
        student_spec: Mapping[str, ShapeSpec],
        teacher_spec: Mapping[str, ShapeSpec],
        mask_ratio: float = config["MASK_RATIO"],
        scale: str = config["SCALE"],
    ):
        super().__init__()
        self.signals = tuple(student_spec)
        self.strides = {name: shape.stride for name, shape in student_spec.items()}
        self.mask_ratio = mask_ratio
        self.scale = scale
        self.align = Aligners(student_spec, teacher_spec)
        self.generate = nn.ModuleDict({name: build_generator(teacher_spec[name].channels) for name in student_spec})
        # The hidden cells are drawn by a generator of their own, and the checkpoint counts the draws, so neither an
        # interruption nor other random numbers change them.
        self.seed, self.draws = torch.initial_seed(), 0

    @classmethod
    def from_config(cls, cfg, student_spec, teacher_spec) -> dict:
        node = cfg.KD.MASKED_GENERATION
        check_feature_maps("KD.MASKED_GENERATION.IN_FEATURES", node.IN_FEATURES, student_spec, teacher_spec)
        if not 0 <= node.MASK_RATIO < 1:
            raise InputError(f"KD.MASKED_GENERATION.MASK_RATIO: must be 0 or more and below 1, got {node.MASK_RATIO}.")
        check_choice("KD.MASKED_GENERATION.SCALE", node.SCALE, SCALES)
        return {
            **select_specs(node.IN_FEATURES, student_spec, teacher_spec),
            "mask_ratio": node.MASK_RATIO,
            "scale": node.SCALE,
        }

    def get_extra_state(self) -> dict[str, int]:
        return {"seed": self.seed, "draws": self.draws}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.seed, self.draws = int(state["seed"]), int(state["draws"])

    def forward(self, student: Signals, teacher: Signals, batch: Batch) -> dict[str, Tensor]:
        self.draws += 1
        random = torch.Generator().manual_seed(hash((self.seed, self.draws, comm.get_rank())) % 2**63)
        losses = []
        for name, stride in self.strides.items():
            x = self.align(student, name)
            shown = torch.empty(len(x), 1, *x.shape[2:], dtype=torch.bool).bernoulli_(
                1 - self.mask_ratio, generator=random
            )
            generated = self.generate[name](cast_for_layers(x * shown.to(x.device, non_blocking=True)))
            mask = batch.valid_mask(x, stride)
            loss = masked_generation_loss(generated, teacher[name], mask=mask)
            losses.append(loss * sum_scale(x, stride, scale=self.scale, mask=mask))
        return {"loss_kd_masked_generation": add_up(losses)}


def build_generator(channels: int) -> nn.Sequential:
    """Builds two 3x3 convolutions with a ReLU between them, initialised as torch does."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Conv2d(channels, channels, kernel_size=3, padding=1),
    )
