"""Brings the student's feature maps to the teacher's width, and sums over maps to the size that they have on COCO."""

from collections.abc import Mapping

from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from kd_det.heads.connectors import build_connector
from kd_det.losses.numerics import cast_for_layers
from kd_det.signals import Signals

# Pixels of the images for which the weights of summed losses were published: a short side of 800, padded.
PUBLISHED_PIXELS = 800 * 1344
SCALES = ("map_invariant", "code")


class Aligners(nn.ModuleDict):
    """Holds a 1x1 convolution for each of the student's maps whose width differs from the teacher's.

    Args:
        student_spec: Maps the names of the compared maps to their shapes in the student.
        teacher_spec: Maps the same names to the shapes in the teacher.
    """

    def __init__(self, student_spec: Mapping[str, ShapeSpec], teacher_spec: Mapping[str, ShapeSpec]):
        widths = {name: (shape.channels, teacher_spec[name].channels) for name, shape in student_spec.items()}
        super().__init__({name: build_connector(*pair) for name, pair in widths.items() if pair[0] != pair[1]})

    def forward(self, signals: Signals, name: str) -> Tensor:
        """Returns one of the student's maps, (N, C, H, W), with as many channels as the teacher's has."""
        return self[name](cast_for_layers(signals[name])) if name in self else signals[name]


def sum_scale(x: Tensor, stride: int, *, scale: str, mask: Tensor | None = None) -> Tensor | float:
    """Computes the factor of a loss that is summed over the cells of a map.

    Args:
        x: The map, (N, C, H, W).
        stride: Pixels per cell.
        scale: "code" leaves the sum as it is, so that it grows with the images; "map_invariant" multiplies the mean
            over cells by the number of cells that the map has for an image of 800 x 1344 pixels, for which weights are
            published.
        mask: The cells that count, (N, 1, H, W).
    """
    if scale == "code":
        return 1.0
    cells = PUBLISHED_PIXELS / stride**2
    if mask is None:
        return cells / max(x.shape[2] * x.shape[3], 1)
    return cells * len(mask) / mask.sum().clamp(min=1)
