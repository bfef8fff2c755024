"""Implements attention transfer: the student learns to attend to the same places as the teacher."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from detectron2.config import configurable
from torch import Tensor, nn

from kd_det.errors import InputError, check_choice
from kd_det.heads.build import check_feature_maps
from kd_det.losses import attention_transfer_loss, input_gradient_loss
from kd_det.losses.numerics import add_up
from kd_det.registry import KD_HEAD_REGISTRY
from kd_det.signals import Batch, Signals

KINDS = ("activation", "gradient")
REDUCTIONS = ("sum_hw", "mean", "norm")


@KD_HEAD_REGISTRY.register()
class AttentionTransferHead(nn.Module):
    """Teaches the student to attend to the same places as the teacher.

    Attention transfer (Zagoruyko & Komodakis, ICLR 2017, https://arxiv.org/abs/1612.03928). The activation-based form
    compares normalised maps of the channels' mean power, so the two networks may differ in their number of channels;
    the loss is summed over features. ``reduction="mean"`` gives the loss of the published code, whose weight is 1000 on
    CIFAR. The default sums over cells instead, since a mean over the thousands of cells of an FPN level has almost no
    gradient. "norm" gives the loss of the paper, without the factor beta / 2.

    The gradient-based form compares how each image's loss changes with its pixels. It differentiates twice, which ROI
    pooling does not support, so it is for image classifiers only.

    Args:
        strides: Maps each compared feature map to its stride; empty for the gradient-based form.
        power: Exponent of the activations, at least 1.
        reduction: "sum_hw", "mean" or "norm".
    """

    config: ClassVar[dict[str, Any]] = {
        "WEIGHT": 15.0,
        # "activation", or "gradient": compares input gradients, for classifiers only, and ignores the keys below.
        "KIND": "activation",
        # Feature maps of the backbone.
        "IN_FEATURES": ["p2", "p3", "p4", "p5"],
        # Exponent of the activations in the attention map; the paper takes 2.
        "POWER": 2,
        # "sum_hw": sum over cells, equally strong at every map size. "mean": the published code, which gets weaker with
        # the number of cells (weight 1000 on CIFAR). "norm": the paper's unsquared distance.
        "REDUCTION": "sum_hw",
    }

    @configurable
    def __init__(
        self, *, strides: Mapping[str, int], power: float = config["POWER"], reduction: str = config["REDUCTION"]
    ):
        super().__init__()
        self.strides = dict(strides)
        self.signals: Sequence[str] = tuple(strides) or ("input_gradient",)
        self.power = power
        self.reduction = reduction

    @classmethod
    def from_config(cls, cfg, student_spec, teacher_spec) -> dict:
        node = cfg.KD.ATTENTION_TRANSFER
        check_choice("KD.ATTENTION_TRANSFER.KIND", node.KIND, KINDS)
        if node.KIND == "gradient":
            if "input_gradient" not in student_spec:
                raise InputError(
                    "KD.ATTENTION_TRANSFER.KIND: 'gradient' is for image classifiers only, because ROI pooling cannot "
                    "be differentiated twice; allowed here is 'activation'."
                )
            return {"strides": {}}
        check_feature_maps("KD.ATTENTION_TRANSFER.IN_FEATURES", node.IN_FEATURES, student_spec, teacher_spec)
        check_choice("KD.ATTENTION_TRANSFER.REDUCTION", node.REDUCTION, REDUCTIONS)
        if node.POWER < 1:
            raise InputError(f"KD.ATTENTION_TRANSFER.POWER: must be at least 1, got {node.POWER}.")
        return {
            "strides": {name: student_spec[name].stride for name in node.IN_FEATURES},
            "power": node.POWER,
            "reduction": node.REDUCTION,
        }

    def forward(self, student: Signals, teacher: Signals, batch: Batch) -> dict[str, Tensor]:
        if not self.strides:
            gradients = student["input_gradient"], teacher["input_gradient"]
            return {"loss_kd_attention_transfer": input_gradient_loss(*gradients)}
        losses = [
            attention_transfer_loss(
                student[name],
                teacher[name],
                power=self.power,
                reduction=self.reduction,
                mask=batch.valid_mask(student[name], stride),
            )
            for name, stride in self.strides.items()
        ]
        return {"loss_kd_attention_transfer": add_up(losses)}
