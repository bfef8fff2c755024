"""Defines what passes between networks and heads: named tensors, and the batch that they were computed on.

A *signal* is one tensor that a network computed on one batch. The names are the same for every network:

===================== ========================================================================================
``p2`` ... ``p7``     outputs of the backbone, (N, C, H, W); for a C4 backbone ``res4``
``res2`` ... ``res5`` outputs of the bottom-up network below an FPN, (N, C, H, W)
``res4_preact``       input of the ReLU at the end of a stage, (N, C, H, W)
``res4_norm_weight``  weight (C,) of the batch norm before that ReLU, and ``res4_norm_bias`` (C,)
``rpn_logits``        objectness of all anchors of all levels, (N, anchors, 1)
``rpn_deltas``        box deltas of the same anchors, (N, anchors, 4)
``roi_features``      pooled features of the sampled boxes, (R, C, h, w)
``roi_box_features``  input of the box predictor, (R, D)
``roi_box_preact``    input of the last ReLU of the box head, (R, D)
``roi_logits``        class logits, background last, (R, K + 1)
``roi_logits_weight`` weight (K + 1, D) of the layer that computes them, and ``roi_logits_bias`` (K + 1,)
``roi_deltas``        box deltas, (R, 4 K), or (R, 4) if class-agnostic
``roi_deltas_weight`` weight (4 K or 4, D) of the layer that computes them, and ``roi_deltas_bias``
``mask_logits``       mask logits of the foreground boxes, (F, K or 1, m, m)
``keypoint_logits``   logits of heatmaps of the P keypoints of boxes with a visible keypoint, (V, P, m, m)
``sem_seg_logits``    class logits of a semantic segmentation, (N, K, H, W), usually at stride 4
``dense_logits``      class logits of a one-stage detector, (N, anchors, K)
``dense_deltas``      box deltas of a one-stage detector, (N, anchors, 4)
``dense_distances``   FCOS's distances from a cell's centre to the sides of its box, in cells, (N, anchors, 4)
``dense_centerness``  logits of FCOS's centerness, (N, anchors, 1)
``dense_cls_hidden_`` and a level, such as ``dense_cls_hidden_p3``: input of the last convolution of the branch of
                      classes, (N, C, H, W), which a ReLU has rectified; ``dense_box_hidden_p3`` in that of boxes
``dense_cls_conv4_``  and ``weight`` or ``bias``: parameters of that convolution, here the fourth, (C, C, 3, 3) and
                      (C,); ``dense_box_conv4_`` in the branch of boxes
``dense_cls_score_``  and ``weight`` or ``bias``: parameters of the layer that computes the class logits from it,
                      (A K, C, 3, 3) and (A K,) for A anchors per cell; ``dense_bbox_pred_`` for the box deltas
``fc6``, ``fc7``      rectified hidden layers of VGG and AlexNet, (N, 4096); a perceptron has ``fc1``, ``fc2`` and so on
``pooled``            pooled feature of an image classifier, (N, D)
``logits``            class logits of an image classifier, (N, K)
``logits_weight``     weight (K, D) of its linear layer, and ``logits_bias`` (K,)
``input_gradient``    gradient of each image's cross-entropy with respect to the image, (N, 3, H, W)
===================== ========================================================================================

ROI signals come with their boxes, row by row: ``roi_boxes`` (R, 5) as (image, x0, y0, x1, y1) in pixels of the
network's input, and ``roi_classes`` (R,), K for background; likewise ``mask_boxes`` and ``mask_classes``, and
``keypoint_boxes`` with ``keypoint_labels`` (V, P), the cell of the heatmap in which a keypoint lies, or -1 if it is not
visible. The ``roi_`` signals of a student in training also come with ``roi_gt_boxes`` (R, 4), the objects that the
boxes are matched with, which mean nothing for background, and with ``roi_scales`` (4,), the factors of the box deltas,
on the CPU. Boxes of a family come image by image; ``roi_counts``, ``mask_counts`` and ``keypoint_counts`` (N,), on the
CPU, are their numbers in each image.

The ``dense_`` signals of a student in training come with ``dense_anchors`` (anchors, 4) as (x0, y0, x1, y1),
``dense_labels`` (N, anchors), K for background and -1 where the student's losses leave an anchor out,
``dense_counts`` (levels,), the number of anchors of each level, and, except in an FCOS, ``dense_scales`` (4,), the
factors of the box deltas; the last two are on the CPU. The ``rpn_`` signals come with the same, where the label of an
object is 1 and of background 0. ``sem_seg_logits`` come with ``sem_seg_labels``, which have the size of the network's
input and are -1 for pixels that the student's losses ignore, such as padding.

The signals of a student classifier come with its ``labels`` (N,).
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

Signals = dict[str, Tensor]
# Prefixes of the signals that are computed on the student's boxes.
BOX_SIGNALS = ("roi_", "mask_", "keypoint_")


@dataclass(frozen=True)
class Source:
    """Describes predictions that heads compare and users name in a config.

    Attributes:
        logits: Name of the signal.
        softmax: Whether each row is class logits and a softmax follows. Otherwise a sigmoid follows each logit, or the
            signal is a map that has a softmax of its own.
        background: Number of the signal's channels that stand for background; None if its channels are not the classes
            of the model.
        model: Kind of model that makes the predictions.
    """

    logits: str
    softmax: bool = False
    background: int | None = None
    model: str = "detector"


SOURCES = {
    "roi": Source("roi_logits", softmax=True, background=1),
    "rpn": Source("rpn_logits"),
    "mask": Source("mask_logits"),
    "dense": Source("dense_logits", background=0),
    "cls": Source("logits", softmax=True, background=0, model="image classifier"),
    "keypoint": Source("keypoint_logits"),
    "sem_seg": Source("sem_seg_logits", background=0, model="segmentation model"),
}
SOFTMAX_SOURCES = tuple(name for name, source in SOURCES.items() if source.softmax)


@dataclass(frozen=True)
class Batch:
    """Describes the batch that student and teacher were run on.

    Attributes:
        inputs: The dicts of the data loader, one per image.
        image_sizes: (height, width) of each image before padding, in pixels.
        mask_padding: Whether feature losses leave out the cells that lie in the padding.
        masks: What :meth:`valid_mask` has computed, by size, stride and device.
    """

    inputs: list[dict]
    image_sizes: list[tuple[int, int]]
    mask_padding: bool = False
    masks: dict[tuple, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_inputs(cls, inputs: list[dict], *, mask_padding: bool = False) -> "Batch":
        return cls(inputs, [tuple(x["image"].shape[-2:]) for x in inputs], mask_padding)

    def valid_mask(self, feature: Tensor, stride: int) -> Tensor | None:
        """Marks the cells of a feature map that cover a part of the image.

        Args:
            feature: Map of the whole batch, (N, C, H, W).
            stride: Pixels per cell.

        Returns:
            Booleans (N, 1, H, W), or None where padding is not masked.
        """
        if not self.mask_padding:
            return None
        if torch.compiler.is_compiling():  # A size as a key would be compiled as a constant.
            return self._compute_mask(feature, stride)
        key = *feature.shape[-2:], stride, feature.device
        if key not in self.masks:
            self.masks[key] = self._compute_mask(feature, stride)
        return self.masks[key]

    def _compute_mask(self, feature: Tensor, stride: int) -> Tensor:
        height, width = feature.shape[-2:]
        # A copy that does not block never makes the CPU wait for a GPU.
        sizes = torch.tensor(self.image_sizes).to(feature.device, non_blocking=True)
        rows = torch.arange(0, height * stride, stride, device=feature.device) < sizes[:, :1]
        columns = torch.arange(0, width * stride, stride, device=feature.device) < sizes[:, 1:]
        return (rows[:, :, None] & columns[:, None, :])[:, None]


def boxes_per_image(signals: Signals, prefix: str, images: int) -> list[int]:
    """Returns the number of boxes in each image.

    Args:
        signals: Signals with ``<prefix>_boxes``. Without ``<prefix>_counts``, which a tap of a user's own may not
            record, the CPU has to wait for the GPU.
        prefix: "roi", "mask" or "keypoint".
        images: Number of images.
    """
    counts = signals.get(f"{prefix}_counts")
    if counts is None:
        counts = torch.bincount(signals[f"{prefix}_boxes"][:, 0].long(), minlength=images)
    return counts.cpu().tolist()


def flipped(batched_inputs: list[dict]) -> list[dict]:
    """Returns the batch with the channels of its images in reverse order."""
    return [{**x, "image": x["image"].flip(0)} for x in batched_inputs]
