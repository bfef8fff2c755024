"""Makes torchvision's DenseNet a backbone for images of 32 pixels."""

import torch.nn.functional as F
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling import Backbone
from fvcore.nn.weight_init import c2_msra_fill
from torch import Tensor, nn
from torchvision.models import DenseNet

from kd_det.errors import InputError

# Maps the networks of born-again networks to the dense layers per block, the growth rate, and whether the channels are
# halved behind the last block, too.
DENSENETS = {
    "densenet_112_33": (17, 33, False),
    "densenet_90_60": (14, 60, True),
    "densenet_80_80": (12, 80, True),
    "densenet_80_120": (12, 120, True),
}
BLOCKS = ("res2", "res3", "res4")


class CifarDenseNet(Backbone):
    """Implements DenseNet-BC for CIFAR (Huang et al., 2017, https://arxiv.org/abs/1608.06993, section 3).

    Its dense blocks and transitions are torchvision's; the stem is a 3x3 convolution at full resolution to twice the
    growth rate.

    Born-again networks (Furlanello et al., 2018, https://arxiv.org/abs/1805.04770) are named by depth and growth rate,
    but no code is published, and no DenseNet-BC has a depth of 90 or 80. The networks here are those that have the
    published numbers of parameters, to half a percent: the one of 6.3 million is of depth 106, as the paper calls it in
    one place; those of 16.1, 22.4 and 50.4 million have as many layers per block as fit into the depth, and halve the
    channels at the end of each stage, as the paper says, and so behind the last block, too.

    The outputs are ``pooled`` and the blocks, whose maps are not normalised.

    Attributes:
        preactivations: Maps the name of each block to the normalisation after it, whose output goes into a ReLU.

    Args:
        layers: Number of dense layers per block.
        growth_rate: Number of channels that each dense layer adds.
        halve_last: Whether the channels are halved behind the last block.
        in_channels: Number of channels of the image.
    """

    def __init__(self, layers: int, growth_rate: int, *, halve_last: bool, in_channels: int):
        super().__init__()
        channels = 2 * growth_rate
        # An empty block at the end makes torchvision add a transition before it.
        blocks = (layers, layers, layers, *([0] if halve_last else []))
        parts = DenseNet(growth_rate, blocks, channels, num_classes=1).features  # type: ignore[arg-type]
        self.stem = Conv2d(in_channels, channels, 3, padding=1, bias=False)
        c2_msra_fill(self.stem)
        self._shapes = {}
        self.transitions = nn.ModuleDict()
        for i, name in enumerate(BLOCKS):
            self.add_module(name, parts.get_submodule(f"denseblock{i + 1}"))
            channels += layers * growth_rate
            self._shapes[name] = ShapeSpec(channels=channels, stride=2**i)
            if name != "res4" or halve_last:
                self.transitions[name] = transition = parts.get_submodule(f"transition{i + 1}")
                transition.get_submodule("relu").inplace = False  # Else it overwrites the preactivation.
                channels //= 2
        if halve_last:
            self.transitions["res4"].pool = nn.Identity()
        self.norm = parts.get_submodule("norm5")
        self._shapes["pooled"] = ShapeSpec(channels=channels)

    @property
    def preactivations(self) -> dict[str, nn.Module]:
        norms = {name: transition.get_submodule("norm") for name, transition in self.transitions.items()}
        return {"res4": self.norm} | norms

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x, features = self.stem(x), {}
        for name in BLOCKS:
            features[name] = x = self.get_submodule(name)(x)
            if name in self.transitions:
                x = self.transitions[name](x)
        features["pooled"] = F.relu(self.norm(x)).mean(dim=(2, 3))
        return features

    def output_shape(self) -> dict[str, ShapeSpec]:
        return self._shapes


def build_densenet(name: str, *, in_channels: int, norm: str) -> CifarDenseNet:
    """Builds a network of :data:`DENSENETS`.

    Raises:
        InputError: If another normalisation than torchvision's is asked for.
    """
    if norm != "BN":
        raise InputError(f"MODEL.RESNETS.NORM: got {norm!r}; of {name} only BN is allowed.")
    layers, growth_rate, halve_last = DENSENETS[name]
    return CifarDenseNet(layers, growth_rate, halve_last=halve_last, in_channels=in_channels)
