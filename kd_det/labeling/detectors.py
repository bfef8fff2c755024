"""Loads trained detectors of any kind, and detects objects with one of them or with several together."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.structures import Instances
from torch import nn

from kd_det.analysis.ensemble import fuse_instances, load_boxes_fusion
from kd_det.config import default_config
from kd_det.config_checks.training import check_tta
from kd_det.data import DetectionMapper
from kd_det.errors import InputError, shorten
from kd_det.export import find_run
from kd_det.teacher import Teacher
from kd_det.teacher_classes import count_object_classes, trained_class_names
from kd_det.teacher_kinds import teacher_kind


@dataclass(frozen=True)
class Detector:
    """Holds a trained detector.

    Attributes:
        source: Source of the model, as the user wrote it.
        cfg: Its plain config, or a description of it.
        model: The model in evaluation mode, with test-time augmentation around it if that is asked for.
        classes: Names of its classes, in the order of its indices; [] if they are not known.
        count: Number of its classes; None if it is not known.
        fingerprint: Hash of its weights and its config.
    """

    source: str
    cfg: CfgNode
    model: nn.Module
    classes: list[str]
    count: int | None
    fingerprint: str

    def detect(self, record: dict[str, Any]) -> Instances:
        """Returns the objects in an image as the mapper gives it, on the CPU.

        Raises:
            InputError: If the model is not a detector.
        """
        output = self.model([record])[0]
        if "instances" not in output:
            raise InputError(
                f"--teacher {self.source}: its model gives {', '.join(output)}; only detectors, which give instances, "
                "can label images."
            )
        return output["instances"].to("cpu")


def load_detector(source: str, device: str, tta: Sequence[int] | None = None) -> Detector:
    """Loads a trained detector.

    Args:
        source: An output folder, "CONFIG:WEIGHTS", or a config alone with the weights that a teacher of this name has.
        device: Device of the model.
        tta: Sizes of test-time augmentation, those of TEST.AUG.MIN_SIZES of its config if there are none; None detects
            in each image once.

    Raises:
        InputError: If the config or the weights cannot be read, or the model cannot label images.
    """
    config, weights = find_run(source) if os.path.isdir(source) else split_source(source)
    cfg = default_config()
    cfg.merge_from_list(["KD.TEACHER.CONFIG_FILE", config, "KD.TEACHER.WEIGHTS", weights, "MODEL.DEVICE", device])
    try:
        kind = teacher_kind(cfg)
        if not kind.predicts:
            raise InputError("it gives feature maps only; a detector is needed.")
        # The checkpoint holds all weights of a network that would otherwise begin with those of timm.
        kind.description.MODEL.TIMM.PRETRAINED = False
        network = kind.build(trained=True)
        kind.load(network)
        teacher = Teacher(network)
        count = count_object_classes(teacher.spec())
        model = network if tta is None else augment(network, kind.description, count, tta)
        classes = trained_class_names(kind, count)
    except InputError as error:
        raise InputError(f"--teacher {source}: {error}") from error
    fingerprint = hashlib.sha256(f"{teacher.fingerprint()} {kind.description.dump()}".encode()).hexdigest()
    return Detector(source, kind.description, model, classes, count, fingerprint)


def split_source(source: str) -> tuple[str, str]:
    """Splits CONFIG:WEIGHTS; the weights are empty for a config alone, whose own ones are taken then."""
    config, _, weights = source.partition(":")
    return (source, "") if config == "timm" else (config, weights)


def augment(model: nn.Module, cfg: CfgNode, count: int | None, sizes: Sequence[int]) -> nn.Module:
    """Adds Detectron2's test-time augmentation: several sizes of each image, also flipped, as ``TEST.AUG`` says.

    Args:
        model: The detector.
        cfg: Its config.
        count: Number of its classes.
        sizes: Lengths in pixels of the shorter side; those of ``TEST.AUG.MIN_SIZES`` if there are none.

    Raises:
        InputError: If Detectron2 does not augment images of this model.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.TEST.AUG.ENABLED = True
    cfg.TEST.AUG.MIN_SIZES = list(sizes) or cfg.TEST.AUG.MIN_SIZES
    check_tta(cfg)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = count  # A LazyConfig does not describe it.
    return GeneralizedRCNNWithTTA(cfg, model).eval()


def check_classes(detectors: Sequence[Detector], expected: Sequence[str], owner: str) -> None:
    """Checks that detectors know just the classes of a config, in the same order.

    Args:
        detectors: The detectors.
        expected: Names of the classes.
        owner: Whose classes they are, for messages.

    Raises:
        InputError: If one does not.
    """
    for detector in detectors:
        known = detector.classes or list(expected)
        count = len(known) if detector.count is None else detector.count
        if known != list(expected) or count != len(expected):
            names = f" ({shorten(detector.classes, 8)})" if detector.classes else ""
            raise InputError(
                f"--teacher {detector.source}: it knows {count} classes{names}, but {owner} has {len(expected)} "
                f"({shorten(expected, 8)}): the same classes in the same order are needed."
            )


class Detection:
    """Detects objects in images with one detector, or with several whose boxes are fused.

    For the fusion see :class:`kd_det.analysis.ensemble.Ensemble`: the score of a fused box is the mean of the
    detectors' scores times the share of them that found the object. If any of the detectors predicts masks, a fused
    box has the mask of the detection of its class that overlaps it most.

    Args:
        detectors: The detectors, of the same classes.
        iou_threshold: Overlap (IoU) above which boxes are taken for the same object.
    """

    def __init__(self, detectors: Sequence[Detector], iou_threshold: float):
        self.detectors = list(detectors)
        self.iou_threshold = iou_threshold
        self.fuse = load_boxes_fusion() if len(self.detectors) > 1 else None
        limits = [detector.cfg.TEST.DETECTIONS_PER_IMAGE for detector in self.detectors]
        self.detections_per_image = None if min(limits) < 0 else max(limits)

    @property
    def mappers(self) -> list[DetectionMapper]:
        """Returns what reads an image for each detector."""
        return [DetectionMapper(detector.cfg, is_train=False) for detector in self.detectors]

    @torch.no_grad()
    def __call__(self, views: Sequence[dict[str, Any]]) -> Instances:
        """Returns the objects in an image, on the CPU.

        Args:
            views: The image as each of :attr:`mappers` gives it.
        """
        found = [detector.detect(view) for detector, view in zip(self.detectors, views, strict=True)]
        if self.fuse is None:
            return found[0]
        return fuse_instances(
            self.fuse,
            found,
            iou_threshold=self.iou_threshold,
            detections_per_image=self.detections_per_image,
            masks=any(instances.has("pred_masks") for instances in found),
        )
