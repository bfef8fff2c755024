"""Tiny detectors and batches, so that a test builds and runs a model in a fraction of a second."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances, Keypoints, PolygonMasks
from detectron2.utils.events import EventStorage
from torch import nn

from kd_det import add_kd_config
from kd_det.commands.console import run_command
from kd_det.engine import Trainer
from kd_det.engine.arguments import training_parser
from kd_det.registry import config_key

ROOT = Path(__file__).resolve().parents[1]
TRAIN_NET = ROOT / "tools" / "train_net.py"
CLASSES = ("square", "triangle", "bar")
LEVELS = ["p2", "p3", "p4", "p5"]

# In every model: 64-pixel images, three classes, few boxes, narrow layers.
TINY = {
    "VERSION": 2,
    "MODEL": {
        "DEVICE": "cpu",
        "WEIGHTS": "",
        "MASK_ON": True,
        "PIXEL_STD": [57.375, 57.12, 58.395],
        "BACKBONE": {"NAME": "build_basic_resnet_fpn_backbone", "FREEZE_AT": 0},
        "RESNETS": {"DEPTH": 10, "NORM": "BN", "STEM_OUT_CHANNELS": 8, "RES2_OUT_CHANNELS": 8},
        "FPN": {"IN_FEATURES": ["res2", "res3", "res4", "res5"], "OUT_CHANNELS": 16},
        "ANCHOR_GENERATOR": {"SIZES": [[8], [16], [32], [64]], "ASPECT_RATIOS": [[1.0]]},
        "RPN": {
            "IN_FEATURES": LEVELS,
            "PRE_NMS_TOPK_TRAIN": 40,
            "PRE_NMS_TOPK_TEST": 40,
            "POST_NMS_TOPK_TRAIN": 20,
            "POST_NMS_TOPK_TEST": 20,
            "BATCH_SIZE_PER_IMAGE": 16,
        },
        "ROI_HEADS": {"NAME": "StandardROIHeads", "IN_FEATURES": LEVELS, "NUM_CLASSES": 3, "BATCH_SIZE_PER_IMAGE": 16},
        "ROI_BOX_HEAD": {"NAME": "FastRCNNConvFCHead", "NUM_FC": 1, "FC_DIM": 24, "POOLER_RESOLUTION": 4},
        "ROI_MASK_HEAD": {
            "NAME": "MaskRCNNConvUpsampleHead",
            "NUM_CONV": 1,
            "CONV_DIM": 8,
            "POOLER_RESOLUTION": 4,
        },
        "RETINANET": {"IN_FEATURES": LEVELS, "NUM_CLASSES": 3, "NUM_CONVS": 1},
    },
    "INPUT": {"MIN_SIZE_TRAIN": [64], "MAX_SIZE_TRAIN": 96, "MIN_SIZE_TEST": 64, "MAX_SIZE_TEST": 96},
    "DATALOADER": {"NUM_WORKERS": 0},
    "SOLVER": {"IMS_PER_BATCH": 2, "BASE_LR": 0.001, "MAX_ITER": 2, "CHECKPOINT_PERIOD": 1000},
    "TEST": {"DETECTIONS_PER_IMAGE": 5},
    "SEED": 7,
}
SEGMENTING = {"SEM_SEG_HEAD.NUM_CLASSES": 4, "SEM_SEG_HEAD.CONVS_DIM": 8, "SEM_SEG_HEAD.NORM": ""}
# What makes another family of it.
FAMILIES = {
    "mask_rcnn": {},
    "c4": {
        "BACKBONE.NAME": "build_resnet_backbone",
        "RESNETS.DEPTH": 50,
        "RESNETS.OUT_FEATURES": ["res4"],
        "RESNETS.WIDTH_PER_GROUP": 4,
        "ANCHOR_GENERATOR.SIZES": [[8, 32]],
        "RPN.IN_FEATURES": ["res4"],
        "ROI_HEADS.NAME": "Res5ROIHeads",
        "ROI_HEADS.IN_FEATURES": ["res4"],
        "ROI_MASK_HEAD.NUM_CONV": 0,
    },
    "cascade": {"ROI_HEADS.NAME": "CascadeROIHeads", "ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True},
    "retinanet": {"META_ARCHITECTURE": "RetinaNet", "MASK_ON": False},
    "keypoint": {
        "MASK_ON": False,
        "KEYPOINT_ON": True,
        "ROI_KEYPOINT_HEAD.NUM_KEYPOINTS": 5,
        "ROI_KEYPOINT_HEAD.CONV_DIMS": [8],
        "ROI_KEYPOINT_HEAD.POOLER_RESOLUTION": 4,
    },
    "panoptic": {"META_ARCHITECTURE": "PanopticFPN"} | SEGMENTING,
    "semantic": {"META_ARCHITECTURE": "SemanticSegmentor", "MASK_ON": False} | SEGMENTING,
}
# A teacher is wider than a student, so that no test passes by equal shapes.
WIDE = {"MODEL.RESNETS.RES2_OUT_CHANNELS": 12, "MODEL.FPN.OUT_CHANNELS": 24, "MODEL.ROI_BOX_HEAD.FC_DIM": 40}
# The ResNet-18 with FPN that Detectron2 builds itself, with the widths of torchvision's and of ImageNet checkpoints.
STOCK_R18 = {
    "MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone",
    "MODEL.RESNETS.DEPTH": 18,
    "MODEL.RESNETS.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 64,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
}


def tiny_cfg(family: str = "mask_rcnn", options: dict | None = None) -> CfgNode:
    """Config of a tiny detector: the family's, then `options`, full key to value."""
    cfg = get_cfg()
    add_kd_config(cfg)
    cfg.merge_from_other_cfg(CfgNode(TINY))
    changes = {f"MODEL.{key}": value for key, value in FAMILIES[family].items()} | (options or {})
    cfg.merge_from_list([part for pair in changes.items() for part in pair])
    return cfg


def measured_cfg(depth: int) -> CfgNode:
    """Config of a tiny Mask R-CNN for measurements, in the place of one of this depth; the deeper one is wider."""
    options = {
        "MODEL.RESNETS.RES2_OUT_CHANNELS": {18: 8, 34: 16}[depth],
        "MODEL.RESNETS.NORM": "FrozenBN",
        "SOLVER.BASE_LR": 0.0,
    }
    cfg = tiny_cfg(options=options | {"MODEL.ROI_HEADS.NUM_CLASSES": 6})
    cfg.KD.SOFT_TARGET.SOURCES = ["roi", "rpn", "mask"]
    cfg.KD.HINT.IN_FEATURES = LEVELS
    return cfg


def write_yaml(path: Path, cfg: CfgNode) -> str:
    path.write_text(cfg.dump(), encoding="utf-8")
    return str(path)


def save_teacher(folder: Path, cfg: CfgNode, *, seed: int = 1) -> dict[str, str]:
    """Write ``teacher.yaml`` and ``teacher.pth``; returns the options that name them."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    torch.save({"model": build_model(cfg).state_dict()}, folder / "teacher.pth")
    config = write_yaml(folder / "teacher.yaml", cfg)
    return {"KD.TEACHER.CONFIG_FILE": config, "KD.TEACHER.WEIGHTS": str(folder / "teacher.pth")}


def distilled_cfg(
    teacher: dict[str, str], heads: list[str], options: dict | None = None, family="mask_rcnn"
) -> CfgNode:
    """Config of a tiny student beside a teacher; heads look at p2 to p5 where nothing else is asked for."""
    cfg = tiny_cfg(family)
    cfg.KD.STUDENT_ARCHITECTURE = cfg.MODEL.META_ARCHITECTURE
    cfg.MODEL.META_ARCHITECTURE = "TeacherStudent"
    cfg.KD.HEADS = heads
    for name in heads:
        if "IN_FEATURES" in cfg.KD.get(config_key(name), {}):
            cfg.KD[config_key(name)].IN_FEATURES = LEVELS
    cfg.KD.REVIEW.MID_CHANNELS = 8
    changes = teacher | (options or {})
    cfg.merge_from_list([part for pair in changes.items() for part in pair])
    return cfg


def build(cfg: CfgNode, *, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build_model(cfg).train()


def step(model: nn.Module, inputs: list[dict], *, iteration: int = 0, seed: int = 0) -> dict[str, torch.Tensor]:
    """Losses of a model on a batch, with the same random samples of boxes for the same seed."""
    torch.manual_seed(seed)
    with EventStorage(iteration):
        return model(inputs)


def student_losses(losses: dict) -> dict:
    return {key: value for key, value in losses.items() if not key.startswith("loss_kd_")}


def rectangle(x0, y0, x1, y1):
    return [np.array([x0, y0, x1, y0, x1, y1, x0, y1], dtype=np.float64)]


def tiny_inputs(sizes=((64, 96), (56, 80)), *, empty=(), seed: int = 0) -> list[dict]:
    """A batch as the mapper gives it: images of noise, two objects each but for the images named by `empty`.

    An object has five keypoints on its diagonal, the last one not visible. Pixels of the left half are of class 3, or
    of none at the top, and those of the right half are of class 1.
    """
    rng = np.random.default_rng(seed)
    batch = []
    for index, (height, width) in enumerate(sizes):
        image = torch.from_numpy(rng.integers(0, 256, (3, height, width), np.uint8))
        boxes = [] if index in empty else [(4, 6, 28, 30), (width - 40, 10, width - 8, height - 10)]
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
        instances.gt_classes = torch.tensor([index % 3, 2][: len(boxes)], dtype=torch.int64)
        instances.gt_masks = PolygonMasks([rectangle(*box) for box in boxes])
        corners = instances.gt_boxes.tensor.reshape(-1, 1, 2, 2)
        places = corners[..., 0, :].lerp(corners[..., 1, :], torch.arange(1, 6).reshape(5, 1) / 6)
        visible = torch.tensor([2.0, 2.0, 1.0, 2.0, 0.0]).expand(len(boxes), 5)
        instances.gt_keypoints = Keypoints(torch.cat([places, visible[..., None]], dim=2))
        segments = torch.ones(height, width, dtype=torch.int64)
        segments[:, : width // 2] = 3
        segments[:8, : width // 2] = 255
        batch.append({"image": image, "instances": instances, "sem_seg": segments, "height": height, "width": width})
    return batch


def attached(model: nn.Module) -> dict[str, list]:
    """All that hangs on the modules of a model beside their own attributes: hooks, and methods that are shadowed."""
    found = {}
    for name, module in model.named_modules():
        hooks = [*module._forward_hooks, *module._forward_pre_hooks, *module._backward_hooks]
        shadowed = [key for key, value in vars(module).items() if callable(value) and hasattr(type(module), key)]
        if hooks or shadowed:
            found[name] = hooks + shadowed
    return found


def write_coco_folder(root: Path, *, images: int = 4) -> Path:
    """Write ``images/*.png`` and ``instances.json``: two objects per image, 96 x 64 pixels."""
    (root / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    data = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 96, "height": 64} for i in range(1, images + 1)],
        "categories": [{"id": i, "name": name} for i, name in enumerate(CLASSES, 1)],
        "annotations": [],
    }
    for image in data["images"]:
        pixels = rng.integers(0, 80, (64, 96, 3), np.uint8)
        for x, y, w, h in ((4, 6, 24, 24), (50, 10, 36, 40)):
            number = len(data["annotations"]) + 1
            pixels[y : y + h, x : x + w] += 60 * rng.integers(1, 3, 3, np.uint8)
            box = {"bbox": [x, y, w, h], "area": w * h, "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]]}
            data["annotations"].append(
                {"id": number, "image_id": image["id"], "category_id": 1 + number % 3, "iscrowd": 0, **box}
            )
        cv2.imwrite(str(root / "images" / image["file_name"]), pixels)
    (root / "instances.json").write_text(json.dumps(data), encoding="utf-8")
    return root


def with_data(cfg: CfgNode, root: Path, output: Path, name: str = "") -> CfgNode:
    """Train and test on a COCO-format folder. A data set's name stands for one folder per process: here its path."""
    name = name or str(root).strip("/").replace("/", "_").replace(".", "_")
    entry = {"JSON": str(root / "instances.json"), "IMAGE_ROOT": str(root / "images")}
    cfg.DATASETS.COCO_FORMAT[name] = CfgNode(entry)
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (name,)
    cfg.OUTPUT_DIR = str(output)
    return cfg


def parse(*arguments: str) -> argparse.Namespace:
    """Arguments of ``kd-det train``."""
    return training_parser("").parse_args(list(map(str, arguments)))


def train_net(*arguments: str) -> None:
    """Run ``kd-det train`` in this process; as there, a user's mistake raises SystemExit with its one line."""
    run_command("train", list(map(str, arguments)))


class Cut(BaseException):
    """Ends a run as nothing does that it would report."""


@contextmanager
def interrupted_at(iteration: int, kind: type[Trainer] = Trainer) -> Iterator[None]:
    """Inside, a run ends before an iteration of a trainer of just this kind, as an error ends it; and so it must."""
    step = kind.run_step

    def run_step(trainer):
        if trainer.iter == iteration and type(trainer) is kind:
            raise Cut
        step(trainer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "run_step", run_step)
        with pytest.raises(Cut):
            yield


def run_train_net(*arguments: str, launcher: tuple[str, ...] = (), cwd: Path | None = None):
    """Run ``tools/train_net.py`` in a process of its own, on one thread."""
    command = [sys.executable, *launcher, TRAIN_NET, *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=environment, cwd=cwd, timeout=300
    )
