"""Implements the taps of RetinaNet and FCOS."""

from collections.abc import Collection
from contextlib import ExitStack
from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec, cat
from detectron2.modeling.meta_arch.dense_detector import DenseDetector, permute_to_N_HWA_K
from detectron2.modeling.meta_arch.fcos import FCOS
from detectron2.modeling.meta_arch.retinanet import RetinaNet, RetinaNetHead
from torch import Tensor, nn

from kd_det.registry import TAP_REGISTRY
from kd_det.signals import Signals
from kd_det.taps.backbone import BackboneTap, hook
from kd_det.taps.rcnn import check_anchors, check_box_weights, record_anchors


class DenseTap(BackboneTap):
    """Taps the backbone and the predictions of a model whose ``head`` predicts densely on each level."""

    model: DenseDetector

    @classmethod
    def head_defaults(cls, cfg: CfgNode) -> dict[str, Any]:
        return {"SOURCES": ["dense"]}

    @property
    def predictions(self) -> dict[str, tuple[int, int]]:
        """Maps each signal to its place in what the head returns and to its numbers per anchor."""
        raise NotImplementedError

    def spec(self) -> dict[str, ShapeSpec]:
        return super().spec() | {name: ShapeSpec(channels=width) for name, (_, width) in self.predictions.items()}

    @property
    def cut_signals(self) -> Collection[str]:
        return self.predictions.keys()

    def check_alignment(self, teacher: BackboneTap, names) -> None:
        super().check_alignment(teacher, names)
        if any(name.startswith("dense_") for name in names):
            check_anchors(self.model.get_submodule("anchor_generator"), teacher.model.get_submodule("anchor_generator"))

    def class_layers(self) -> list[nn.Module]:
        return [self.model.head.cls_score]

    def attach(self, stack: ExitStack, signals: Signals, names: set[str]) -> None:
        super().attach(stack, signals, names)
        wanted = {name: place for name, place in self.predictions.items() if name in names}
        if wanted:
            hook(
                stack,
                self.model.head,
                lambda _, out: signals.update(
                    {name: self._flatten(out[place], width) for name, (place, width) in wanted.items()}
                ),
            )
        if any(name.startswith("dense_") for name in names):
            record_anchors(stack, self.model, "dense", signals)

    def _flatten(self, levels: list[Tensor], width: int) -> Tensor:
        """Concatenates the predictions on all levels as (N, anchors, width)."""
        strides = self.model.get_submodule("anchor_generator").strides
        cut = [self.cut(level, stride) for level, stride in zip(levels, strides, strict=True)]
        return cat([permute_to_N_HWA_K(x, width) for x in cut], dim=1)

    def run(self, features: dict[str, Tensor], names: set[str], student: Signals) -> None:
        if any(name.startswith("dense_") and not name.endswith(("_weight", "_bias")) for name in names):
            self.model.head([features[f] for f in self.model.head_in_features])


@TAP_REGISTRY.register()
class FCOSTap(DenseTap):
    """Taps the backbone and the dense head of an ``FCOS``.

    Its one anchor per cell is a square whose side is the cell's. For boxes it predicts no deltas but the distances from
    the centre of the cell to the sides, in cells.
    """

    model: FCOS

    @property
    def predictions(self) -> dict[str, tuple[int, int]]:
        return {
            "dense_logits": (0, self.model.num_classes),
            "dense_distances": (1, 4),
            "dense_centerness": (2, 1),
        }


@TAP_REGISTRY.register()
class RetinaNetTap(DenseTap):
    """Taps the backbone and the dense head of a ``RetinaNet``.

    Each of the head's two branches, one for classes and one for boxes, is a row of convolutions with a ReLU after each,
    and a predictor. The branch's hidden maps are what enters its last convolution. They are signals, and so are the
    parameters of the two layers that follow, unless the branches have norms.
    """

    model: RetinaNet

    @classmethod
    def feature_levels(cls, cfg: CfgNode) -> list[str]:
        return list(cfg.MODEL.RETINANET.IN_FEATURES)

    @property
    def predictions(self) -> dict[str, tuple[int, int]]:
        return {"dense_logits": (0, self.model.num_classes), "dense_deltas": (1, 4)}

    def spec(self) -> dict[str, ShapeSpec]:
        spec = super().spec()
        for branch, convolution in self._last_convolutions.items():
            spec |= {name: ShapeSpec(channels=convolution.in_channels) for name in self._hidden_names(branch)}
        for name, layer in self._last_layers.items():
            spec[f"{name}_weight"] = ShapeSpec(channels=layer.in_channels)
            spec[f"{name}_bias"] = ShapeSpec(channels=layer.out_channels)
        return spec

    def check_alignment(self, teacher: BackboneTap, names) -> None:
        super().check_alignment(teacher, names)
        if any(name.startswith(("dense_deltas", "dense_box_")) for name in names):
            check_box_weights("MODEL.RETINANET.BBOX_REG_WEIGHTS", self.model, teacher.model)

    def strides(self) -> dict[str, int]:
        shapes = self.backbone.output_shape()
        hidden = {
            name: shapes[level].stride
            for branch in self._last_convolutions
            for name, level in zip(self._hidden_names(branch), self.model.head_in_features, strict=True)
        }
        return super().strides() | hidden

    @property
    def _last_convolutions(self) -> dict[str, nn.Conv2d]:
        """Maps each branch of the head to its last convolution; empty if the branches have norms or no convolution."""
        head = self.model.head
        if not isinstance(head, RetinaNetHead):
            return {}
        branches = {"cls": list(head.cls_subnet), "box": list(head.bbox_subnet)}
        if any(not isinstance(x, nn.Conv2d | nn.ReLU) for layers in branches.values() for x in layers):
            return {}
        return {branch: layers[-2] for branch, layers in branches.items() if layers}

    @property
    def _last_layers(self) -> dict[str, nn.Conv2d]:
        """Maps the names of the layers that follow the hidden maps to these layers; convolutions are numbered."""
        convolutions = self._last_convolutions
        if not convolutions:
            return {}
        head = self.model.head
        number = len(head.cls_subnet) // 2
        layers = {f"dense_{branch}_conv{number}": layer for branch, layer in convolutions.items()}
        return layers | {"dense_cls_score": head.cls_score, "dense_bbox_pred": head.bbox_pred}

    def _hidden_names(self, branch: str) -> list[str]:
        return [f"dense_{branch}_hidden_{level}" for level in self.model.head_in_features]

    def attach(self, stack: ExitStack, signals: Signals, names: set[str]) -> None:
        super().attach(stack, signals, names)
        for branch, convolution in self._last_convolutions.items():
            if names.intersection(self._hidden_names(branch)):
                self._attach_hidden(stack, signals, names, branch, convolution)
        for name, layer in self._last_layers.items():
            parameters = {f"{name}_{key}": x for key, x in layer.named_parameters()}
            signals.update({key: x for key, x in parameters.items() if key in names})

    def _attach_hidden(
        self, stack: ExitStack, signals: Signals, names: set[str], branch: str, convolution: nn.Conv2d
    ) -> None:
        """Records the hidden maps of a branch, which runs on one level after the other."""
        maps: list[Tensor] = []

        def store(*_) -> None:
            levels = zip(self._hidden_names(branch), maps, strict=True)
            signals.update({name: x for name, x in levels if name in names})
            maps.clear()

        hook(stack, convolution, lambda args, _: maps.append(args[0]))
        hook(stack, self.model.head, store)
