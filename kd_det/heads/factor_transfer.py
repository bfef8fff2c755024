"""Implements factor transfer: the student's translated features learn to resemble a paraphrase of the teacher's."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from detectron2.config import configurable
from torch import Tensor, nn

from kd_det.heads.coders import (
    AutoEncoder,
    Feature,
    build_coder,
    check_factor_options,
    encode,
    first_boxes,
    reconstruction_loss,
    rescale,
    valid_cells,
)
from kd_det.heads.norms import NORMS, check_norm
from kd_det.losses import factor_transfer_loss
from kd_det.losses.numerics import add_up
from kd_det.registry import KD_HEAD_REGISTRY
from kd_det.signals import Batch, Signals


@KD_HEAD_REGISTRY.register()
class FactorTransferHead(nn.Module):
    """Compares the student's translated features with a compact paraphrase of the teacher's.

    Factor transfer (Kim et al., NeurIPS 2018, https://arxiv.org/abs/1802.04977). A stage before the run trains the
    paraphraser, an auto-encoder, to reconstruct the teacher's features. In the run the paraphraser is frozen, and a
    translator turns the student's features into a factor that is compared with the teacher's: the loss is the mean
    absolute difference of the two, each of unit length per image (or box), summed over features. As in the published
    code, encoder and translator are three 3x3 convolutions and the decoder is three transposed ones, each followed by a
    leaky ReLU (0.1). Every feature has a paraphraser and a translator of its own.

    The mean falls with the size of the map. "map_invariant" multiplies it by the square root of the factor's number of
    elements (weight 11); "code" leaves it as published (weight 500 on CIFAR).

    Args:
        features: Maps each compared feature, a map of the backbone or ``roi_features``, to its description.
        boxes: Compare ``roi_features`` of at most this many sampled boxes per image, foreground first; 0 compares all
            of them.
        norm: Normalisation between convolution and leaky ReLU: "" (none, published code), "BN", "SyncBN", "GN" or "LN".
        scale: "map_invariant" or "code".
        reconstruction: Loss of the paraphraser in the stage before the run: "l1" (published code) or "l2" (paper).
    """

    config: ClassVar[dict[str, Any]] = {
        "WEIGHT": 11.0,
        # Feature maps of the backbone, or roi_features, the features of the sampled boxes.
        "IN_FEATURES": ["roi_features"],
        # Compare roi_features of at most this many sampled boxes per image, foreground first; 0 compares all of them,
        # which costs as much as a small student.
        "BOXES": 48,
        # Channels of the factor, as a share of the teacher's channels: the paraphrase rate k of the paper.
        "FACTOR_RATE": 0.5,
        # Normalisation in paraphraser and translator: "" (published code), BN, SyncBN, GN or LN.
        "NORM": "",
        # "map_invariant": equally strong at every map size. "code": the published mean, which gets weaker with the
        # square root of the factor's number of elements (weight 500 on CIFAR).
        "SCALE": "map_invariant",
        # Loss of the paraphraser's reconstruction: "l1" (published code) or "l2" (paper).
        "RECONSTRUCTION": "l1",
    }

    pretrained = ("paraphrasers",)
    pretrains_student = False

    @configurable
    def __init__(
        self,
        *,
        features: Mapping[str, Feature],
        boxes: int = config["BOXES"],
        norm: str = config["NORM"],
        scale: str = config["SCALE"],
        reconstruction: str = config["RECONSTRUCTION"],
    ):
        super().__init__()
        self.features = dict(features)
        self.boxes = boxes
        self.scale = scale
        self.reconstruction = reconstruction
        self.signals = tuple(features)
        self.pretrain_signals = ()
        self.pretrain_teacher_signals = self.signals
        self.paraphrasers, self.translators = nn.ModuleDict(), nn.ModuleDict()
        for name, (student, teacher, factor, _) in features.items():
            self.paraphrasers[name] = AutoEncoder(
                build_coder(teacher, factor, norm=norm),
                build_coder(factor, teacher, norm=norm, convolution=nn.ConvTranspose2d),
            )
            self.translators[name] = build_coder(student, factor, norm=norm)

    @classmethod
    def from_config(cls, cfg, student_spec, teacher_spec) -> dict:
        node = cfg.KD.FACTOR_TRANSFER
        features = check_factor_options("KD.FACTOR_TRANSFER", node, student_spec, teacher_spec)
        channels = [c for feature in features.values() for c in feature[:3]]
        check_norm(cfg, "FACTOR_TRANSFER", channels, allowed=("", *NORMS))
        return {
            "features": features,
            "boxes": node.BOXES,
            "norm": node.NORM,
            "scale": node.SCALE,
            "reconstruction": node.RECONSTRUCTION,
        }

    def pretrain(self, student: Signals, teacher: Signals, batch: Batch) -> dict[str, Tensor]:
        loss = reconstruction_loss(self.paraphrasers, self.features, teacher, batch, kind=self.reconstruction)
        return {"loss_kd_factor_transfer_reconstruct": loss}

    def forward(self, student: Signals, teacher: Signals, batch: Batch) -> dict[str, Tensor]:
        student, teacher = first_boxes(self.boxes, student, teacher)
        losses = []
        for name, feature in self.features.items():
            mask = valid_cells(batch, student[name], feature.stride)
            with torch.no_grad():
                target = encode(self.paraphrasers.get_submodule(f"{name}.encoder"), teacher[name], mask)
            factor = encode(self.translators[name], student[name], mask)
            losses.append(rescale(factor_transfer_loss(factor, target), factor, mask, kind="ft", scale=self.scale))
        return {"loss_kd_factor_transfer": add_up(losses)}
