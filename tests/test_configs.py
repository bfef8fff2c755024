"""Every config file trains, and each distilled student differs from its baseline in nothing but the distillation."""

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from detectron2 import model_zoo
from detectron2.config import get_cfg
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.structures import Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage

from kd_det import InputError, add_kd_config
from kd_det.config import merge_file, student_config
from kd_det.engine.stages import Pretraining, check_stage, stage_config
from kd_det.registry import config_key
from kd_det.teacher import load_teacher_config

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(path for path in ROOT.glob("configs/**/*.yaml") if not path.name.startswith("Base-"))
PUBLISHED = ("configs", "COCO-Detection", "COCO-InstanceSegmentation", "PascalVOC-Detection", "Classification")
COMMAND = "configs/reviewkd_r101_r18.yaml"
# An R-CNN of few channels; GroupNorm, because random weights explode below the frozen BatchNorm of the files.
NARROW = {
    "MODEL.RESNETS.NORM": "GN",
    "MODEL.FPN.OUT_CHANNELS": 32,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 32,
    "MODEL.RETINANET.NUM_CONVS": 1,
}


@pytest.fixture(autouse=True)
def _at_root_with_seed(monkeypatch):
    monkeypatch.chdir(ROOT)  # VOC's configs name their teachers relative to it
    torch.manual_seed(0)


def name_of(path):
    return str(path.relative_to(ROOT / "configs"))


def load(path):
    cfg = get_cfg()
    add_kd_config(cfg)
    merge_file(cfg, str(path))
    return cfg


@functools.cache
def ancestors(path):
    """The files that `path` inherits from, nearest first."""
    bases = yaml.safe_load(path.read_text()).get("_BASE_", [])
    bases = [path.parent / base for base in ([bases] if isinstance(bases, str) else bases)]
    return [Path(os.path.normpath(file)) for base in bases for file in (base, *ancestors(base))]


# To be read: what a test changes it clones.
CONFIGS = {path: load(path) for path in FILES}


def shrink(cfg):
    """Make a model cheap: its depth, heads and levels stay. Returns the overrides as a list."""
    small = {"MODEL.WEIGHTS": "", "MODEL.DEVICE": "cpu", "MODEL.TIMM.PRETRAINED": False, "MODEL.TIMM.NORM": "BN"}
    if student_config(cfg).MODEL.META_ARCHITECTURE == "ImageClassifier":
        pass  # small enough for images of 32 or 64 pixels
    elif cfg.MODEL.BACKBONE.NAME != "build_basic_resnet_fpn_backbone":  # that one's models are small already
        small |= NARROW
        if cfg.MODEL.RESNETS.DEPTH >= 50:
            small |= {"MODEL.RESNETS.STEM_OUT_CHANNELS": 32, "MODEL.RESNETS.WIDTH_PER_GROUP": 32}
            small |= {"MODEL.RESNETS.RES2_OUT_CHANNELS": 64}
    options = [part for pair in small.items() for part in pair]
    cfg.merge_from_list(options)
    return options


def save_teacher(cfg, path):
    """Save random weights for the teacher of a config, shrunk, and point the config to them."""
    cfg.KD.TEACHER.WEIGHTS = str(path)
    teacher_cfg, _ = load_teacher_config(cfg)
    cfg.KD.TEACHER.OPTS = [*cfg.KD.TEACHER.OPTS, *shrink(teacher_cfg)]
    torch.save({"model": build_model(teacher_cfg).state_dict()}, path)


def make_batch(cfg):
    """Two images of different sizes with two objects each, or four for a classifier."""
    architecture = student_config(cfg).MODEL.META_ARCHITECTURE
    if architecture == "ImageClassifier":
        size = min(cfg.INPUT.CLASSIFICATION.SIZE, 64)
        return [{"image": torch.randint(256, (3, size, size)), "label": i} for i in range(4)]
    retinanet = architecture == "RetinaNet"
    node = cfg.MODEL.RETINANET if retinanet else cfg.MODEL.ROI_HEADS
    boxes = torch.tensor([[8.0, 8, 56, 72], [40, 16, 88, 60]])
    batch = []
    for height, width in ((96, 96), (80, 112)):
        instances = Instances(
            (height, width), gt_boxes=Boxes(boxes), gt_classes=torch.tensor([0, node.NUM_CLASSES - 1])
        )
        instances.gt_masks = PolygonMasks([[np.array([x0, y0, x1, y0, x1, y1, x0, y1])] for x0, y0, x1, y1 in boxes])
        batch.append({"image": torch.randint(256, (3, height, width)).float(), "instances": instances})
    return batch


def gradients(loss, module):
    """The loss's gradient for each trained parameter of the module, None for those that it does not depend on."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    assert all(grad is None or grad.isfinite().all() for grad in grads)
    return grads


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_config_trains_one_step(path, tmp_path):
    cfg = CONFIGS[path].clone()
    cfg.KD.MUTUAL.OPTS = shrink(cfg)
    if cfg.KD.HEADS:
        save_teacher(cfg, tmp_path / "teacher.pth")
    model = build_model(cfg).train()
    if cfg.KD.HEADS:
        check_stage(cfg, model.heads)
    optimizer = build_optimizer(cfg, model)
    before = [parameter.detach().clone() for parameter in model.parameters() if parameter.requires_grad]
    nodes = {name: cfg.KD[config_key(name)] for name in cfg.KD.HEADS}
    start = max((node.SCHEDULE.START + node.SCHEDULE.WARMUP for node in nodes.values()), default=0)
    raw = {}
    for name in nodes:
        model.heads[name].register_forward_hook(lambda _, __, losses, name=name: raw.update({name: losses}))

    with EventStorage(start):
        losses = model(make_batch(cfg))
    assert all(loss.isfinite() for loss in losses.values())
    for name, node in nodes.items():
        assert node.WEIGHT > 0
        assert raw[name] or model.heads[name].signals == ()  # a head whose work ends with its stage
        for key, loss in raw[name].items():
            assert loss != 0
            assert torch.equal(losses[key], node.WEIGHT * loss)
            assert any(grad is not None and grad.any() for grad in gradients(loss, model.student))
        if raw[name] and any(p.requires_grad for p in model.heads[name].parameters()):
            assert all(grad is not None for grad in gradients(sum(raw[name].values()), model.heads[name]))
    if path in MUTUAL:
        assert all(losses[f"loss_kd_mutual_peer_{i}"] > 0 for i in range(1, len(model.students) + 1))
    sum(losses.values()).backward()
    optimizer.step()
    after = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


STAGED = [path for path, cfg in CONFIGS.items() if cfg.KD.PRETRAIN.MAX_ITER]


@pytest.mark.parametrize("path", STAGED, ids=name_of)
def test_config_trains_one_step_of_its_stage(path, tmp_path):
    cfg = CONFIGS[path].clone()
    shrink(cfg)
    save_teacher(cfg, tmp_path / "teacher.pth")
    model = Pretraining(stage_config(cfg, tmp_path)).train()
    optimizer = build_optimizer(cfg, model)
    trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    with EventStorage():
        losses = model(make_batch(cfg))
    assert losses
    assert all(loss > 0 and loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    optimizer.step()
    for name, p in model.named_parameters():
        if name.startswith("heads.") and name in trained:
            assert not torch.equal(p, trained[name]), name


DISTILLED = [path for path, cfg in CONFIGS.items() if cfg.MODEL.META_ARCHITECTURE == "TeacherStudent"]
MUTUAL = [path for path, cfg in CONFIGS.items() if cfg.MODEL.META_ARCHITECTURE == "MutualStudents"]
BASELINES = {path: next(parent for parent in ancestors(path) if parent in FILES) for path in DISTILLED + MUTUAL}


def test_each_published_pair_has_a_baseline_and_a_teacher_that_one_can_get():
    published = [path for path in DISTILLED if path.parent.name in PUBLISHED]
    assert published
    for path in published:
        assert BASELINES[path] not in DISTILLED
        teacher = CONFIGS[path].KD.TEACHER
        if teacher.CONFIG_FILE.startswith("configs/"):
            own = f"{load(teacher.CONFIG_FILE).OUTPUT_DIR}/model_final.pth"
            assert own == teacher.WEIGHTS or teacher.WEIGHTS.startswith("https://download.pytorch.org/models/resnet")
        else:
            assert model_zoo.get_checkpoint_url(teacher.CONFIG_FILE)
            assert teacher.WEIGHTS == ""
    folders = [cfg.OUTPUT_DIR for path, cfg in CONFIGS.items() if path.parent.name in PUBLISHED]
    assert len(folders) == len(set(folders)), "one would overwrite the other's output"


@pytest.mark.parametrize("path", BASELINES, ids=name_of)
def test_distilled_student_is_its_baseline(path):
    """Same data, schedule, initial weights and model, which can be built in full size."""
    distilled, baseline = CONFIGS[path].clone(), CONFIGS[BASELINES[path]].clone()
    assert distilled.OUTPUT_DIR != baseline.OUTPUT_DIR
    student = student_config(distilled)
    for cfg in (student, baseline):
        cfg.OUTPUT_DIR, cfg.KD, cfg.MODEL.DEVICE, cfg.MODEL.TIMM.PRETRAINED = "", "", "meta", False
    assert student == baseline
    with torch.device("meta"):  # It allocates nothing.
        build_model(student)


def test_weights_of_reviewkd_are_the_published_ones():
    weights = {
        "reviewkd_r101_r18": 1.2,
        "COCO-Detection/reviewkd_faster_rcnn_R_50_FPN_from_R_101": 1.0,
        "COCO-Detection/reviewkd_faster_rcnn_MobileNetV2_FPN_from_R_50": 2.0,
        "COCO-Detection/reviewkd_retinanet_R_50_FPN_from_R_101": 1.0,
        "COCO-InstanceSegmentation/reviewkd_mask_rcnn_R_18_FPN_from_R_101": 1.5,
        "COCO-InstanceSegmentation/reviewkd_mask_rcnn_R_50_FPN_from_R_101": 0.8,
        "COCO-InstanceSegmentation/reviewkd_mask_rcnn_MobileNetV2_FPN_from_R_50": 1.0,
    }
    assert {name: load(ROOT / f"configs/{name}.yaml").KD.REVIEW.WEIGHT for name in weights} == weights


@pytest.mark.parametrize(
    ("ours", "zoo"),
    [
        ("COCO-Detection/faster_rcnn_R_50_FPN.yaml", "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"),
        ("COCO-Detection/retinanet_R_50_FPN.yaml", "COCO-Detection/retinanet_R_50_FPN_1x.yaml"),
        ("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN.yaml", "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"),
        ("PascalVOC-Detection/faster_rcnn_R_50_FPN.yaml", "PascalVOC-Detection/faster_rcnn_R_50_FPN.yaml"),
    ],
)
def test_baseline_is_that_of_the_model_zoo(ours, zoo):
    """But for the schedule on COCO: half the images per iteration, half the learning rate, twice the iterations."""
    ours, zoo = load(f"configs/{ours}"), load(model_zoo.get_config_file(zoo))
    sizes = [np.array(cfg.MODEL.ANCHOR_GENERATOR.pop("SIZES")) for cfg in (ours, zoo)]
    assert sizes[0] == pytest.approx(sizes[1], abs=1e-6)
    factor = zoo.SOLVER.IMS_PER_BATCH // ours.SOLVER.IMS_PER_BATCH
    assert factor * ours.SOLVER.BASE_LR == pytest.approx(zoo.SOLVER.BASE_LR)
    assert [ours.SOLVER.MAX_ITER, *ours.SOLVER.STEPS] == [factor * i for i in (zoo.SOLVER.MAX_ITER, *zoo.SOLVER.STEPS)]
    for node in ("MODEL", "INPUT", "DATASETS", "TEST"):
        assert plain(ours[node]) == plain(zoo[node])


def plain(node):
    """A node without the difference between tuples and lists."""
    return json.loads(json.dumps(node))


# ---- The documented command ----


def make_coco(root):
    """Write a tree of COCO 2017 with four images in each split."""
    ids = MetadataCatalog.get("coco_2017_val").thing_dataset_id_to_contiguous_id
    names = MetadataCatalog.get("coco_2017_val").thing_classes
    categories = [{"id": id_, "name": names[index]} for id_, index in ids.items()]
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        (root / f"coco/{split}2017").mkdir(parents=True)
        images, annotations = [], []
        for i in range(1, 5):
            image = rng.integers(0, 255, (96, 128, 3), dtype=np.uint8)
            cv2.imwrite(str(root / f"coco/{split}2017/{i}.jpg"), image)
            images.append({"id": i, "file_name": f"{i}.jpg", "height": 96, "width": 128})
            box = {"bbox": [20, 16, 60, 48], "area": 2880, "segmentation": [[20, 16, 80, 16, 80, 64, 20, 64]]}
            annotations.append({"id": i, "image_id": i, "category_id": categories[i]["id"], "iscrowd": 0, **box})
        file = root / f"coco/annotations/instances_{split}2017.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))


def run_tool(*arguments, datasets):
    return subprocess.run(
        [sys.executable, "tools/train_net.py", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "DETECTRON2_DATASETS": str(datasets), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_documented_command_trains_evaluates_and_saves_a_plain_student(tmp_path):
    make_coco(tmp_path)
    cfg = load(COMMAND)
    options = shrink(cfg)
    save_teacher(cfg, tmp_path / "teacher.pth")
    options += ["KD.TEACHER.WEIGHTS", tmp_path / "teacher.pth", "KD.TEACHER.OPTS", cfg.KD.TEACHER.OPTS]
    options += ["SOLVER.MAX_ITER", 2, "SOLVER.STEPS", (), "SOLVER.IMS_PER_BATCH", 2, "SOLVER.BASE_LR", 1e-4]
    options += ["INPUT.MIN_SIZE_TRAIN", (96,), "INPUT.MIN_SIZE_TEST", 96, "DATALOADER.NUM_WORKERS", 0]
    options += [
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST",
        0.0,
        "TEST.DETECTIONS_PER_IMAGE",
        5,
        "OUTPUT_DIR",
        tmp_path / "out",
    ]

    done = run_tool("--config-file", COMMAND, *options, datasets=tmp_path)

    assert done.returncode == 0, done.stderr
    metrics = [json.loads(line) for line in (tmp_path / "out/metrics.json").read_text().splitlines()]
    assert any(row.get("loss_kd_review", 0) > 0 for row in metrics)
    assert any("bbox/AP" in row for row in metrics)
    checkpoint = torch.load(tmp_path / "out/model_final.pth", weights_only=True)
    build_model(student_config(cfg)).load_state_dict(checkpoint["model"])
    assert all(key.startswith("ReviewKDHead.") for key in checkpoint["kd_heads"])


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("KD.REVIEWKD", "KD: {REVIEWKD: {LOSS_WEIGHT: 1.2}}"),
        ("KD.TEACHER.CONFIG", "KD: {TEACHER: {CONFIG: teacher.yaml}}"),
        ("MODEL.RESNETS.DEPHT", "MODEL: {RESNETS: {DEPHT: 18}}"),
    ],
)
def test_unknown_key_is_named_with_its_file(key, text, tmp_path):
    path = tmp_path / "typo.yaml"
    path.write_text(f"_BASE_: {ROOT / COMMAND}\n{text}\n")
    with pytest.raises(InputError, match=re.escape(f"{path}: Non-existent config key: {key}")):
        load(path)
