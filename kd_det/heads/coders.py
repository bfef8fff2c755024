"""Provides what the heads on factors share: features, coders, padding set to zero, reconstruction, scales."""

from collections.abc import Callable, Mapping
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from kd_det.errors import InputError, check_choice
from kd_det.heads.build import check_pooled_sizes, check_signals
from kd_det.heads.norms import build_norm
from kd_det.losses.numerics import add_up, cast_up, masked_mean
from kd_det.signals import Batch, Signals, boxes_per_image

SCALES = ("map_invariant", "code")
RECONSTRUCTIONS = ("l1", "l2")
BOXES = "roi_features"


class Feature(NamedTuple):
    """Describes a compared feature: its channels in student, teacher and factor, and its stride (None for boxes)."""

    student_channels: int
    teacher_channels: int
    factor_channels: int
    stride: int | None


class AutoEncoder(nn.Module):
    """Encodes a feature (N, C, H, W) to its factor (N, m, H, W), and decodes that to the feature again."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module):
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))


def build_coder(
    before: int, after: int, *, norm: str, convolution: Callable[..., nn.Module] = nn.Conv2d
) -> nn.Sequential:
    """Builds three 3x3 convolutions, each followed by a leaky ReLU (0.1); the first keeps the number of channels.

    Args:
        before: Number of input channels.
        after: Number of output channels.
        norm: Normalisation between convolution and leaky ReLU; see :func:`kd_det.heads.norms.build_norm`; "" for
            none.
        convolution: Builds a convolution from the arguments of ``nn.Conv2d``.
    """
    layers: list[nn.Module] = []
    for channels in pairwise([before, before, after, after]):
        layers.append(convolution(*channels, kernel_size=3, padding=1, bias=not norm))
        if norm:
            layers.append(build_norm(norm, channels[1]))
        layers.append(nn.LeakyReLU(0.1))
    return nn.Sequential(*layers)


def check_factor_options(
    key: str, node, student_spec: Mapping[str, ShapeSpec], teacher_spec: Mapping[str, ShapeSpec]
) -> dict[str, Feature]:
    """Checks IN_FEATURES, BOXES, FACTOR_RATE, SCALE and RECONSTRUCTION of a head's node.

    Args:
        key: Name of the node, for messages.
        node: The node.

    Returns:
        The descriptions of the compared features by their names.

    Raises:
        InputError: If a value is not allowed, or a network does not have a feature in the form that is needed.
    """
    allowed = [name for name, shape in student_spec.items() if shape.stride is not None or name == BOXES]
    if not node.IN_FEATURES:
        raise InputError(f"{key}.IN_FEATURES: no feature is named; allowed are {', '.join(allowed)}.")
    check_signals(f"{key}.IN_FEATURES", node.IN_FEATURES, student_spec, teacher_spec)
    for name in node.IN_FEATURES:
        if name not in allowed:
            raise InputError(f"{key}.IN_FEATURES: {name!r} is not a feature map; allowed are {', '.join(allowed)}.")
        if name == BOXES:
            check_pooled_sizes(f"{key}.IN_FEATURES", student_spec, teacher_spec)
    check_choice(f"{key}.SCALE", node.SCALE, SCALES)
    check_choice(f"{key}.RECONSTRUCTION", node.RECONSTRUCTION, RECONSTRUCTIONS)
    if node.BOXES < 0:
        raise InputError(f"{key}.BOXES: must be 0 (all) or a number of boxes per image, got {node.BOXES}.")
    if node.FACTOR_RATE <= 0:
        raise InputError(f"{key}.FACTOR_RATE: must be above 0, got {node.FACTOR_RATE}.")
    features = {}
    for name in node.IN_FEATURES:
        channels = teacher_spec[name].channels
        factor_channels = max(round(node.FACTOR_RATE * channels), 1)
        features[name] = Feature(student_spec[name].channels, channels, factor_channels, student_spec[name].stride)
    return features


def first_boxes(number: int, student: Signals, *others: Signals) -> list[Signals]:
    """Limits ``roi_features`` to the first boxes of each image, and leaves all other signals as they are.

    Detectron2 samples the boxes of objects first, then background.

    Args:
        number: Number of boxes per image; 0 leaves all of them.
        student: The signals that define the boxes by ``roi_boxes``; without it, nothing is left out.
        others: Other networks' signals on the same boxes.
    """
    signals = [student, *others]
    if not number or BOXES not in student or "roi_boxes" not in student:
        return signals
    counts = boxes_per_image(student, "roi", 0)
    if max(counts, default=0) <= number:
        return signals
    # The rows of an image are consecutive.
    ends = accumulate(counts)
    rows = torch.cat([torch.arange(end - n, end - n + min(n, number)) for n, end in zip(counts, ends, strict=True)])
    rows = rows.to(student["roi_boxes"].device, non_blocking=True)
    return [x | {BOXES: x[BOXES].index_select(0, rows)} for x in signals]


def valid_cells(batch: Batch, x: Tensor, stride: int | None) -> Tensor | None:
    """Marks the cells that count with booleans (N, 1, H, W), None for all; features of boxes have no padding."""
    return None if stride is None else batch.valid_mask(x, stride)


def zero_padding(x: Tensor, mask: Tensor | None) -> Tensor:
    """Sets the cells that do not count to zero."""
    return x if mask is None else x.masked_fill(~mask, 0)


def encode(encoder: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    """Computes the factor of a feature; it depends only on the cells that count and is zero at all others."""
    return zero_padding(encoder(zero_padding(cast_up(x), mask)), mask)


def reconstruction_loss(
    auto_encoders: nn.ModuleDict,
    features: Mapping[str, Feature],
    teacher: Signals,
    batch: Batch,
    *,
    kind: str,
) -> Tensor:
    """Measures the reconstruction error of the teacher's features: the mean over elements, summed over features.

    Args:
        auto_encoders: An :class:`AutoEncoder` for each feature.
        kind: "l1" (absolute differences) or "l2" (squared ones).
    """
    losses = []
    for name, feature in features.items():
        mask = valid_cells(batch, teacher[name], feature.stride)
        x = zero_padding(cast_up(teacher[name].detach()), mask)
        rebuilt = cast_up(auto_encoders[name](x))
        losses.append(masked_mean((F.l1_loss if kind == "l1" else F.mse_loss)(rebuilt, x, reduction="none"), mask))
    return add_up(losses)


def rescale(loss: Tensor, factor: Tensor, mask: Tensor | None, *, kind: str, scale: str, p: float = 1) -> Tensor:
    """Rescales a distance between factors, so that it does not depend on the size of the map.

    For the kinds "ft" and "at" a factor of D elements has unit length, so the published code's mean over its elements
    falls as 1 / sqrt(D); the length of a difference ("od") grows as sqrt(D).

    Args:
        loss: The distance, see :func:`kd_det.losses.inheritance_loss`.
        factor: (N, C, H, W); D is C H W, or H W for attention maps.
        mask: The cells that count; D does not include the elements of others.
        kind: "ft", "at" or "od", the kind of the distance.
        scale: "map_invariant" multiplies the mean ("ft", "at") by sqrt(D) and divides the length ("od") by it; "code"
            leaves both as they are, but for a mean over only the elements that count.
        p: Exponent of the mean.
    """
    channels = 1 if kind == "at" else factor.shape[1]
    elements = channels * factor.shape[2] * factor.shape[3]
    if mask is None:
        root = elements**0.5 if scale == "map_invariant" else 1.0
        return loss / root if kind == "od" else loss * root
    valid = (channels * mask.sum().to(loss) / max(len(mask), 1)).clamp(min=1)
    if kind == "od":
        return loss / valid.sqrt() if scale == "map_invariant" else loss
    mean = loss * (elements / valid) ** (1 / p)
    return mean * valid.sqrt() if scale == "map_invariant" else mean
