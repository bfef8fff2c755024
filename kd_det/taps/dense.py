"""Implements the tap of RetinaNet."""

from contextlib import ExitStack
from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec, cat
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from torch import Tensor

from kd_det.registry import TAP_REGISTRY
from kd_det.signals import Signals
from kd_det.taps.backbone import BackboneTap, hook
from kd_det.taps.rcnn import check_anchors


@TAP_REGISTRY.register()
class RetinaNetTap(BackboneTap):
    """Taps the backbone and the dense head of a ``RetinaNet``."""

    @classmethod
    def feature_levels(cls, cfg: CfgNode) -> list[str]:
        return list(cfg.MODEL.RETINANET.IN_FEATURES)

    @classmethod
    def head_defaults(cls, cfg: CfgNode) -> dict[str, Any]:
        return {"SOURCES": ["dense"]}

    def spec(self) -> dict[str, ShapeSpec]:
        return super().spec() | {
            "dense_logits": ShapeSpec(channels=self.model.num_classes),
            "dense_deltas": ShapeSpec(channels=4),
        }

    def check_alignment(self, teacher: BackboneTap, names) -> None:
        super().check_alignment(teacher, names)
        if any(name.startswith("dense_") for name in names):
            check_anchors(self.model.anchor_generator, teacher.model.anchor_generator)

    def attach(self, stack: ExitStack, signals: Signals, names: set[str]) -> None:
        super().attach(stack, signals, names)
        channels = {"dense_logits": self.model.num_classes, "dense_deltas": 4}
        wanted = {name: i for i, name in enumerate(channels) if name in names}
        if wanted:
            hook(
                stack,
                self.model.head,
                lambda _, out: signals.update(
                    {n: cat([permute_to_N_HWA_K(x, channels[n]) for x in out[i]], dim=1) for n, i in wanted.items()}
                ),
            )

    def run(self, features: dict[str, Tensor], names: set[str], student: Signals) -> None:
        if names & {"dense_logits", "dense_deltas"}:
            self.model.head([features[f] for f in self.model.head_in_features])
