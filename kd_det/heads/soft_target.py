"""Implements soft targets: the student learns to predict as the teacher does, on the same boxes and anchors."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from detectron2.config import configurable
from torch import Tensor, nn

from kd_det.errors import InputError, check_choice
from kd_det.heads.anchors import positive_count
from kd_det.heads.build import check_class_counts
from kd_det.heads.divided_targets import DividedTargets, check_dense, check_divergence
from kd_det.heads.map_targets import SEM_SEG, heatmap_loss, segmentation_loss
from kd_det.heads.targets import ClassTargets, check_class_targets
from kd_det.losses import binary_soft_target_loss, focal_soft_target_loss, standardize_logits
from kd_det.losses.numerics import cast_up, mean_weights, select_class
from kd_det.registry import KD_HEAD_REGISTRY
from kd_det.signals import SOURCES, Batch, Signals

ROIS = ("all", "foreground")
ANCHORS = ("weighted", "focal")


@KD_HEAD_REGISTRY.register()
class SoftTargetHead(nn.Module):
    """Compares the student's predictions with the teacher's, on the same images, boxes and anchors.

    Soft targets (Hinton et al., 2015, https://arxiv.org/abs/1503.02531). A detector's teacher predicts on the boxes
    that the student sampled, so that each row stands for the same box in both. The sources are:

    * ``cls``: T^2 KL of the softmax over the classes of an image classifier, mean over images;
    * ``roi``: T^2 KL of the softmax over classes and background, mean over boxes;
    * ``mask``: binary KL per pixel of the labelled class's mask, mean over foreground boxes and pixels;
    * ``rpn``, ``dense``: binary KL per anchor (and class), averaged with the weight max(p_teacher, p_student), because
      nearly all of an image's anchors are background on which both agree, and a plain mean would drown the rest; or the
      focal form of BCKD (Yang et al., ICCV 2023, https://arxiv.org/abs/2308.14286), a cross-entropy weighted by the
      difference of both probabilities, summed and divided by the number of positive anchors: those labelled as objects
      (``dense``), or those in which the teacher sees an object (``rpn``);
    * ``keypoint``: T^2 KL of the softmax over the cells of a keypoint's heatmap, mean over the visible keypoints;
    * ``sem_seg``: T^2 KL of the softmax over the classes of a pixel, mean over pixels, or of the softmax over the
      pixels of a class, mean over images and classes; pixels with an ignored label, such as padding, are left out.

    Boxes are compared by :class:`kd_det.heads.BoxTargetHead`.

    ``cls`` and ``roi`` have more options: knowledge adjustment and dynamic temperatures, which on boxes apply to those
    labelled foreground, see :class:`kd_det.heads.targets.ClassTargets`; other divergences than KL, see
    :class:`kd_det.heads.divided_targets.DividedTargets`; and standardised logits (Sun et al., CVPR 2024,
    https://arxiv.org/abs/2403.01427), which teach the order and the relations of the logits, but not their size.

    Args:
        sources: Any of "roi", "rpn", "mask", "dense", "cls", "keypoint", "sem_seg".
        temperature: T of the softmax over classes. Sigmoid outputs are compared at temperature 1.
        squared_temperature: Whether the divergence of the softmaxes is multiplied by T^2, as Hinton et al. advise, so
            that the size of its gradient does not change with T.
        rois: Boxes whose classes are compared: "all" or "foreground" (as labelled).
        background_weight: Weight of the boxes labelled background. (Chen et al., NeurIPS 2017, instead weigh the
            background class's term of every box.)
        adjust: Correction of the teacher's mistakes: "none", "probability_shift" or "label_smoothing".
        correct_prob: Probability of the label in a smoothed label.
        dynamic_temperature: Rule that gives each row its own temperature: "none", "flsw" or "cwsm".
        beta: Strength of the change of temperature.
        gamma: Exponent of "flsw".
        divergence: "kl", "dkd", "nkd", "gdkd" or "dist", for the sources "roi" and "cls", "dist" also for "dense".
        anchors: How "rpn" and "dense" weigh their anchors: "weighted" or "focal".
        standardize: Whether each row of their logits is standardised before it is compared.
        target_weight: Weight of the first term of the other divergences.
        other_weight: Weight of their second term.
        top_weight: Weight of the most probable classes among themselves ("gdkd").
        top_k: Number of these classes.
        sem_seg: Softmax of "sem_seg": "pixel" or "channel".

    Raises:
        InputError: If `divergence` is "dkd", "nkd" or "gdkd" and the sources include "dense".
    """

    config: ClassVar[dict[str, Any]] = {
        "WEIGHT": 1.0,
        # Any of roi (classes of the sampled boxes), rpn (objectness), mask (of foreground boxes), dense (RetinaNet),
        # cls (image classifiers), keypoint (heatmaps), sem_seg (semantic segmentation).
        "SOURCES": ["roi"],
        # Temperature of the softmax over classes; sigmoid outputs are compared at temperature 1.
        "TEMPERATURE": 1.0,
        # Multiply the divergence of the softmaxes by T^2, which keeps the size of its gradient when T changes.
        "SQUARED_TEMPERATURE": True,
        # Boxes whose classes are compared: all or foreground.
        "ROIS": "all",
        # Weight of the boxes that are labelled background.
        "BACKGROUND_WEIGHT": 1.0,
        # Correction of the teacher's mistakes, for roi (foreground boxes) and cls (Wen et al., 2019): "none";
        # "probability_shift" swaps its answer's probability with the label's; "label_smoothing" replaces its
        # probabilities by a smoothed label.
        "ADJUST": "none",
        # Probability of the label in a smoothed label.
        "CORRECT_PROB": 0.9,
        # A temperature for each row, lower for confusing ones (Wen et al., 2019), on foreground boxes: "none"; "flsw",
        # rows on which student and teacher disagree; "cwsm", rows of which the student is unsure.
        "DYNAMIC_TEMPERATURE": "none",
        # Distance from TEMPERATURE: BETA times the row's distance from the mean, within min(1, T / 2) and 2 T.
        "BETA": 1.0,
        # Exponent of flsw.
        "GAMMA": 2.0,
        # How the class logits of roi and cls are compared: "kl"; "dkd" (the labelled class against the others, and the
        # others among themselves); "nkd" (the same with a cross-entropy of the labelled class); "gdkd" (the teacher's
        # most probable classes against the rest); "dist" (correlations along classes and along rows;
        # for dense, too).
        "DIVERGENCE": "kl",
        # How rpn and dense weigh their anchors: "weighted", a mean with the weight max(p_teacher, p_student); "focal",
        # a sum with the weight |p_teacher - p_student| over the number of positive anchors (BCKD, CrossKD). With
        # DIVERGENCE dist, dense weighs none.
        "ANCHORS": "weighted",
        # Standardise each row of logits before it is compared; for kl and dkd.
        "STANDARDIZE": False,
        # Weight of the first term, published as 1: of dkd and nkd the labelled class, of gdkd the two groups, of dist
        # the correlations along classes.
        "TARGET_WEIGHT": 1.0,
        # Weight of the second term: of the other classes (published for dkd as 0.25 on boxes, 2 to 8 on CIFAR-100; for
        # nkd as 1.5 on ImageNet; for gdkd as 0.25), or of the correlations along rows (dist, 1).
        "OTHER_WEIGHT": 1.0,
        # Weight of the most probable classes among themselves (gdkd, published as 0.125).
        "TOP_WEIGHT": 1.0,
        # Number of the most probable classes (gdkd).
        "TOP_K": 5,
        # Softmax that is compared for sem_seg: "pixel", over the classes of each pixel; "channel", over the pixels of
        # each class (Shu et al., 2020).
        "SEM_SEG": "pixel",
    }

    @configurable
    def __init__(
        self,
        *,
        sources: Sequence[str] = config["SOURCES"],
        temperature: float = config["TEMPERATURE"],
        squared_temperature: bool = config["SQUARED_TEMPERATURE"],
        rois: str = config["ROIS"],
        background_weight: float = config["BACKGROUND_WEIGHT"],
        adjust: str = config["ADJUST"],
        correct_prob: float = config["CORRECT_PROB"],
        dynamic_temperature: str = config["DYNAMIC_TEMPERATURE"],
        beta: float = config["BETA"],
        gamma: float = config["GAMMA"],
        divergence: str = config["DIVERGENCE"],
        anchors: str = config["ANCHORS"],
        standardize: bool = config["STANDARDIZE"],
        target_weight: float = config["TARGET_WEIGHT"],
        other_weight: float = config["OTHER_WEIGHT"],
        top_weight: float = config["TOP_WEIGHT"],
        top_k: int = config["TOP_K"],
        sem_seg: str = config["SEM_SEG"],
    ):
        super().__init__()
        check_dense(divergence, sources)
        self.sources = tuple(sources)
        self.compare_classes: ClassTargets | DividedTargets
        if divergence == "kl":
            self.compare_classes = ClassTargets(
                temperature=temperature,
                squared_temperature=squared_temperature,
                adjust=adjust,
                correct_prob=correct_prob,
                dynamic_temperature=dynamic_temperature,
                beta=beta,
                gamma=gamma,
            )
        else:
            self.compare_classes = DividedTargets(
                divergence,
                temperature=temperature,
                squared_temperature=squared_temperature,
                target_weight=target_weight,
                other_weight=other_weight,
                top_weight=top_weight,
                top_k=top_k,
            )
        self.anchors = anchors
        self.standardize = standardize
        self.temperature = temperature
        # The losses of maps contain the factor T^2.
        self.map_weight = 1.0 if squared_temperature else temperature**-2
        self.sem_seg = sem_seg
        self.rois = rois
        self.weighs_rows = divergence not in ("nkd", "dist")
        self.background_weight = background_weight
        self.signals = tuple(SOURCES[source].logits for source in sources)
        self.reads_labels = adjust != "none" or divergence in ("dkd", "nkd")

    @classmethod
    def from_config(cls, cfg, student_spec, teacher_spec) -> dict:
        node = cfg.KD.SOFT_TARGET
        unknown = [source for source in node.SOURCES if source not in SOURCES]
        if unknown or not node.SOURCES:
            raise InputError(f"KD.SOFT_TARGET.SOURCES: got {node.SOURCES}; allowed are {', '.join(SOURCES)}.")
        if node.ROIS not in ROIS:
            raise InputError(f"KD.SOFT_TARGET.ROIS: got {node.ROIS!r}; allowed are {', '.join(ROIS)}.")
        if node.TEMPERATURE <= 0:
            raise InputError(f"KD.SOFT_TARGET.TEMPERATURE: must be above 0, got {node.TEMPERATURE}.")
        if not 0 <= node.BACKGROUND_WEIGHT < math.inf:
            raise InputError(
                f"KD.SOFT_TARGET.BACKGROUND_WEIGHT: must be finite and 0 or more, got {node.BACKGROUND_WEIGHT}."
            )
        check_choice("KD.SOFT_TARGET.SEM_SEG", node.SEM_SEG, SEM_SEG)
        for source in node.SOURCES:
            check_class_counts("KD.SOFT_TARGET.SOURCES", SOURCES[source].logits, student_spec, teacher_spec)
        check_choice("KD.SOFT_TARGET.ANCHORS", node.ANCHORS, ANCHORS)
        softmaxes = [name for name in node.SOURCES if SOURCES[name].softmax]
        return {
            "sources": node.SOURCES,
            "temperature": node.TEMPERATURE,
            "squared_temperature": node.SQUARED_TEMPERATURE,
            "rois": node.ROIS,
            "background_weight": node.BACKGROUND_WEIGHT,
            "sem_seg": node.SEM_SEG,
            **check_class_targets(node, softmaxes),
            "anchors": node.ANCHORS,
            **check_divergence(node, {name: student_spec[SOURCES[name].logits].channels for name in node.SOURCES}),
        }

    def forward(self, student: Signals, teacher: Signals, batch: Batch) -> dict[str, Tensor]:
        compare = {
            "roi": self._roi,
            "rpn": self._rpn,
            "mask": self._mask,
            "dense": self._dense,
            "cls": self._images,
            "keypoint": self._heatmaps,
            "sem_seg": self._segmentation,
        }
        return {
            f"loss_kd_soft_target_{source}": compare[source](student, teacher, SOURCES[source].logits)
            for source in self.sources
        }

    def _images(self, student: Signals, teacher: Signals, name: str) -> Tensor:
        s_logits, t_logits, labels = student[name], teacher[name], student["labels"]
        rows = torch.ones(len(s_logits), dtype=torch.bool, device=s_logits.device)
        return self._compare(s_logits, t_logits, labels, rows=rows, weights=None)

    def _roi(self, student: Signals, teacher: Signals, name: str) -> Tensor:
        s_logits, t_logits, classes = student[name], teacher[name], student["roi_classes"]
        foreground, weights, dtype = classes < s_logits.shape[1] - 1, None, cast_up(s_logits).dtype
        if self.rois == "foreground" and self.weighs_rows:
            weights = mean_weights(foreground, dtype)
        elif self.rois == "foreground":
            rows = torch.nonzero(foreground).flatten()
            s_logits, t_logits, classes, foreground = (x[rows] for x in (s_logits, t_logits, classes, foreground))
        elif self.background_weight != 1:
            weights = torch.full(classes.shape, self.background_weight, dtype=dtype, device=classes.device)
            weights = weights.masked_fill(foreground, 1.0)
        return self._compare(s_logits, t_logits, classes, rows=foreground, weights=weights)

    def _compare(
        self, s_logits: Tensor, t_logits: Tensor, labels: Tensor, *, rows: Tensor, weights: Tensor | None
    ) -> Tensor:
        if self.standardize:
            s_logits, t_logits = standardize_logits(s_logits), standardize_logits(t_logits)
        return self.compare_classes(s_logits, t_logits, labels, rows, weights)

    def _rpn(self, student: Signals, teacher: Signals, name: str) -> Tensor:
        s_logits, t_logits = student[name], teacher[name]
        if self.anchors == "weighted":
            return weighted_anchors(s_logits, t_logits)
        # An RPN labels only a sample of its anchors, so that those in which the teacher sees an object are counted.
        objects = (t_logits.detach() > 0).long()
        count = positive_count(objects, background=0, dtype=cast_up(s_logits).dtype)
        return focal_soft_target_loss(s_logits, t_logits, normalizer=count)

    def _dense(self, student: Signals, teacher: Signals, name: str) -> Tensor:
        s_logits, t_logits = student[name], teacher[name]
        if isinstance(self.compare_classes, DividedTargets):
            return self.compare_classes.compare_levels(s_logits, t_logits, student["dense_counts"].tolist())
        if self.anchors == "weighted":
            return weighted_anchors(s_logits, t_logits)
        labels = student["dense_labels"]
        count = positive_count(labels, background=s_logits.shape[-1], dtype=cast_up(s_logits).dtype)
        return focal_soft_target_loss(s_logits, t_logits, weights=labels >= 0, normalizer=count)

    def _mask(self, student: Signals, teacher: Signals, name: str) -> Tensor:
        classes = student["mask_classes"]
        return binary_soft_target_loss(
            select_class(student[name], classes, per_class=1), select_class(teacher[name], classes, per_class=1)
        )

    def _heatmaps(self, student: Signals, teacher: Signals, name: str) -> Tensor:
        labels = student["keypoint_labels"]
        return self.map_weight * heatmap_loss(student[name], teacher[name], labels, temperature=self.temperature)

    def _segmentation(self, student: Signals, teacher: Signals, name: str) -> Tensor:
        labels = student["sem_seg_labels"]
        return self.map_weight * segmentation_loss(
            student[name], teacher[name], labels, kind=self.sem_seg, temperature=self.temperature
        )


def weighted_anchors(s_logits: Tensor, t_logits: Tensor) -> Tensor:
    """Averages the binary divergence over anchors and classes, weighted by the larger one of both probabilities."""
    weights = torch.maximum(s_logits.detach().sigmoid(), t_logits.detach().sigmoid())
    return binary_soft_target_loss(s_logits, t_logits, weights=weights)
