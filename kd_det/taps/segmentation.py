"""Implements the taps of models with a head for semantic segmentation."""

from contextlib import ExitStack
from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import PanopticFPN, SemanticSegmentor
from detectron2.modeling.meta_arch.semantic_seg import SemSegFPNHead
from detectron2.structures import ImageList
from torch import Tensor, nn

from kd_det.registry import TAP_REGISTRY
from kd_det.signals import Signals
from kd_det.taps.backbone import BackboneTap, wrap
from kd_det.taps.rcnn import GeneralizedRCNNTap, check_equal


class SegmentationTap(BackboneTap):
    """Taps the ``sem_seg_head`` of a model: a ``SemSegFPNHead``, or one with the same methods and predictor."""

    model: SemanticSegmentor | PanopticFPN

    def spec(self) -> dict[str, ShapeSpec]:
        spec = super().spec()
        if self._has_segments:
            spec["sem_seg_logits"] = ShapeSpec(channels=self._head.predictor.out_channels)
        return spec

    def strides(self) -> dict[str, int]:
        stride = getattr(self._head, "common_stride", None)
        return super().strides() | ({"sem_seg_logits": stride} if self._has_segments and stride else {})

    def check_alignment(self, teacher: BackboneTap, names) -> None:
        super().check_alignment(teacher, names)
        if "sem_seg_logits" in names:
            strides = [getattr(tap.model.sem_seg_head, "common_stride", None) for tap in (self, teacher)]
            check_equal("MODEL.SEM_SEG_HEAD.COMMON_STRIDE", "segmentations", strides)

    @property
    def _head(self) -> SemSegFPNHead:
        return self.model.sem_seg_head

    @property
    def _has_segments(self) -> bool:
        return all(hasattr(self._head, name) for name in ("layers", "losses", "predictor", "ignore_value"))

    @property
    def _class_layer(self) -> nn.Module:
        """Returns the module that holds the weights of the classes."""
        return self._head.predictor if self._has_segments else self._head

    def attach(self, stack: ExitStack, signals: Signals, names: set[str]) -> None:
        super().attach(stack, signals, names)
        if "sem_seg_logits" in names:
            wrap(stack, self._head, "layers", lambda _, out: signals.update(sem_seg_logits=out))
            wrap(stack, self._head, "losses", lambda args, _: signals.update(sem_seg_labels=self._labels(args[1])))

    def _labels(self, targets: Tensor) -> Tensor:
        """Marks ignored pixels, of which padding is a part, by -1."""
        return targets.masked_fill(targets == self._head.ignore_value, -1)

    def run(self, features: dict[str, Tensor], names: set[str], student: Signals) -> None:
        super().run(features, names, student)
        if "sem_seg_logits" in names:
            self._head.layers(features)


@TAP_REGISTRY.register()
class SemanticSegmentorTap(SegmentationTap):
    """Taps the backbone and the head of a ``SemanticSegmentor``."""

    @classmethod
    def feature_levels(cls, cfg: CfgNode) -> list[str]:
        return list(cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES)

    @classmethod
    def head_defaults(cls, cfg: CfgNode) -> dict[str, Any]:
        return {"SOURCES": ["sem_seg"]}

    def class_layers(self) -> list[nn.Module]:
        return [self._class_layer]

    def preprocess(self, batched_inputs: list[dict]) -> ImageList:
        # The model has no method for it.
        model, backbone = self.model, self.backbone
        images = [(x["image"].to(model.device) - model.pixel_mean) / model.pixel_std for x in batched_inputs]
        return ImageList.from_tensors(
            images, backbone.size_divisibility, padding_constraints=backbone.padding_constraints
        )


@TAP_REGISTRY.register()
class PanopticFPNTap(SegmentationTap, GeneralizedRCNNTap):
    """Taps the R-CNN and the head for semantic segmentation of a ``PanopticFPN``."""

    def class_layers(self) -> list[nn.Module]:
        return [*super().class_layers(), self._class_layer]
