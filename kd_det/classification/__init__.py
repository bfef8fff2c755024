"""Adds image classifiers to Detectron2: the meta-architecture, the networks of the papers, data, evaluation."""

from kd_det.classification import cifar, fully_connected  # noqa: F401  registration
from kd_det.classification.image_classifier import ImageClassifier
from kd_det.classification.image_loader import build_classification_test_loader, build_classification_train_loader

__all__ = ["ImageClassifier", "build_classification_test_loader", "build_classification_train_loader"]
