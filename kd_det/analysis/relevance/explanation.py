"""Computes relevance maps: how much each pixel contributes to a logit, by layer-wise relevance propagation (LRP).

IE-KD (Huang et al., CVPR 2021, https://arxiv.org/abs/2107.00181) compares the maps of a teacher with those of the
inheriting and the exploring half of a student's channels.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from detectron2.modeling import Backbone, GeneralizedRCNN, RetinaNet
from detectron2.structures import Boxes, ImageList, pairwise_iou
from torch import Tensor, nn

from kd_det.analysis.relevance.rules import COMPOSITES, Composite, Pixels, RelevanceMode
from kd_det.classification.image_classifier import ImageClassifier
from kd_det.errors import InputError, check_choice
from kd_det.taps import build_tap

# Pixels by which a box may reach beyond the image, because of rounding.
TOLERANCE = 1.0


@dataclass(frozen=True)
class Explanation:
    """Holds the relevance of the pixels for a logit.

    Attributes:
        relevance: Relevance of each pixel and channel, (3, H, W).
        logit: The logit.
        start: Relevance at the place where the propagation began: the logit, or what passes through the channels.
        constants: Relevance of biases and other constants. In all rules but epsilon, the pixels' and theirs sum to
            `start`.
    """

    relevance: Tensor
    logit: float
    start: float
    constants: float


def relevance_map(
    model: nn.Module,
    image: Tensor,
    *,
    label: int,
    box: Sequence[float] | Tensor | None = None,
    composite: str | Composite = "layered",
    feature: str | None = None,
    channels: Sequence[int] | Tensor | None = None,
) -> tuple[Tensor, float]:
    """Computes the relevance of each pixel for a class logit; see :func:`explain` for the arguments.

    Returns:
        The relevance, (3, H, W), and the logit.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2, bias=False))
        >>> relevance, logit = relevance_map(model, 255 * torch.rand(3, 4, 4), label=1, composite="zero")
        >>> abs(relevance.sum().item() - logit) < 1e-4 * abs(logit)
        True
    """
    found = explain(model, image, label=label, box=box, composite=composite, feature=feature, channels=channels)
    return found.relevance, found.logit


def explain(
    model: nn.Module,
    image: Tensor,
    *,
    label: int,
    box: Sequence[float] | Tensor | None = None,
    composite: str | Composite = "layered",
    feature: str | None = None,
    channels: Sequence[int] | Tensor | None = None,
) -> Explanation:
    """Propagates the relevance of a class logit down to the pixels.

    The model is used as in evaluation; its weights, hooks and modes are as before afterwards.

    Args:
        model: An ImageClassifier, a GeneralizedRCNN (with FPN or C4) or a RetinaNet; or any other module that maps
            images (1, 3, H, W) to logits (1, K).
        image: (3, H, W), in grey levels from 0 to 255 and in the model's channel order, as the model gets it. Another
            module gets it as it is.
        label: The class, from 0.
        box: For detectors, a box x0, y0, x1, y1 in pixels of the image. An R-CNN classifies the features in it; for a
            RetinaNet it is the anchor that overlaps it most whose logit counts. None for classifiers.
        composite: The rules: "layered" takes z-B for a convolution on the pixels, gamma for the other convolutions,
            epsilon for linear layers and LRP-0 for the last one; "zero", "epsilon", "gamma" and "z_plus" take one rule
            for all. A :class:`Composite` chooses others.
        feature: A map of the backbone, such as ``res4`` or ``p4``: only what passes through it counts.
        channels: Indices of its channels that relevance passes through; None takes all of them.

    Raises:
        InputError: If an argument is out of range, or no rule covers a layer, which is named.
    """
    if isinstance(composite, str):
        check_choice("composite", composite, COMPOSITES)
        composite = COMPOSITES[composite]
    check_image(image)
    target = find_target(model)
    box_tensor = check_box(box, image, needs_box=target.needs_box)
    with evaluating(model), torch.enable_grad():
        pixels = make_pixels(model, image)
        mode = RelevanceMode(model, composite, pixels, [x for layer in target.outputs for x in layer.parameters()])
        with capture(model, image, feature) as captured, mode.follow():
            logits = target.score(pixels.values, box_tensor)
        if not 0 <= label < len(logits):
            raise InputError(f"label: must be a class from 0 to {len(logits) - 1}, got {label}.")
        logit = logits[label]
        leaves = [*pixels.leaves, *mode.constants]
        if not logit.requires_grad:
            raise InputError("relevance: the logit does not depend on the image.")
        gradients: Sequence[Tensor | None]
        if feature is None:
            start, gradients = logit, torch.autograd.grad(logit, leaves, allow_unused=True)
        else:
            start, gradients = propagate_through(logit, captured, channels, leaves, feature)
    shares = [0 * x if grad is None else x * grad for x, grad in zip(leaves, gradients, strict=True)]
    height, width = image.shape[-2:]
    relevance = sum(shares[:3], torch.zeros(()))[0, :, :height, :width].detach()
    constants = sum(float(x.detach().sum()) for x in shares[3:])
    return Explanation(relevance, logit.item(), start.item(), constants)


def propagate_through(
    logit: Tensor,
    captured: Sequence[Tensor],
    channels: Sequence[int] | Tensor | None,
    leaves: Sequence[Tensor],
    name: str,
) -> tuple[Tensor, Sequence[Tensor | None]]:
    """Propagates the relevance that passes through channels of a feature, and no other.

    Args:
        captured: The feature, (1, C, H, W), as the only element.
        channels: Indices of the channels; None takes all of them.
        leaves: The inputs whose gradients are wanted.
        name: Name of the feature, for messages.

    Returns:
        The sum of the relevance in these channels, and the gradients.
    """
    if len(captured) != 1:
        raise InputError(f"feature: {name} is computed {len(captured)} times for one image; it must be once.")
    feature = captured[0]
    (gradient,) = torch.autograd.grad(logit, feature, retain_graph=True, allow_unused=True)
    if gradient is None:
        raise InputError(f"feature: the logit does not depend on {name}.")
    if channels is not None:
        chosen = torch.as_tensor(channels, dtype=torch.int64, device=gradient.device)
        if not ((chosen >= 0) & (chosen < gradient.shape[1])).all():
            raise InputError(f"channels: must be from 0 to {gradient.shape[1] - 1}, which {name} has.")
        mask = torch.zeros_like(gradient)
        mask[:, chosen] = 1
        gradient = gradient * mask
    start = (feature * gradient).sum()
    return start, torch.autograd.grad(feature, leaves, grad_outputs=gradient, allow_unused=True)


# ---- Models ----
@dataclass(frozen=True)
class Target:
    """Describes what a model's relevance starts from.

    Attributes:
        score: Computes class logits (K,) from normalised images (1, 3, H, W) and a box (4,).
        outputs: The layers that compute the logits.
        needs_box: Whether the logits are those of a box.
    """

    score: Callable[[Tensor, Tensor | None], Tensor]
    outputs: Sequence[nn.Module]
    needs_box: bool


def find_target(model: nn.Module) -> Target:
    """Describes what the relevance of a model starts from.

    Raises:
        InputError: If the model is a detector of another kind.
    """
    if isinstance(model, ImageClassifier):
        return Target(lambda images, _: model.classify(model.backbone(images))[0], [model.linear], False)
    if isinstance(model, GeneralizedRCNN):
        return rcnn_target(model)
    if isinstance(model, RetinaNet):
        return retinanet_target(model)
    if isinstance(getattr(model, "backbone", None), Backbone):
        raise InputError(
            f"relevance: a {type(model).__name__} is not supported; detectors must be a GeneralizedRCNN or a RetinaNet."
        )
    layers = [x for x in model.modules() if isinstance(x, nn.Linear | nn.Conv2d)]
    return Target(lambda images, _: check_logits(model, model(images)), layers[-1:], False)


def check_logits(model: nn.Module, logits: object) -> Tensor:
    """Returns the logits (K,) of an arbitrary module.

    Raises:
        InputError: If its output is not (1, K).
    """
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != 1:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise InputError(f"relevance: {type(model).__name__} must return logits (1, K) for an image, got {found}.")
    return logits[0]


def rcnn_target(model: GeneralizedRCNN) -> Target:
    """Describes an R-CNN, which classifies the features in a box."""
    tap = build_tap(model)
    if "roi_logits" not in tap.spec():
        raise InputError(f"relevance: {type(model.roi_heads).__name__} classifies no boxes.")
    names = {"roi_logits"}

    def score(images: Tensor, box: Tensor | None) -> Tensor:
        assert box is not None
        features = model.backbone(images)
        with tap.record(names) as signals:
            tap.run(features, names, {"roi_boxes": torch.cat([box.new_zeros(1), box])[None]})
        return signals["roi_logits"][0, : model.roi_heads.num_classes]

    return Target(score, tap.class_layers(), True)


def retinanet_target(model: RetinaNet) -> Target:
    """Describes a RetinaNet, which classifies anchors."""
    tap = build_tap(model)
    names = {"dense_logits"}

    def score(images: Tensor, box: Tensor | None) -> Tensor:
        assert box is not None
        features = model.backbone(images)
        with tap.record(names) as signals:
            tap.run(features, names, {})
        anchors = Boxes.cat(model.anchor_generator([features[name] for name in model.head_in_features]))
        best = pairwise_iou(anchors, Boxes(box[None]))[:, 0].argmax()
        return signals["dense_logits"][0, best]

    return Target(score, tap.class_layers(), True)


def make_pixels(model: nn.Module, image: Tensor) -> Pixels:
    """Normalises and pads an image as the model does, with the bounds of its pixels; padding is bounded by zero."""
    parameter: Tensor = next(model.parameters(), torch.zeros(()))
    image = image.to(parameter.device, torch.promote_types(image.dtype, torch.float32))
    found = []
    for values in (image, torch.zeros_like(image), torch.full_like(image, 255)):
        batch = values[None]
        if hasattr(model, "preprocess_image"):
            images: ImageList | Tensor = build_tap(model).preprocess([{"image": values}])
            batch = images if isinstance(images, Tensor) else images.tensor
        found.append(batch.detach().to(parameter.dtype).clone().requires_grad_())
    return Pixels(*found)


@contextmanager
def capture(model: nn.Module, image: Tensor, feature: str | None) -> Iterator[list[Tensor]]:
    """Collects a feature whenever the model computes it.

    Raises:
        InputError: If the model lacks the feature.
    """
    found: list[Tensor] = []
    if feature is None:
        yield found
        return
    tap = build_tap(model)
    if feature not in tap.replaceable:
        raise InputError(f"feature: {feature!r} is not one of {', '.join(tap.replaceable)}.")

    def store(x: Tensor) -> Tensor:
        found.append(x)
        return x

    with tap.replace(feature, store, [{"image": image}]):
        yield found


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts a model into evaluation mode; restores the mode of each module."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training


# ---- Arguments ----
def check_image(image: Tensor) -> None:
    """Checks that an image is (3, H, W) and finite.

    Raises:
        InputError: If it is not.
    """
    if image.dim() != 3 or len(image) != 3 or not image.numel():
        raise InputError(f"image: must be (3, H, W), got {tuple(image.shape)}.")
    if not image.isfinite().all():
        raise InputError("image: has values that are not finite.")


def check_box(box: Sequence[float] | Tensor | None, image: Tensor, *, needs_box: bool) -> Tensor | None:
    """Returns the box of a detection as a tensor (4,); None for a classifier.

    Raises:
        InputError: If a detector has no box, a classifier has one, or it is not inside the image.
    """
    if not needs_box:
        if box is not None:
            raise InputError("box: a classifier has no boxes; it must be None.")
        return None
    if box is None:
        raise InputError("box: a detector needs one: x0, y0, x1, y1 in pixels of the image.")
    values = torch.as_tensor(box, dtype=torch.float32).flatten().tolist()
    height, width = image.shape[-2:]
    if len(values) != 4 or not all(map(math.isfinite, values)):
        raise InputError(f"box: must be four finite numbers x0, y0, x1, y1, got {values}.")
    x0, y0, x1, y1 = values
    is_inside = min(x0, y0) >= -TOLERANCE and x1 <= width + TOLERANCE and y1 <= height + TOLERANCE
    if not (is_inside and x0 < x1 and y0 < y1):
        raise InputError(f"box: must have an area and lie in the image of {width} x {height} pixels, got {values}.")
    return torch.tensor(values, device=image.device)
