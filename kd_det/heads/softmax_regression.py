"""Implements softmax regression: the teacher's classifier gives the same logits for the features of both networks."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from torch import Tensor, nn

from kd_det.errors import InputError, check_choice
from kd_det.heads.build import check_signals
from kd_det.heads.connectors import build_connector
from kd_det.heads.norms import build_norm, check_norm
from kd_det.losses import feature_matching_loss, softmax_regression_loss
from kd_det.losses.numerics import cast_for_layers, cast_up, without_float16
from kd_det.registry import KD_HEAD_REGISTRY
from kd_det.signals import Batch, Signals

KINDS = ("mse", "ce")
# Signals that enter a classifier.
VECTORS = ("roi_box_features", "pooled")


@KD_HEAD_REGISTRY.register()
class SoftmaxRegressionHead(nn.Module):
    """Passes the student's features through the teacher's classifier, and compares features and logits.

    Softmax regression representation learning (SRRL, Yang et al., ICLR 2021,
    https://openreview.net/forum?id=ZzwDy_wiWv). A connector (1x1 convolution, norm, ReLU; on vectors the convolution is
    a linear layer) brings the student's feature to the teacher's width. Its mean over cells is compared with the input
    of the teacher's classifier, and then goes through that classifier, which stays frozen, for a comparison of logits.
    The labelled classes of student and teacher may differ.

    In an image classifier the student's feature is its last map and the teacher's is ``pooled``, as published. In an
    R-CNN both are the input of the box predictor, on the same boxes.

    Args:
        in_feature: Name of the student's feature.
        in_channels: Number of its channels, C.
        out_channels: Number of channels of the teacher's feature, D.
        teacher_signals: Names of the teacher's feature (N, D), its logits (N, K), and weight (K, D) and bias (K,) of
            the layer between them.
        norm: Normalisation in the connector: "BN" (published code), "SyncBN", or "GN" or "LN", which do not depend on
            the share of background among the boxes.
        kind: "mse" of the logits (published code), or "ce", the cross-entropy with the teacher's probabilities.
        temperature: Temperature of "ce".
        feature_weight: Factor of the features' loss.
        logit_weight: Factor of the logits' loss.
    """

    config: ClassVar[dict[str, Any]] = {
        "WEIGHT": 1.0,
        # The student's feature: roi_box_features in an R-CNN; the last map, such as res5, in an image classifier.
        "IN_FEATURE": "roi_box_features",
        # Normalisation between the student's feature and the teacher's classifier: BN (published), SyncBN, GN or LN.
        "NORM": "BN",
        # Comparison of logits: "mse" (published code), or "ce", cross-entropy with the teacher's probabilities.
        "KIND": "mse",
        # Divides the logits of both networks, for "ce" only.
        "TEMPERATURE": 1.0,
        # Factor of the comparison of features, before the teacher's classifier: alpha of the paper.
        "FEATURE_WEIGHT": 1.0,
        # Factor of the comparison of logits, after it: beta of the paper.
        "LOGIT_WEIGHT": 1.0,
    }

    @configurable
    def __init__(
        self,
        *,
        in_feature: str,
        in_channels: int,
        out_channels: int,
        teacher_signals: Sequence[str],
        norm: str = config["NORM"],
        kind: str = config["KIND"],
        temperature: float = config["TEMPERATURE"],
        feature_weight: float = config["FEATURE_WEIGHT"],
        logit_weight: float = config["LOGIT_WEIGHT"],
    ):
        super().__init__()
        self.signals = (in_feature,)
        self.teacher_signals = tuple(teacher_signals)
        self.kind = kind
        self.temperature = temperature
        self.feature_weight = feature_weight
        self.logit_weight = logit_weight
        self.connector = build_connector(in_channels, out_channels, msra=True)
        self.norm = build_norm(norm, out_channels)

    @classmethod
    def from_config(cls, cfg, student_spec, teacher_spec) -> dict:
        node, key = cfg.KD.SOFTMAX_REGRESSION, "KD.SOFTMAX_REGRESSION"
        name = node.IN_FEATURE
        feature, logits = ("roi_box_features", "roi_logits") if name.startswith("roi_") else ("pooled", "logits")
        teacher_signals = (feature, logits, f"{logits}_weight", f"{logits}_bias")
        check_signals(f"{key}.IN_FEATURE", [name], student_spec, teacher_spec, teacher_signals)
        if name not in VECTORS and student_spec[name].stride is None:
            raise InputError(
                f"{key}.IN_FEATURE: {name!r} cannot enter a classifier; allowed are {', '.join(VECTORS)} and the "
                "feature maps of a classifier's backbone."
            )
        check_choice(f"{key}.KIND", node.KIND, KINDS)
        if node.TEMPERATURE <= 0 or (node.KIND == "mse" and node.TEMPERATURE != 1):
            raise InputError(
                f"{key}.TEMPERATURE: must be above 0, and 1 with KIND 'mse', which has none; got {node.TEMPERATURE}."
            )
        check_norm(cfg, "SOFTMAX_REGRESSION", [teacher_spec[feature].channels])
        for option in ("FEATURE_WEIGHT", "LOGIT_WEIGHT"):
            if node[option] < 0:
                raise InputError(f"{key}.{option}: must be 0 or more, got {node[option]}.")
        return {
            "in_feature": name,
            "in_channels": student_spec[name].channels,
            "out_channels": teacher_spec[feature].channels,
            "teacher_signals": teacher_signals,
            "norm": node.NORM,
            "kind": node.KIND,
            "temperature": node.TEMPERATURE,
            "feature_weight": node.FEATURE_WEIGHT,
            "logit_weight": node.LOGIT_WEIGHT,
        }

    def forward(self, student: Signals, teacher: Signals, batch: Batch) -> dict[str, Tensor]:
        feature, t_logits, weight, bias = (cast_up(teacher[name].detach()) for name in self.teacher_signals)
        connected = self.connect(student[self.signals[0]])
        with torch.autocast(connected.device.type, enabled=False):
            s_logits = F.linear(connected, weight, bias)
        return {
            "loss_kd_softmax_regression_feature": self.feature_weight * feature_matching_loss(connected, feature),
            "loss_kd_softmax_regression_logits": self.logit_weight
            * softmax_regression_loss(s_logits, t_logits, kind=self.kind, temperature=self.temperature),
        }

    def connect(self, x: Tensor) -> Tensor:
        """Brings the student's feature (N, C) or (N, C, H, W) to the form of the teacher's, (N, D)."""
        x = x if x.dim() == 4 else x[:, :, None, None]
        with without_float16(x.device.type):
            x = self.connector(cast_for_layers(x))
        return self.norm(cast_up(x)).relu().mean(dim=(2, 3))
