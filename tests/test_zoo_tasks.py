"""Distils the model zoo's configs for keypoints, panoptic and semantic segmentation, on tiny data by tiny models."""

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import BoxMode
from helpers import attached, build, parse, step

from kd_det.config import merge_file
from kd_det.config_files import find_config
from kd_det.engine import setup
from kd_det.engine.loaders import build_train_loader
from kd_det.engine.run_config import make_config

KEYPOINT = "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml"
PANOPTIC = "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml"
SEMANTIC = "Misc/semantic_R_50_FPN_1x.yaml"
SMALL = {
    "MODEL.WEIGHTS": "",
    "MODEL.DEVICE": "cpu",
    "MODEL.RESNETS.WIDTH_PER_GROUP": 4,
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 8,
    "MODEL.FPN.OUT_CHANNELS": 16,
    "MODEL.ROI_HEADS.NUM_CLASSES": 1,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 24,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 8,
    "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS": 2,
    "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS": [8],
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 3,
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 32,
}
DATA = "people_on_lawns"
pytestmark = pytest.mark.usefixtures("in_process")


def flat(options):
    return [part for pair in options.items() for part in pair]


@pytest.fixture
def people(tmp_path):
    """A data set of two images with an object each, which has a mask and two keypoints, on a ground of two classes."""
    box, segments = [8, 8, 40, 40], np.ones((64, 96), np.uint8)
    segments[8:48, 8:48], segments[:, 72:], segments[56:] = 0, 2, 255
    cv2.imwrite(str(tmp_path / "segments.png"), segments)
    cv2.imwrite(str(tmp_path / "image.png"), np.random.default_rng(0).integers(0, 255, (64, 96, 3), np.uint8))
    annotation = {"bbox": box, "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0, "iscrowd": 0}
    annotation |= {"segmentation": [[8, 8, 48, 8, 48, 48, 8, 48]], "keypoints": [20, 20, 2, 30, 30, 2]}
    record = {"file_name": str(tmp_path / "image.png"), "sem_seg_file_name": str(tmp_path / "segments.png")}
    record |= {"height": 64, "width": 96, "annotations": [annotation]}
    DatasetCatalog.register(DATA, lambda: [record | {"image_id": i} for i in (1, 2)])
    MetadataCatalog.get(DATA).set(
        thing_classes=["person"],
        stuff_classes=["things", "lawn", "sky"],
        keypoint_names=["head", "foot"],
        keypoint_flip_map=[],
    )


@pytest.mark.parametrize(
    ("config", "sources", "levels"),
    [
        (KEYPOINT, ["roi"], ["p2", "p3", "p4", "p5", "p6"]),
        (PANOPTIC, ["roi"], ["p2", "p3", "p4", "p5", "p6"]),
        (SEMANTIC, ["sem_seg"], ["p2", "p3", "p4", "p5"]),
    ],
)
def test_heads_compare_what_the_models_have(config, sources, levels):
    arguments = ["--teacher", "t.yaml", "--kd-heads", "ReviewKDHead,FactorTransferHead,SoftTargetHead"]
    cfg = make_config(parse("--config-file", config, *arguments))
    assert sources == cfg.KD.SOFT_TARGET.SOURCES
    assert levels == cfg.KD.REVIEW.IN_FEATURES
    assert (["roi_features"] if "roi" in sources else levels) == cfg.KD.FACTOR_TRANSFER.IN_FEATURES


@pytest.mark.parametrize(
    ("config", "sources", "own"),
    [
        (KEYPOINT, ["roi", "keypoint"], "loss_keypoint"),
        (PANOPTIC, ["roi", "mask", "sem_seg"], "loss_sem_seg"),
        (SEMANTIC, ["sem_seg"], "loss_sem_seg"),
    ],
)
def test_zoo_configs_take_a_step(people, tmp_path, config, sources, own):
    """The twin of the student, with other weights, is the teacher."""
    twin = get_cfg()
    merge_file(twin, find_config(config))
    twin.merge_from_list(flat(SMALL))
    torch.save(build_model(twin).state_dict(), tmp_path / "twin.pth")
    options = SMALL | {"KD.TEACHER.OPTS": flat(SMALL), "KD.SOFT_TARGET.SOURCES": sources}
    options |= {"DATASETS.TRAIN": f"('{DATA}',)", "DATASETS.TEST": "()", "DATALOADER.NUM_WORKERS": 0}
    options |= {"SOLVER.MAX_ITER": 1, "SOLVER.IMS_PER_BATCH": 2, "INPUT.MIN_SIZE_TRAIN": "(64,)"}
    options |= {"OUTPUT_DIR": tmp_path / "output", "SEED": 1}
    teacher = ["--teacher", config, "--teacher-weights", tmp_path / "twin.pth"]
    cfg = setup(parse("--config-file", config, *teacher, "--kd-heads", "HintHead,SoftTargetHead", *flat(options)))
    model = build(cfg)
    losses = step(model, next(iter(build_train_loader(cfg))))
    assert losses[own] > 0
    assert losses["loss_kd_hint"] > 0
    assert all(losses[f"loss_kd_soft_target_{source}"] > 0 for source in sources)
    sum(losses.values()).backward()
    assert [name for name, p in model.student.named_parameters() if p.requires_grad and p.grad is None] == []
    assert attached(model) == {}
