"""Builds the networks for CIFAR that distillation papers use, as backbones of image classifiers."""

import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import CNNBlockBase, Conv2d, ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, ResNet
from detectron2.modeling.backbone.resnet import BasicBlock
from fvcore.nn.weight_init import c2_msra_fill
from torch import Tensor, nn

from kd_det.classification.densenet import DENSENETS, build_densenet
from kd_det.classification.network_in_network import WIDTHS, NetworkInNetwork
from kd_det.errors import InputError

# Number of blocks per stage, and number of channels of the stem and of each stage.
RESNETS = {
    **{f"resnet{depth}": ((depth - 2) // 6, (16, 16, 32, 64)) for depth in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet{depth}x4": ((depth - 2) // 6, (32, 64, 128, 256)) for depth in (8, 32)},
}
# Depth and width.
WRN = ((16, 1), (16, 2), (40, 1), (40, 2), (10, 1), (10, 4), (16, 4), (22, 4))
WIDE_RESNETS = {f"wrn_{depth}_{width}": ((depth - 4) // 6, width) for depth, width in WRN}


class CifarStem(CNNBlockBase):
    """Applies a 3x3 convolution at full resolution, a normalisation and a ReLU."""

    def __init__(self, in_channels: int, out_channels: int, *, norm: str = "BN"):
        super().__init__(in_channels, out_channels, 1)
        self.conv1 = Conv2d(
            in_channels, out_channels, 3, padding=1, bias=False, norm=get_norm(norm, out_channels), activation=F.relu_
        )
        c2_msra_fill(self.conv1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv1(x)


class PaddingShortcut(nn.Module):
    """Subsamples the cells by the stride and pads the channels with zeros on both sides, without parameters."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int):
        super().__init__()
        self.extra = out_channels - in_channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        before = self.extra // 2
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.extra - before))


class PaddingBlock(BasicBlock):
    """Replaces the shortcut of Detectron2's basic block by one without parameters (He et al., 2016, option A)."""

    shortcut: nn.Module | None

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1, norm: str = "BN"):
        super().__init__(in_channels, out_channels, stride=stride, norm=norm)
        if self.shortcut is not None:
            self.shortcut = PaddingShortcut(in_channels, out_channels, stride=stride)


def build_cifar_resnet(name: str, *, in_channels: int, norm: str, shortcut: str) -> ResNet:
    """Builds a ResNet for images of 32 pixels (He et al., 2016, https://arxiv.org/abs/1512.03385, section 4.2).

    Names with ``x4`` are the wider networks of Tian et al. (2020, https://arxiv.org/abs/1910.10699).
    """
    blocks, (stem_channels, *widths) = RESNETS[name]
    block = {"projection": BasicBlock, "padding": PaddingBlock}.get(shortcut)
    if block is None:
        raise InputError(f"MODEL.CIFAR.SHORTCUT: got {shortcut!r}; allowed are projection, padding.")
    stages, channels = [], stem_channels
    for i, width in enumerate(widths):
        strides = [1 if i == 0 else 2] + [1] * (blocks - 1)
        stages.append(
            ResNet.make_stage(
                block, blocks, stride_per_block=strides, in_channels=channels, out_channels=width, norm=norm
            )
        )
        channels = width
    return ResNet(CifarStem(in_channels, stem_channels, norm=norm), stages, out_features=["res2", "res3", "res4"])


class PreActivationBlock(nn.Module):
    """Applies two 3x3 convolutions, each after a normalisation and a ReLU.

    A shortcut that changes the number of channels starts after the first ReLU.
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int, norm: str):
        super().__init__()
        self.norm1 = get_norm(norm, in_channels)
        self.conv1 = Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.norm2 = get_norm(norm, out_channels)
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        grows = in_channels != out_channels
        self.shortcut = Conv2d(in_channels, out_channels, 1, stride=stride, bias=False) if grows else None
        for conv in filter(None, (self.conv1, self.conv2, self.shortcut)):
            c2_msra_fill(conv)

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.norm1(x))
        out = self.conv2(F.relu(self.norm2(self.conv1(activated))))
        return out + (x if self.shortcut is None else self.shortcut(activated))


class WideResNet(Backbone):
    """Implements a wide residual network (Zagoruyko & Komodakis, 2016, https://arxiv.org/abs/1605.07146).

    Its outputs are ``pooled`` and the sums at the end of each stage, which the distillation papers use.

    Attributes:
        preactivations: Maps the name of each stage to the normalisation after it, whose output goes into a ReLU.

    Args:
        blocks: Number of blocks per stage.
        width: Factor that multiplies the channels 16, 32, 64.
        in_channels: Number of channels of the image.
        norm: Normalisation.
    """

    def __init__(self, blocks: int, width: int, *, in_channels: int, norm: str = "BN"):
        super().__init__()
        self.stem = Conv2d(in_channels, 16, 3, padding=1, bias=False)
        c2_msra_fill(self.stem)
        channels = 16
        self._shapes = {}
        for i, name in enumerate(("res2", "res3", "res4")):
            out_channels = 16 * width * 2**i
            stage = [
                PreActivationBlock(channels if j == 0 else out_channels, out_channels, stride=stride, norm=norm)
                for j, stride in enumerate([1 if i == 0 else 2] + [1] * (blocks - 1))
            ]
            self.add_module(name, nn.Sequential(*stage))
            self._shapes[name] = ShapeSpec(channels=out_channels, stride=2**i)
            channels = out_channels
        self.norm = get_norm(norm, channels)
        self._shapes["pooled"] = ShapeSpec(channels=channels)

    @property
    def preactivations(self) -> dict[str, nn.Module]:
        return {"res2": self.res3[0].norm1, "res3": self.res4[0].norm1, "res4": self.norm}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = {"stem": self.stem(x)}
        for name, before in (("res2", "stem"), ("res3", "res2"), ("res4", "res3")):
            features[name] = getattr(self, name)(features[before])
        features["pooled"] = F.relu(self.norm(features["res4"])).mean(dim=(2, 3))
        return {name: features[name] for name in self._shapes}

    def output_shape(self) -> dict[str, ShapeSpec]:
        return self._shapes


@BACKBONE_REGISTRY.register()
def build_cifar_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """Builds the network that ``MODEL.CIFAR`` names; ``MODEL.RESNETS.NORM`` is its normalisation."""
    name = cfg.MODEL.CIFAR.NAME
    options = {"in_channels": input_shape.channels, "norm": cfg.MODEL.RESNETS.NORM}
    if name in RESNETS:
        return build_cifar_resnet(name, shortcut=cfg.MODEL.CIFAR.SHORTCUT, **options)
    if name in WIDE_RESNETS:
        return WideResNet(*WIDE_RESNETS[name], **options)
    if name in WIDTHS:
        return NetworkInNetwork(WIDTHS[name], dropout=cfg.MODEL.CIFAR.DROPOUT, **options)
    if name in DENSENETS:
        return build_densenet(name, **options)
    allowed = ", ".join([*RESNETS, *WIDE_RESNETS, *WIDTHS, *DENSENETS])
    raise InputError(f"MODEL.CIFAR.NAME: got {name!r}; allowed are {allowed}.")
