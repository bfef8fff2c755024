"""Labels images with trained detectors: a COCO file with boxes, masks, classes and scores, for training on it."""

from kd_det.labeling.label_images import LabelOptions, label_images

__all__ = ["LabelOptions", "label_images"]
