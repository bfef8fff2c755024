"""Computes the losses of a trained model on test images, without randomness and without changing the model."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from detectron2.config import CfgNode
from detectron2.data.detection_utils import build_augmentation
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import Instances
from detectron2.utils.events import EventStorage
from torch import nn

from kd_det.classification.image_mapper import ClassificationMapper
from kd_det.data import DetectionMapper
from kd_det.engine import is_classifier
from kd_det.errors import InputError
from kd_det.taps import build_tap, hook

# Layers that work in another way in training than in evaluation.
MODAL = (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd)


def build_labelled_mapper(cfg: CfgNode) -> Callable[[dict], dict]:
    """Builds a mapper that reads images as the evaluation of a model does, with the labels that its losses need.

    Args:
        cfg: Config of the model.

    Raises:
        InputError: If the model gets its proposals from a file, which the mapper does not read.
    """
    if is_classifier(cfg):
        return ClassificationMapper(cfg, is_train=False)
    if cfg.MODEL.LOAD_PROPOSALS:
        raise InputError("MODEL.LOAD_PROPOSALS: must be False; the losses of proposals from a file are not computed.")
    augmentations = build_augmentation(cfg, is_train=False)
    return DetectionMapper(cfg, is_train=True, augmentations=augmentations, recompute_boxes=False)


@torch.no_grad()
def compute_losses(
    model: nn.Module, batch: list[dict], seed: int, proposals: list[Instances] | None = None
) -> dict[str, float]:
    """Computes the training losses of a model for a batch as they are in evaluation.

    Detectron2's models compute losses only in training mode. Here the backbone and all layers that depend on the mode,
    such as batch norm, stay in evaluation mode, so that statistics do not change. Proposals and anchors are sampled
    with a seed of their own. The focal loss of a dense detector is divided by the number of positive anchors of the
    batch, instead of its moving average over the batches before.

    Args:
        model: The model.
        batch: Images with their labels, as :func:`build_labelled_mapper` reads them.
        seed: Seed of the sampling.
        proposals: Boxes of each image for the box head of an R-CNN, which :func:`propose` returns; None takes those
            that the model itself proposes.

    Returns:
        The losses by their names. The model and the state of all random numbers are as before.
    """
    device = next(model.parameters()).device
    # At iteration 1, no usual VIS_PERIOD asks for a picture.
    with (
        loss_mode(model),
        own_normalizer(model),
        given_proposals(model, proposals),
        EventStorage(1),
        torch.random.fork_rng([device] if device.type == "cuda" else []),
    ):
        torch.manual_seed(seed)
        return {name: float(loss) for name, loss in model(batch).items()}


def propose(model: nn.Module, batch: list[dict], seed: int) -> list[Instances] | None:
    """Computes the boxes of each image that an R-CNN proposes to its box head; None for other models.

    A change of the features changes the boxes that are proposed, and so the mean of the box head's losses: from worse
    proposals, background may be easier to tell. With the same boxes, losses can be compared.

    Args:
        model: The model.
        batch: Images with their labels.
        seed: Seed of the sampling.
    """
    generator = getattr(model, "proposal_generator", None)
    if generator is None:
        return None
    found: list[Instances] = []
    with ExitStack() as stack:
        hook(stack, generator, lambda _, output: found.extend(x.to("cpu") for x in output[0]))
        compute_losses(model, batch, seed)
    return found


@contextmanager
def given_proposals(model: nn.Module, proposals: list[Instances] | None) -> Iterator[None]:
    """Lets an R-CNN use the given proposals instead of its own; the losses of its RPN stay its own."""
    if proposals is None:
        yield
        return

    def call(_module: nn.Module, _inputs: tuple, output: tuple) -> tuple:
        own, losses = output
        return [new.to(old.objectness_logits.device) for new, old in zip(proposals, own, strict=True)], losses

    handle = model.get_submodule("proposal_generator").register_forward_hook(call)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def loss_mode(model: nn.Module) -> Iterator[None]:
    """Lets a model return its losses while its layers work as in evaluation; restores the mode of each module."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.train()
        build_tap(model).backbone.eval()
        for module in model.modules():
            if isinstance(module, MODAL):
                module.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def own_normalizer(model: nn.Module) -> Iterator[None]:
    """Lets a dense detector normalise its losses by the anchors of the batch alone, and keep its moving average."""
    if not isinstance(model, DenseDetector):
        yield
        return

    def current(name: str, value: float, initial_value: float, momentum: float = 0.9) -> float:
        return value

    vars(model)["_ema_update"] = current
    try:
        yield
    finally:
        del vars(model)["_ema_update"]
