"""Builds teachers of feature maps from networks of the timm library."""

from collections.abc import Collection, Sequence
from typing import cast

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from detectron2.structures import ImageList
from torch import Tensor, nn

from kd_det.config import default_config
from kd_det.config_kinds import show
from kd_det.errors import InputError
from kd_det.timm_models import TEACHER_KEYS, create_resizable_timm_model, pretrained_description

# Marks the name of a teacher as that of a network of timm, such as timm:convnext_tiny.
PREFIX = "timm:"
# Height and width of a test image: multiples of all usual patches and strides, and not square.
PROBE = (224, 448)


class TimmFeatures(nn.Module):
    """Computes feature maps of a network of timm, on RGB images with the network's own normalisation.

    Args:
        net: The network, with ``forward_intermediates``, as all of timm's have.

    Raises:
        InputError: If its maps do not divide images evenly.
    """

    input_format = "RGB"

    def __init__(self, net: nn.Module):
        super().__init__()
        self.backbone = FeatureMaps(net)
        for name, values in zip(
            ("pixel_mean", "pixel_std"), pixel_statistics(cast(dict, net.pretrained_cfg)), strict=True
        ):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)

    def preprocess_image(self, batched_inputs: list[dict]) -> ImageList:
        """Normalises the images (3, H, W) of a batch and pads them to a multiple of the largest stride."""
        mean, std = self.get_buffer("pixel_mean"), self.get_buffer("pixel_std")
        images = [(x["image"].to(mean.device) - mean) / std for x in batched_inputs]
        return ImageList.from_tensors(images, self.backbone.size_divisibility)

    def forward(self, batched_inputs: list[dict]) -> list[dict]:
        """Computes all maps, which a tap can read. There is no prediction for any image."""
        self.backbone(self.preprocess_image(batched_inputs).tensor)
        return [{} for _ in batched_inputs]


class FeatureMaps(Backbone):
    """Gives the feature maps of a network of timm.

    Networks whose stages have different strides give ``res2`` (stride 4) and so on. Networks of equal blocks, such as
    vision transformers, give a map of each block, ``block0`` and so on: the tokens of the patches after the network's
    final norm, without class and register tokens.

    Args:
        net: The network.

    Raises:
        InputError: If its maps do not divide images evenly.
    """

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net
        self._is_plain = False
        with torch.no_grad():
            maps = self._compute(torch.zeros(1, 3, *PROBE))
        strides = [PROBE[0] // x.shape[2] for x in maps]
        if any((x.shape[2] * stride, x.shape[3] * stride) != PROBE for x, stride in zip(maps, strides, strict=True)):
            raise InputError(
                f"{TEACHER_KEYS.name}: the maps of {type(net).__name__} cannot be compared: for an image of "
                f"{' x '.join(map(str, PROBE))} pixels they have {', '.join(str(tuple(x.shape[2:])) for x in maps)}."
            )
        self._is_plain = len(set(strides)) < len(strides)
        names = [f"block{i}" if self._is_plain else f"res{n.bit_length() - 1}" for i, n in enumerate(strides)]
        self._shapes = {
            name: ShapeSpec(channels=x.shape[1], stride=stride)
            for name, x, stride in zip(names, maps, strides, strict=True)
        }

    def _compute(self, images: Tensor, indices: Sequence[int] | None = None) -> list[Tensor]:
        return self.net.forward_intermediates(  # type: ignore[operator]  # timm declares no interface.
            images,
            indices=indices,
            norm=self._is_plain,
            stop_early=True,
            output_fmt="NCHW",
            intermediates_only=True,
        )

    def forward(self, images: Tensor, names: Collection[str] | None = None) -> dict[str, Tensor]:
        """Computes maps.

        Args:
            images: (N, 3, H, W), normalised; H and W are multiples of :attr:`size_divisibility`.
            names: The maps to compute; later layers do not run. None computes all.
        """
        wanted = {name: i for i, name in enumerate(self._shapes) if names is None or name in names}
        if not wanted:
            return {}
        return dict(zip(wanted, self._compute(images, list(wanted.values())), strict=True))

    def output_shape(self) -> dict[str, ShapeSpec]:
        return self._shapes

    @property
    def size_divisibility(self) -> int:
        return max(cast(int, shape.stride) for shape in self._shapes.values())


def build_timm_teacher(cfg: CfgNode, *, pretrained: bool) -> TimmFeatures:
    """Builds the timm network that ``KD.TEACHER.CONFIG_FILE`` names.

    Args:
        cfg: The student's config.
        pretrained: Whether to load timm's own weights, which timm fetches or takes from its cache.

    Raises:
        InputError: If timm does not know the network, it does not take images of any size, or its weights cannot be
            fetched.
    """
    net = create_resizable_timm_model(
        cfg.KD.TEACHER.CONFIG_FILE.removeprefix(PREFIX),
        PROBE,
        keys=TEACHER_KEYS,
        pretrained=pretrained,
        in_chans=3,
        **network_options(cfg),
    )
    return TimmFeatures(net.eval()).to(cfg.MODEL.DEVICE)


def describe_timm_teacher(cfg: CfgNode) -> CfgNode:
    """Returns a plain config of the timm network that ``KD.TEACHER.CONFIG_FILE`` names.

    Raises:
        InputError: If timm does not know the network, or an override is wrong.
    """
    name = cfg.KD.TEACHER.CONFIG_FILE.removeprefix(PREFIX)
    statistics = pixel_statistics(pretrained_description(name, TEACHER_KEYS))
    network_options(cfg)
    described = default_config()
    described.MODEL.META_ARCHITECTURE = "TimmFeatures"
    described.MODEL.BACKBONE.NAME, described.MODEL.TIMM.NAME = "timm", name
    described.MODEL.PIXEL_MEAN, described.MODEL.PIXEL_STD = statistics
    described.INPUT.FORMAT = "RGB"
    return described


def network_options(cfg: CfgNode) -> dict[str, int]:
    """Returns the options of the network in ``KD.TEACHER.OPTS``: at most the number of classes of its classifier.

    Raises:
        InputError: If there is anything else.
    """
    options = list(cfg.KD.TEACHER.OPTS)
    if options and not (len(options) == 2 and options[0] == "num_classes" and type(options[1]) is int):
        raise InputError(
            f"KD.TEACHER.OPTS: must be empty for a teacher of timm, or [num_classes, N] for weights of a classifier of "
            f"N classes, got {show(options)}."
        )
    return dict([options]) if options else {}


def pixel_statistics(description: dict) -> tuple[list[float], list[float]]:
    """Converts mean and standard deviation of a network of timm, of images in [0, 1], to those of bytes."""
    mean, std = ([255 * value for value in description[key]] for key in ("mean", "std"))
    return mean, std
