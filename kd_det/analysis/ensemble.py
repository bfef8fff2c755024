"""Several models as one, for inference: the generations of a born-again series, for example."""

import numpy as np
import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from kd_det.errors import InputError
from kd_det.taps import describe_model


class Ensemble(nn.Module):
    """Predicts with several models and joins what they find; the output has the format of one model's.

    Image classifiers: ``scores`` are the mean of the models' class probabilities (Furlanello et al., ICML 2018,
    https://arxiv.org/abs/1805.04770).

    Detectors: ``instances`` are joined by weighted boxes fusion (Solovyev et al., 2021,
    https://arxiv.org/abs/1910.13302), which needs the package ``ensemble-boxes``. Boxes of one class that overlap
    become their mean, weighted by score; its score is their mean, times the share of models that found the object.
    Boxes are in pixels of the output image. Masks are dropped.

    The models stay in evaluation mode, and compute no gradients. They all read the images as they come, so they need
    the same ``INPUT.FORMAT``.

    Args:
        models: Trained image classifiers, or trained detectors, which know the same classes.
        iou_threshold: Overlap (IoU) above which boxes are one object.
        detections_per_image: Highest number of detections in an image; those of the highest scores are kept.

    Raises:
        InputError: If there is no model, or the models do not know equally many classes, or are of different kinds, or
            a package is missing.
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
        """Stay in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, batched_inputs: list[dict]) -> list[dict]:
        """Predict; inputs and outputs are those of each model."""
        found = zip(*(model(batched_inputs) for model in self.models), strict=True)
        if self.fuse is None:
            return [{"scores": torch.stack([x["scores"] for x in outputs]).mean(dim=0)} for outputs in found]
        return [{"instances": self._join([x["instances"] for x in outputs])} for outputs in found]

    def _join(self, instances: list[Instances]) -> Instances:
        """Join the detections of all models in one image."""
        height, width = instances[0].image_size
        size = np.array([width, height, width, height])
        boxes, scores, classes = self.fuse(
            [(as_array(x.pred_boxes.tensor) / size).clip(0, 1) for x in instances],
            [as_array(x.scores) for x in instances],
            [as_array(x.pred_classes) for x in instances],
            iou_thr=self.iou_threshold,
        )
        kept, like = slice(self.detections_per_image), instances[0].scores  # the highest scores come first
        joined = Instances((height, width))
        joined.pred_boxes = Boxes(torch.as_tensor(boxes[kept] * size, dtype=torch.float32, device=like.device))
        joined.scores = torch.as_tensor(scores[kept], dtype=torch.float32, device=like.device)
        joined.pred_classes = torch.as_tensor(classes[kept], dtype=torch.int64, device=like.device)
        return joined


def load_boxes_fusion():
    """The function that fuses boxes.

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
