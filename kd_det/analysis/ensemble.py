"""Combines several models into one for inference, such as the generations of a born-again chain."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch import Tensor, nn

from kd_det.errors import InputError
from kd_det.taps import describe_model

# Maps the boxes, scores and classes of each model to those of the fused boxes.
BoxFusion = Callable[..., tuple[np.ndarray, np.ndarray, np.ndarray]]


class Ensemble(nn.Module):
    """Averages or fuses the predictions of several models; its inputs and outputs are those of a single model.

    For image classifiers, ``scores`` is the mean of the models' class probabilities (Furlanello et al., ICML 2018,
    https://arxiv.org/abs/1805.04770).

    For detectors, ``instances`` are fused by weighted boxes fusion (Solovyev et al., 2021,
    https://arxiv.org/abs/1910.13302), which needs the package ``ensemble-boxes``. Overlapping boxes of one class become
    one box, their mean weighted by score; its score is the mean of their scores, times the share of models that found
    the object. Boxes are in pixels of the output image. Masks are dropped.

    The models stay in evaluation mode and compute no gradients. All of them get the same images, so they must have the
    same ``INPUT.FORMAT``.

    Args:
        models: Trained image classifiers or trained detectors of the same classes.
        iou_threshold: Overlap (IoU) above which boxes are taken for the same object.
        detections_per_image: Maximum number of detections in an image; those with the highest scores are kept.

    Raises:
        InputError: If there are no models, if they differ in kind or in the number of classes, or if
            ``ensemble-boxes`` is missing.

    Example::

        ensemble = Ensemble([run.model for run in runs])
        instances = ensemble([{"image": image}])[0]["instances"]
    """

    def __init__(self, models: list[nn.Module], *, iou_threshold: float = 0.55, detections_per_image: int = 100):
        super().__init__()
        if not models:
            raise InputError("Ensemble: it needs at least one model, got none.")
        kinds = [describe_model(model) for model in models]
        if len(set(kinds)) > 1:
            raise InputError(f"Ensemble: the models must all be alike, but they are {', '.join(kinds)}.")
        self.models = nn.ModuleList(models)
        self.iou_threshold = iou_threshold
        self.detections_per_image = detections_per_image
        self.fuse = load_boxes_fusion() if kinds[0].startswith("detector") else None
        self.eval()

    def train(self, mode: bool = True) -> "Ensemble":
        """Keeps evaluation mode, whatever `mode` is."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, batched_inputs: list[dict]) -> list[dict]:
        """Predicts with all models; inputs and outputs are those of a single model."""
        predictions = zip(*(model(batched_inputs) for model in self.models), strict=True)
        if self.fuse is None:
            return [{"scores": torch.stack([x["scores"] for x in outputs]).mean(dim=0)} for outputs in predictions]
        return [
            {
                "instances": fuse_instances(
                    self.fuse,
                    [x["instances"] for x in outputs],
                    iou_threshold=self.iou_threshold,
                    detections_per_image=self.detections_per_image,
                )
            }
            for outputs in predictions
        ]


def fuse_instances(
    fuse: BoxFusion,
    instances: Sequence[Instances],
    *,
    iou_threshold: float = 0.55,
    detections_per_image: int | None = 100,
    masks: bool = False,
) -> Instances:
    """Fuses the detections of several models in one image; see :class:`Ensemble`.

    Args:
        fuse: Result of :func:`load_boxes_fusion`.
        instances: The detections of each model, all for the same size of the image.
        iou_threshold: Overlap (IoU) above which boxes are taken for the same object.
        detections_per_image: Maximum number of detections that are kept; None keeps all.
        masks: Whether a fused box gets the mask, (H, W) bool, of the detection of its class that overlaps it most;
            masks are not averaged. Detections without masks, of other models, give their boxes alone, and a fused box
            that no detection with a mask overlaps is left out.
    """
    height, width = instances[0].image_size
    size = np.array([width, height, width, height])
    boxes, scores, classes = fuse(
        [(as_array(x.pred_boxes.tensor) / size).clip(0, 1) for x in instances],
        [as_array(x.scores) for x in instances],
        [as_array(x.pred_classes) for x in instances],
        iou_thr=iou_threshold,
    )
    # The highest scores come first.
    best, device = slice(detections_per_image), instances[0].scores.device
    fused = Instances((height, width))
    fused.pred_boxes = Boxes(torch.as_tensor(boxes[best] * size, dtype=torch.float32, device=device))
    fused.scores = torch.as_tensor(scores[best], dtype=torch.float32, device=device)
    fused.pred_classes = torch.as_tensor(classes[best], dtype=torch.int64, device=device)
    return add_masks(fused, [x for x in instances if x.has("pred_masks")]) if masks else fused


def add_masks(fused: Instances, masked: Sequence[Instances]) -> Instances:
    """Gives each fused box the mask of the detection of its class that overlaps it most, and drops those without."""
    if not any(map(len, masked)):
        fused = fused[:0]
        fused.pred_masks = torch.zeros((0, *fused.image_size), dtype=torch.bool, device=fused.scores.device)
        return fused
    boxes = Boxes.cat([x.pred_boxes for x in masked])
    classes = torch.cat([x.pred_classes for x in masked])
    overlaps = pairwise_iou(fused.pred_boxes, boxes) * (fused.pred_classes[:, None] == classes)
    overlap, index = overlaps.max(dim=1)
    fused.pred_masks = torch.cat([x.pred_masks for x in masked])[index]
    return fused[overlap > 0]


def load_boxes_fusion() -> BoxFusion:
    """Imports the function that fuses boxes.

    Raises:
        InputError: If its package is missing.
    """
    try:
        from ensemble_boxes import weighted_boxes_fusion
    except ImportError as error:
        raise InputError(f"Ensemble: detectors need ensemble-boxes ({error}): pip install ensemble-boxes.") from error
    return weighted_boxes_fusion


def as_array(x: Tensor) -> np.ndarray:
    return x.detach().double().cpu().numpy()
