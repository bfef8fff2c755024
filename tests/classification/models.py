"""Tiny image classifiers and batches for them."""

import torch
from detectron2.config import CfgNode, get_cfg

from kd_det import add_kd_config

CLASSES = 3
# Student and teacher differ in width or in depth. Detectron2's and timm's networks begin at stride 4.
PAIRS = {
    "cifar_resnet": ("resnet8", "resnet8x4"),
    "wide_resnet": ("wrn_16_1", "wrn_16_2"),
    "detectron2": (18, 50),
    "timm": ("mobilenetv3_small_050", "mobilenetv2_050"),
}
STAGES = {
    "cifar_resnet": ["res2", "res3", "res4"],
    "wide_resnet": ["res2", "res3", "res4"],
    "detectron2": ["res2", "res3", "res4", "res5"],
    "timm": ["res2", "res3", "res4", "res5"],
}


def classifier_cfg(family: str = "cifar_resnet", *, teacher: bool = False, options: dict | None = None) -> CfgNode:
    """Config of a classifier of three classes: a family's student or teacher, then `options`, full key to value."""
    cfg = get_cfg()
    add_kd_config(cfg)
    name = PAIRS[family][teacher]
    cfg.MODEL.META_ARCHITECTURE = "ImageClassifier"
    cfg.MODEL.WEIGHTS = ""
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.CLASSIFIER.NUM_CLASSES = CLASSES
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.INPUT.FORMAT = "RGB"
    if family == "detectron2":
        cfg.MODEL.RESNETS.OUT_FEATURES = STAGES[family]
        cfg.MODEL.RESNETS.DEPTH = name
        if name < 50:
            cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    elif family == "timm":
        cfg.MODEL.BACKBONE.NAME = "build_timm_classifier_backbone"
        cfg.MODEL.TIMM.NAME, cfg.MODEL.TIMM.PRETRAINED = name, False
    else:
        cfg.MODEL.BACKBONE.NAME, cfg.MODEL.CIFAR.NAME = "build_cifar_backbone", name
    for head in ("REVIEW", "ATTENTION_TRANSFER", "HINT"):
        cfg.KD[head].IN_FEATURES = STAGES[family]
    cfg.KD.REVIEW.MID_CHANNELS = 8
    cfg.KD.SOFT_TARGET.SOURCES = ["cls"]
    cfg.SOLVER.IMS_PER_BATCH = 4
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.merge_from_list([part for pair in (options or {}).items() for part in pair])
    return cfg


def classifier_inputs(size: int = 32, count: int = 4, *, seed: int = 0) -> list[dict]:
    """A batch of noise, as the mapper gives it."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
    return [{"image": image, "label": i % CLASSES, "file_name": f"{i}.png"} for i, image in enumerate(images)]
