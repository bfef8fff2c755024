"""Presents networks of other libraries as backbones of Detectron2, which taps can read."""

from collections.abc import Callable, Iterable, Mapping

from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from torch import Tensor


class ForeignBackbone(Backbone):
    """Gives the feature maps that a function computes, by names.

    Args:
        compute: Maps images (N, 3, H, W) to their feature maps, in the order of `shapes`. A module is not registered
            here, so that its weights keep their names in the model that holds it.
        shapes: Maps the name of each map to its channels and its stride.
        size_divisibility: Number that the sides of padded images are multiples of.

    Example:
        >>> import torch
        >>> shapes = {"res2": ShapeSpec(channels=3, stride=4)}
        >>> backbone = ForeignBackbone(lambda images: [images[..., ::4, ::4]], shapes)
        >>> {name: tuple(x.shape) for name, x in backbone(torch.zeros(1, 3, 32, 64)).items()}
        {'res2': (1, 3, 8, 16)}
    """

    def __init__(
        self,
        compute: Callable[[Tensor], Iterable[Tensor]],
        shapes: Mapping[str, ShapeSpec],
        *,
        size_divisibility: int = 32,
    ):
        super().__init__()
        self.__dict__["compute"] = compute
        self.shapes = dict(shapes)
        self.divisor = size_divisibility

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.shapes, self.compute(images), strict=True))

    def output_shape(self) -> dict[str, ShapeSpec]:
        return self.shapes

    @property
    def size_divisibility(self) -> int:
        return self.divisor
