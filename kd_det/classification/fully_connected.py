"""Builds classifiers with hidden fully connected layers as backbones: VGG, AlexNet and perceptrons."""

from collections import OrderedDict
from itertools import pairwise

import torchvision
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn

from kd_det.errors import InputError, check_choice

# The smallest side of an image that leaves a cell after all pooling.
SIZES = {"vgg11": 32, "vgg16": 32, "vgg19": 32, "alexnet": 63}
PERCEPTRON = "perceptron"


class ConvolutionsAndLayers(Backbone):
    """Wraps torchvision's VGG or AlexNet without its last layer.

    Feature maps are named by their stride, from ``res0`` (1) or ``res2`` (4) to ``res4`` (16), and stand before the
    pooling. ``fc6`` and ``fc7`` are the rectified outputs of the two hidden layers, before dropout, and ``pooled`` is
    the input of the last layer. Visual concepts (Cheng et al., 2020, https://arxiv.org/abs/2003.03622) are defined on
    these.

    Attributes:
        preactivations: Maps the name of each map and layer to the module whose output goes into its ReLU.

    Args:
        name: torchvision's name of the network.
        dropout: Probability of dropping a value of the input of a hidden layer (AlexNet) or of its output (VGG).
    """

    def __init__(self, name: str, *, dropout: float):
        super().__init__()
        net = torchvision.models.get_model(name, weights=None, num_classes=1, dropout=dropout)
        self.features, self.avgpool = net.features, net.avgpool
        self.classifier = net.classifier[:-1]
        self.preactivations: dict[str, nn.Module] = {}
        self._outputs: dict[str, nn.Module] = {}
        self._shapes: dict[str, ShapeSpec] = {}
        stride = 1
        for before, layer in pairwise([*self.features, *self.classifier]):
            if isinstance(layer, nn.ReLU):
                layer.inplace = False  # Else it overwrites the preactivation.
                if isinstance(before, nn.Linear):
                    key, shape = f"fc{6 + ('fc6' in self._shapes)}", ShapeSpec(channels=before.out_features)
                else:
                    stride *= before.stride[0]
                    key, shape = f"res{stride.bit_length() - 1}", ShapeSpec(channels=before.out_channels, stride=stride)
                # The last convolution of a stage replaces those before it.
                self.preactivations[key], self._outputs[key], self._shapes[key] = before, layer, shape
            elif isinstance(layer, nn.MaxPool2d):
                stride *= 2
        self._shapes["pooled"] = self._shapes["fc7"]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        names = {layer: name for name, layer in self._outputs.items()}
        features = {}
        for layer in (*self.features, self.avgpool, nn.Flatten(), *self.classifier):
            x = layer(x)
            if layer in names:
                features[names[layer]] = x
        return features | {"pooled": x}

    def output_shape(self) -> dict[str, ShapeSpec]:
        return self._shapes


class Perceptron(Backbone):
    """Implements a perceptron with rectified hidden layers on the grey values of an image.

    Hinton et al. (2015, https://arxiv.org/abs/1503.02531, section 3) distil one with two layers of 1200 units, trained
    with dropout, into one with two layers of 800. The channels of an image are averaged.

    The outputs are ``fc1``, ``fc2`` and so on, rectified and before dropout, and ``pooled``, the last of them after it.

    Attributes:
        preactivations: Maps the name of each layer to the module whose output goes into its ReLU.

    Args:
        size: Height and width of the image.
        units: Number of units of each hidden layer.
        dropout: Probability of dropping a hidden unit.
        input_dropout: Probability of dropping a pixel.
    """

    def __init__(self, size: int, units: tuple[int, ...], *, dropout: float, input_dropout: float):
        super().__init__()
        self.input_dropout, self.dropout = nn.Dropout(input_dropout), nn.Dropout(dropout)
        names = [f"fc{i + 1}" for i in range(len(units))]
        widths = pairwise([size * size, *units])
        self.preactivations = OrderedDict((name, nn.Linear(*width)) for name, width in zip(names, widths, strict=True))
        self.layers = nn.ModuleDict(
            {name: nn.Sequential(linear, nn.ReLU()) for name, linear in self.preactivations.items()}
        )
        self._shapes = {name: ShapeSpec(channels=width) for name, width in zip(names, units, strict=True)}
        self._shapes["pooled"] = self._shapes[names[-1]]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features, x = {}, self.input_dropout(x.mean(dim=1).flatten(1))
        for name, layer in self.layers.items():
            features[name] = layer(x)
            x = self.dropout(features[name])
        return features | {"pooled": x}

    def output_shape(self) -> dict[str, ShapeSpec]:
        return self._shapes


@BACKBONE_REGISTRY.register()
def build_fully_connected_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """Builds the network that ``MODEL.FULLY_CONNECTED`` describes, for an ``ImageClassifier``.

    Raises:
        InputError: If there is no such network, or it cannot take the images.
    """
    node, key, size = cfg.MODEL.FULLY_CONNECTED, "MODEL.FULLY_CONNECTED", cfg.INPUT.CLASSIFICATION.SIZE
    check_choice(f"{key}.NAME", node.NAME, [*SIZES, PERCEPTRON])
    if node.NAME == PERCEPTRON:
        if not node.UNITS:
            raise InputError(f"{key}.UNITS: must name the units of a layer or more, got {list(node.UNITS)}.")
        return Perceptron(size, tuple(node.UNITS), dropout=node.DROPOUT, input_dropout=node.INPUT_DROPOUT)
    if size < SIZES[node.NAME]:
        raise InputError(f"INPUT.CLASSIFICATION.SIZE: {node.NAME} needs {SIZES[node.NAME]} pixels or more, got {size}.")
    if input_shape.channels != 3:
        raise InputError(f"{key}.NAME: {node.NAME} takes images of three channels, not of {input_shape.channels}.")
    return ConvolutionsAndLayers(node.NAME, dropout=node.DROPOUT)
