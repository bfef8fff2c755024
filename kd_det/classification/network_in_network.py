"""Implements networks in networks, the small networks of attention transfer's table on CIFAR-10."""

from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import Backbone
from fvcore.nn.weight_init import c2_msra_fill
from torch import Tensor, nn

# Share of the published channels.
WIDTHS = {"nin_thin": 0.5, "nin_wide": 1.0}
# Maps each stage to the channels and the kernel size of its convolutions. The published network has a tenth one to the
# classes, which equals the linear layer of a classifier behind the mean over cells.
STAGES = {
    "res2": ((192, 5), (160, 1), (96, 1)),
    "res3": ((192, 5), (192, 1), (192, 1)),
    "res4": ((192, 3), (192, 1)),
}


class NetworkInNetwork(Backbone):
    """Implements a network in a network (Lin et al., 2014, https://arxiv.org/abs/1312.4400) with batch norms.

    Layers and pooling are those of S. Zagoruyko's code (github.com/szagoruyko/cifar.torch), who compares "NIN-thin" and
    "NIN-wide" in attention transfer (https://arxiv.org/abs/1612.03928): 0.2 and 1 million parameters. The outputs are
    the three stages, each before the pooling and the dropout that follow it.

    Attributes:
        preactivations: Maps the name of each stage to its last normalisation, whose output goes into a ReLU.

    Args:
        width: Share of the published channels.
        dropout: Probability of dropping a value between stages.
        in_channels: Number of channels of the image.
        norm: Normalisation.
    """

    def __init__(self, width: float, *, dropout: float, in_channels: int, norm: str = "BN"):
        super().__init__()
        self.between = nn.ModuleDict(
            {
                "res3": nn.Sequential(nn.MaxPool2d(3, 2, ceil_mode=True), nn.Dropout(dropout)),
                "res4": nn.Sequential(nn.AvgPool2d(3, 2, ceil_mode=True), nn.Dropout(dropout)),
            }
        )
        self._shapes, channels = {}, in_channels
        for i, (name, convolutions) in enumerate(STAGES.items()):
            layers: list[nn.Module] = []
            for published, size in convolutions:
                out_channels = round(width * published)
                conv = Conv2d(channels, out_channels, size, padding=size // 2, bias=False)
                c2_msra_fill(conv)
                layers += [conv, get_norm(norm, out_channels), nn.ReLU()]
                channels = out_channels
            self.add_module(name, nn.Sequential(*layers))
            self._shapes[name] = ShapeSpec(channels=channels, stride=2**i)

    @property
    def preactivations(self) -> dict[str, nn.Module]:
        return {name: self.get_submodule(name)[-2] for name in STAGES}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = {}
        for name in STAGES:
            if name in self.between:
                x = self.between[name](x)
            features[name] = x = self.get_submodule(name)(x)
        return features

    def output_shape(self) -> dict[str, ShapeSpec]:
        return self._shapes
