"""Defines the meta-architecture of image classifiers."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from torch import Tensor, nn

from kd_det.classification.timm_network import TimmClassifierBackbone
from kd_det.errors import InputError


@META_ARCH_REGISTRY.register()
class ImageClassifier(nn.Module):
    """Classifies images by a linear layer on the pooled feature of a backbone.

    Args:
        backbone: Maps images (N, 3, H, W) to a dict of feature maps. The pooled feature is its output ``pooled`` (N, D)
            if it has one, else the mean of the last map over its cells.
        linear: Maps the pooled feature to class logits.
        pixel_mean: Mean of each channel, 0 to 255, in the channel order of the images.
        pixel_std: Standard deviation of each channel.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    @configurable
    def __init__(
        self, *, backbone: Backbone, linear: nn.Linear, pixel_mean: tuple[float, ...], pixel_std: tuple[float, ...]
    ):
        super().__init__()
        self.backbone = backbone
        self.linear = linear
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        num_classes = cfg.MODEL.CLASSIFIER.NUM_CLASSES
        if num_classes < 2:
            raise InputError(f"MODEL.CLASSIFIER.NUM_CLASSES: must be at least 2, got {num_classes}.")
        backbone = build_backbone(cfg)
        if isinstance(backbone, TimmClassifierBackbone):
            linear = backbone.detach_linear()
        else:
            linear = nn.Linear(list(backbone.output_shape().values())[-1].channels, num_classes)
        return {
            "backbone": backbone,
            "linear": linear,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
        }

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def forward(self, batched_inputs: list[dict]):
        """Classifies images.

        Args:
            batched_inputs: Dicts with ``image`` (3, H, W), all of the same size, and in training also ``label``.

        Returns:
            In training, a dict with ``loss_cls``; in inference, one dict per image with ``scores`` (K,) that sum to 1.
        """
        logits = self.classify(self.backbone(self.preprocess_image(batched_inputs)))
        if self.training:
            return self.losses(logits, self.labels(batched_inputs))
        return [{"scores": scores} for scores in logits.float().softmax(dim=1)]

    def preprocess_image(self, batched_inputs: list[dict]) -> Tensor:
        """Stacks the images to (N, 3, H, W), moves them to the device and normalises them."""
        images = stack([x["image"] for x in batched_inputs]).to(self.device, non_blocking=True)
        return (images - self.pixel_mean) / self.pixel_std

    def labels(self, batched_inputs: list[dict]) -> Tensor:
        """Returns the labels of the images, (N,)."""
        return torch.tensor([int(x["label"]) for x in batched_inputs], device=self.device)

    def classify(self, features: dict[str, Tensor]) -> Tensor:
        """Computes logits (N, K) from the backbone's features."""
        if "pooled" in features:
            return self.linear(features["pooled"])
        return self.linear(list(features.values())[-1].mean(dim=(2, 3)))

    def losses(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Computes the cross-entropy of logits (N, K) and labels (N,)."""
        return {"loss_cls": F.cross_entropy(logits.float(), labels)}


def stack(images: Sequence[Tensor]) -> Tensor:
    """Stacks images (C, H, W) to (N, C, H, W); nothing is copied if they lie in memory one after the other.

    Views of one batch do, and so do those of a part of it. Images with gradients are copied, since the gradient of each
    has to reach its own tensor.
    """
    if torch.jit.is_tracing():  # A trace would keep the size of this image as a constant.
        return torch.stack(list(images))
    first, size = images[0], images[0].numel()
    end = (first.storage_offset() + len(images) * size) * first.element_size()
    adjacent = end <= first.untyped_storage().nbytes() and all(
        x.shape == first.shape
        and x.dtype == first.dtype
        and x.is_contiguous()
        and not x.requires_grad
        and x.data_ptr() == first.data_ptr() + i * size * first.element_size()
        for i, x in enumerate(images)
    )
    if not adjacent:
        return torch.stack(list(images))
    return first.as_strided((len(images), *first.shape), (size, *first.stride()))
