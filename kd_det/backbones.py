"""Adds backbones that Detectron2 lacks: timm networks, and narrow ResNets of basic blocks."""

from typing import cast

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone, ResNet
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem
from timm.layers import Format, convert_sync_batchnorm, freeze_batch_norm_2d
from timm.models import FeatureInfo
from torch import Tensor

from kd_det.errors import InputError
from kd_det.timm_models import create_resizable_timm_model

BASIC_BLOCKS = {10: (1, 1, 1, 1), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}
# Size of a test image. Detectors pass on images of many sizes, all of them multiples of the 32 that an FPN needs.
PROBE = (64, 96)
STAGES = ("stem", "res2", "res3", "res4", "res5")


class TimmBackbone(Backbone):
    """Wraps a network of the timm library; stages are named by their stride, from ``res2`` (4) to ``res5`` (32).

    Args:
        name: timm's name of the network.
        pretrained: Whether to start from timm's ImageNet weights.
        norm: Replacement of the batch normalisations: "BN", "FrozenBN" or "SyncBN".
        in_channels: Channels of the image.
        out_features: Stages to return.
    """

    def __init__(self, name: str, *, pretrained: bool, norm: str, in_channels: int, out_features: list[str]):
        super().__init__()
        self.net = create_resizable_timm_model(
            name, PROBE, pretrained=pretrained, features_only=True, in_chans=in_channels
        )
        self._channels_last = getattr(self.net, "output_fmt", None) == Format.NHWC
        info = cast(FeatureInfo, self.net.feature_info)
        stages = {
            f"res{reduction.bit_length() - 1}": (i, ShapeSpec(channels=channels, stride=reduction))
            for i, (channels, reduction) in enumerate(zip(info.channels(), info.reduction(), strict=True))
        }
        missing = [feature for feature in out_features if feature not in stages]
        if missing:
            raise InputError(f"MODEL.FPN.IN_FEATURES: {name} has no {', '.join(missing)}; it has {', '.join(stages)}.")
        self._stages = {feature: stages[feature] for feature in out_features}
        if norm not in NORMS:
            raise InputError(f"MODEL.TIMM.NORM: got {norm!r}; allowed are {', '.join(NORMS)}.")
        self.net = NORMS[norm](self.net)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.net(x)
        if self._channels_last:
            features = [feature.permute(0, 3, 1, 2).contiguous() for feature in features]
        return {name: features[i] for name, (i, _) in self._stages.items()}

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {name: shape for name, (_, shape) in self._stages.items()}


# These conversions are timm's own: its normalisations may include the activation, which the conversions of torch and
# Detectron2 would drop.
NORMS = {"BN": lambda net: net, "FrozenBN": freeze_batch_norm_2d, "SyncBN": convert_sync_batchnorm}


@BACKBONE_REGISTRY.register()
def build_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """Builds the network that ``MODEL.TIMM`` names, with an FPN as ``MODEL.FPN`` describes it."""
    bottom_up = TimmBackbone(
        cfg.MODEL.TIMM.NAME,
        pretrained=cfg.MODEL.TIMM.PRETRAINED,
        norm=cfg.MODEL.TIMM.NORM,
        in_channels=input_shape.channels,
        out_features=cfg.MODEL.FPN.IN_FEATURES,
    )
    return add_fpn(cfg, bottom_up)


@BACKBONE_REGISTRY.register()
def build_basic_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """Builds an FPN on a ResNet of basic blocks and any width, for small data; Detectron2's own must be 64 wide.

    It reads these keys of ``MODEL.RESNETS``: DEPTH (10, 18 or 34), STEM_OUT_CHANNELS, RES2_OUT_CHANNELS (doubled at
    each later stage) and NORM.
    """
    node = cfg.MODEL.RESNETS
    if node.DEPTH not in BASIC_BLOCKS:
        raise InputError(
            f"MODEL.RESNETS.DEPTH: got {node.DEPTH}; allowed here are {', '.join(map(str, BASIC_BLOCKS))}."
        )
    if not cfg.MODEL.FPN.IN_FEATURES or not set(cfg.MODEL.FPN.IN_FEATURES) <= set(STAGES):
        raise InputError(
            f"MODEL.FPN.IN_FEATURES: got {cfg.MODEL.FPN.IN_FEATURES}; allowed here are {', '.join(STAGES)}."
        )
    stem = BasicStem(input_shape.channels, node.STEM_OUT_CHANNELS, norm=node.NORM)
    stages, channels = [], node.STEM_OUT_CHANNELS
    for i, blocks in enumerate(BASIC_BLOCKS[node.DEPTH]):
        out_channels = node.RES2_OUT_CHANNELS * 2**i
        stages.append(
            ResNet.make_stage(
                BasicBlock,
                blocks,
                stride_per_block=[1 if i == 0 else 2] + [1] * (blocks - 1),
                in_channels=channels,
                out_channels=out_channels,
                norm=node.NORM,
            )
        )
        channels = out_channels
    bottom_up = ResNet(stem, stages, out_features=cfg.MODEL.FPN.IN_FEATURES, freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT)
    return add_fpn(cfg, bottom_up)


def add_fpn(cfg: CfgNode, bottom_up: Backbone) -> FPN:
    """Puts an FPN on a backbone, as in Detectron2's ResNet-FPN."""
    return FPN(
        bottom_up=bottom_up,
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=LastLevelMaxPool(),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
