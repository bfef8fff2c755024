"""Makes any network of the timm library the backbone of an image classifier."""

from typing import Any, Protocol, cast

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn

from kd_det.errors import InputError
from kd_det.timm_models import create_resizable_timm_model


class LinearClassifier(Protocol):
    """Describes the networks of timm that end with one linear layer behind feature maps."""

    feature_info: list[dict[str, Any]]

    def get_classifier(self) -> nn.Linear: ...

    def reset_classifier(self, num_classes: int) -> None: ...

    def forward_intermediates(self, x: Tensor, indices: list[int]) -> tuple[Tensor, list[Tensor]]: ...

    def forward_head(self, x: Tensor, pre_logits: bool) -> Tensor: ...


class TimmClassifierBackbone(Backbone):
    """Wraps a network of the timm library without its linear layer; ``pooled`` is the input of that layer.

    Feature maps are named by their stride, from ``res2`` (4) to ``res5`` (32), and ``res1`` (2) if it exists.

    Args:
        name: timm's name of the network.
        pretrained: Whether to start from timm's weights, including the linear layer if the number of classes matches.
        num_classes: Number of outputs of the linear layer.
        in_channels: Number of channels of the image.
        size: Height and width of the image.
    """

    def __init__(self, name: str, *, pretrained: bool, num_classes: int, in_channels: int, size: int):
        super().__init__()
        net = create_resizable_timm_model(
            name, (size, size), pretrained=pretrained, num_classes=num_classes, in_chans=in_channels
        )
        self.net = cast(LinearClassifier, net)
        if not isinstance(self.net.get_classifier(), nn.Linear) or not hasattr(self.net, "forward_intermediates"):
            raise InputError(f"MODEL.TIMM.NAME: {name!r} does not end with one linear layer behind feature maps.")
        # If several maps have the same stride, the last one is used.
        info = self.net.feature_info
        self._indices = {f"res{x['reduction'].bit_length() - 1}": i for i, x in enumerate(info)}
        self._shapes = {
            name: ShapeSpec(channels=info[i]["num_chs"], stride=info[i]["reduction"])
            for name, i in self._indices.items()
        } | {"pooled": ShapeSpec(channels=self.net.get_classifier().in_features)}

    def detach_linear(self) -> nn.Linear:
        """Removes the linear layer from the network and returns it."""
        linear = self.net.get_classifier()
        self.net.reset_classifier(0)
        return linear

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        last, maps = self.net.forward_intermediates(x, indices=list(self._indices.values()))
        return dict(zip(self._indices, maps, strict=True)) | {"pooled": self.net.forward_head(last, pre_logits=True)}

    def output_shape(self) -> dict[str, ShapeSpec]:
        return self._shapes


@BACKBONE_REGISTRY.register()
def build_timm_classifier_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """Builds the network that ``MODEL.TIMM`` names, for an ``ImageClassifier``."""
    return TimmClassifierBackbone(
        cfg.MODEL.TIMM.NAME,
        pretrained=cfg.MODEL.TIMM.PRETRAINED,
        num_classes=cfg.MODEL.CLASSIFIER.NUM_CLASSES,
        in_channels=input_shape.channels,
        size=cfg.INPUT.CLASSIFICATION.SIZE,
    )
