"""Implements the tap of image classifiers."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from torch import Tensor, nn

from kd_det.registry import TAP_REGISTRY
from kd_det.signals import Signals
from kd_det.taps.backbone import BackboneTap, hook, wrap
from kd_det.taps.replacement import replace_input


class Classifier(Protocol):
    """Describes what the tap uses of an ``ImageClassifier``."""

    backbone: Backbone
    linear: nn.Linear
    pixel_mean: Tensor

    def preprocess_image(self, batched_inputs: list[dict]) -> Tensor: ...

    def labels(self, batched_inputs: list[dict]) -> Tensor: ...

    def classify(self, features: dict[str, Tensor]) -> Tensor: ...

    def losses(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]: ...


@TAP_REGISTRY.register()
class ImageClassifierTap(BackboneTap):
    """Taps the backbone of an ``ImageClassifier``, its pooled feature, logits, linear layer and input gradient."""

    @classmethod
    def feature_levels(cls, cfg: CfgNode) -> list[str]:
        return ["res2", "res3", "res4"]

    @classmethod
    def head_defaults(cls, cfg: CfgNode) -> dict[str, Any]:
        return {
            "SOURCES": ["cls"],
            "SOURCE": "cls",
            "IN_FEATURE": max(*cls.feature_levels(cfg), *cfg.MODEL.RESNETS.OUT_FEATURES),
        }

    @property
    def classifier(self) -> Classifier:
        """Returns the model."""
        return cast(Classifier, self.model)

    def spec(self) -> dict[str, ShapeSpec]:
        linear = self.classifier.linear
        return super().spec() | {
            "pooled": ShapeSpec(channels=linear.in_features, height=1, width=1),
            "logits": ShapeSpec(channels=linear.out_features),
            "logits_weight": ShapeSpec(channels=linear.in_features),
            "logits_bias": ShapeSpec(channels=linear.out_features),
            "input_gradient": ShapeSpec(channels=len(self.classifier.pixel_mean)),
        }

    def class_layers(self) -> list[nn.Module]:
        return [self.classifier.linear]

    @property
    def replaceable(self) -> list[str]:
        return [*super().replaceable, "pooled"]

    @contextmanager
    def replace(self, name: str, function: Callable[[Tensor], Tensor], batched_inputs: list[dict]) -> Iterator[None]:
        if name != "pooled":
            with super().replace(name, function, batched_inputs):
                yield
            return
        with ExitStack() as stack:
            replace_input(stack, self.classifier.linear, function)
            yield

    def attach(self, stack: ExitStack, signals: Signals, names: set[str]) -> None:
        super().attach(stack, signals, names - {"pooled"})
        linear = self.classifier.linear

        def store(args: tuple, logits: Tensor) -> None:
            values = {"pooled": args[0], "logits": logits, "logits_weight": linear.weight, "logits_bias": linear.bias}
            signals.update({name: value for name, value in values.items() if name in names})

        hook(stack, linear, store)
        wrap(stack, self.model, "losses", lambda args, _: signals.update(labels=args[1]))
        if "input_gradient" in names:
            images: list[Tensor] = []

            def track(_, args: tuple) -> Tensor:
                images.append(args[0].detach().requires_grad_())
                return images[0]

            stack.callback(self.backbone.register_forward_pre_hook(track).remove)
            wrap(
                stack,
                self.model,
                "losses",
                lambda args, _: signals.update(
                    input_gradient=input_gradient(args[0], args[1], images[0], create_graph=self.model.training)
                ),
            )

    def forward(self, batched_inputs: list[dict], names: set[str], student: Signals) -> None:
        model = self.classifier
        images = model.preprocess_image(batched_inputs)
        with torch.enable_grad() if "input_gradient" in names else nullcontext():
            features = model.backbone(images)
            if names & {"pooled", "logits", "logits_weight", "logits_bias", "input_gradient"}:
                logits = model.classify(features)
            if "input_gradient" in names:
                model.losses(logits, model.labels(batched_inputs))


def input_gradient(logits: Tensor, labels: Tensor, images: Tensor, *, create_graph: bool) -> Tensor:
    """Computes the gradient of each image's cross-entropy with respect to the image, (N, 3, H, W).

    Args:
        logits: (N, K), computed from `images`.
        labels: (N,).
        images: The network's input, (N, 3, H, W).
        create_graph: Whether the gradient is to be differentiated again.
    """
    # With the sum, the gradient of an image does not depend on the size of the batch.
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = F.cross_entropy(logits, labels, reduction="sum")
    return torch.autograd.grad(loss, images, create_graph=create_graph, retain_graph=True)[0]
