"""Every config file trains, every recipe fits every student, and distillation changes nothing else of a student."""

import functools
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from detectron2 import model_zoo
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.structures import Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage

from kd_det import InputError
from kd_det.config import look_up, student_config
from kd_det.config_files import default_output_dir
from kd_det.engine import check_run
from kd_det.engine.arguments import training_parser
from kd_det.engine.run_config import make_config
from kd_det.engine.stages import Pretraining, check_stage, stage_config
from kd_det.heads import build_kd_heads
from kd_det.peers import build_heads as build_mutual_heads
from kd_det.peers import check_classes, load_peer_configs
from kd_det.registry import config_key
from kd_det.taps import build_tap
from kd_det.teacher import load_teacher_config

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "configs"
ALL = sorted(str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*.yaml"))
RECIPES = [name for name in ALL if name.startswith("recipes/")]
# What can be trained as it is.
FILES = [name for name in ALL if name not in RECIPES and not Path(name).name.startswith("Base-")]
COMMAND = "reviewkd_r101_r18.yaml"
# An R-CNN of few channels; GroupNorm, because random weights explode below the frozen BatchNorm of the files.
NARROW = {
    "MODEL.RESNETS.NORM": "GN",
    "MODEL.FPN.OUT_CHANNELS": 32,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 32,
}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def read(name):
    """The content of a file, without its bases."""
    return yaml.safe_load((FOLDER / name).read_text())


@functools.cache
def load(*arguments):
    """The config of a run with these arguments after --config-file: to be read, what a test changes it clones."""
    return make_config(training_parser("").parse_args(["--config-file", *arguments]))


def read_commands(name):
    """The commands in the comments of a file, as the arguments after --config-file."""
    text = (FOLDER / name).read_text().replace("\\\n#", "")
    return [tuple(shlex.split(line)) for line in re.findall(r"^# .*kd-det train --config-file (.*)", text, re.M)]


@functools.cache
def ancestors(name):
    """The files that a file inherits from, nearest first."""
    bases = read(name).get("_BASE_", [])
    bases = [os.path.normpath(Path(name).parent / base) for base in ([bases] if isinstance(bases, str) else bases)]
    return [file for base in bases for file in (base, *ancestors(base))]


def is_taught(cfg):
    """Whether it is a student beside a teacher."""
    return cfg.MODEL.META_ARCHITECTURE == "TeacherStudent"


COMMANDS = [command for name in ALL for command in read_commands(name)]
# Students that name their usual teacher.
STUDENTS = [name for name in FILES if load(name).KD.TEACHER.CONFIG_FILE and not is_taught(load(name))]
# Files of students beside their teachers, and the students alone.
PAIRS = [name for name in FILES if is_taught(load(name))]
BASELINES = {name: next(file for file in ancestors(name) if file in FILES) for name in PAIRS}
DETECTORS = [name for name in STUDENTS if load(name).MODEL.META_ARCHITECTURE != "ImageClassifier"]
RETINANET = "COCO-Detection/retinanet_R_50_FPN.yaml"
CIFAR10 = "CIFAR10/student.yaml"
CIFAR = [name for name in STUDENTS if "Base-CIFAR.yaml" in ancestors(name)]
# Recipes for one kind of model, or with what is published for one kind of data.
SPECIAL = {
    "recipes/soft_target_boxes.yaml": DETECTORS,
    "recipes/recommended.yaml": DETECTORS,
    "recipes/focal_global.yaml": DETECTORS,
    "recipes/decoupled_feature.yaml": DETECTORS,
    "recipes/instance_graph.yaml": [name for name in DETECTORS if name != RETINANET],
    "recipes/cross.yaml": [RETINANET],
    "recipes/hint_two_stage_cifar.yaml": CIFAR,
    "recipes/soft_target_cifar.yaml": CIFAR,
    "recipes/soft_target_imagenet.yaml": [name for name in STUDENTS if "imagenet" in name],
}
# Recipes whose heads have a stage, the length of which is an override.
STAGED = [f"recipes/{x}.yaml" for x in ("activation_boundary", "factor_transfer", "inherit_explore", "hint_two_stage")]
STAGED += ["recipes/hint_two_stage_cifar.yaml"]
# A MobileNet's stages end without a ReLU, whose boundaries or preactivations these methods compare; a RetinaNet has
# neither boxes to sample nor one softmax over its classes.
MISFITS = {
    **{
        (student, f"recipes/{recipe}.yaml"): r"there is no ReLU at the end of the student's 'res2'"
        for student in STUDENTS
        if "obile" in student
        for recipe in ("activation_boundary", "overhaul")
    },
    **{
        (RETINANET, f"recipes/{recipe}.yaml"): reason
        for recipe, reason in {
            "dkd": r"KD.SOFT_TARGET.DIVERGENCE: 'dkd' is for the sources roi, cls",
            "born_again": r"KD.BORN_AGAIN.SOURCE: 'roi_logits' is not a signal",
            "dml": r"KD.MUTUAL.SOURCE: 'roi' needs roi_logits, which the student of .* does not have",
            "dynamic_temperature": r"KD.SOFT_TARGET.DYNAMIC_TEMPERATURE: 'flsw' is for the sources roi and cls",
            "ie_dml": r"KD.MUTUAL.SOURCE: 'roi' needs roi_logits, which the student of .* does not have",
            "knowledge_adjustment": r"KD.SOFT_TARGET.ADJUST: 'probability_shift' is for the sources roi and cls",
            "softmax_regression": r"KD.SOFTMAX_REGRESSION.IN_FEATURE: 'roi_box_features' is not a signal",
        }.items()
    },
}


def join(student, recipe):
    """The arguments that train a student by a recipe."""
    return (student, recipe, *(["KD.PRETRAIN.MAX_ITER", "1"] if recipe in STAGED else []))


# Every file, every command of a comment, and every recipe with a small classifier.
RUNS = [(name,) for name in FILES] + COMMANDS
RUNS += [join(CIFAR10, recipe) for recipe in RECIPES if CIFAR10 in SPECIAL.get(recipe, STUDENTS)]
RUNS = list(dict.fromkeys(RUNS))


def name_run(run):
    return " ".join(argument.removeprefix("recipes/") for argument in run)


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


@pytest.mark.parametrize("run", RUNS, ids=name_run)
def test_config_trains_one_step(run, tmp_path):
    cfg = load(*run).clone()
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
    if cfg.MODEL.META_ARCHITECTURE == "MutualStudents":
        assert all(losses[f"loss_kd_mutual_peer_{i}"] > 0 for i in range(1, len(model.students) + 1))
    sum(losses.values()).backward()
    optimizer.step()
    after = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("run", [run for run in RUNS if load(*run).KD.PRETRAIN.MAX_ITER], ids=name_run)
def test_config_trains_one_step_of_its_stage(run, tmp_path):
    cfg = load(*run).clone()
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


@functools.cache
def build_pair(student):
    """The taps of a student and its teacher, both made cheap, and what each can give."""
    cfg = load(student).clone()
    cfg.KD.TEACHER.WEIGHTS = "not loaded.pth"
    taps = []
    for network in (cfg, load_teacher_config(cfg)[0]):
        shrink(network)
        taps.append(build_tap(build_model(network)))
    return taps, [tap.spec() for tap in taps]


def check_heads(cfg, student):
    """Check a run and build its heads, as the student's training does before its first iteration."""
    check_run(cfg, student)
    taps, specs = build_pair(student)
    if cfg.MODEL.META_ARCHITECTURE == "MutualStudents":
        names = ["this config", *cfg.KD.MUTUAL.PEERS]
        assert [peer.MODEL.META_ARCHITECTURE for peer in load_peer_configs(cfg)] == [cfg.KD.STUDENT_ARCHITECTURE] * 2
        check_classes(cfg.KD.MUTUAL.SOURCE, [specs[0]] * 2, names)
        if cfg.KD.MUTUAL.METHOD == "ie_dml":
            build_mutual_heads(cfg, [taps[0]] * 2, names)
        return
    assert is_taught(cfg)
    heads = build_kd_heads(cfg, *specs)
    taps[0].check_alignment(taps[1], [name for head in heads.values() for name in head.signals])
    check_stage(cfg, heads)


@pytest.mark.parametrize("student", STUDENTS)
def test_every_recipe_fits_every_student(student):
    for recipe in RECIPES:
        if student not in SPECIAL.get(recipe, STUDENTS):
            continue
        cfg = load(*join(student, recipe))
        assert student_config(cfg).MODEL == load(student).MODEL
        if (student, recipe) in MISFITS:
            with pytest.raises(InputError, match=MISFITS[student, recipe]):
                check_heads(cfg, student)
        else:
            check_heads(cfg, student)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_says_what_the_method_is_and_how_it_is_used(recipe):
    content = read(recipe)
    assert content.keys() <= {"KD", "MODEL"}
    if "MODEL" in content:
        assert content["MODEL"] == {"META_ARCHITECTURE": "MutualStudents"}
        assert not any(content["KD"]["TEACHER"].values())
    else:
        assert "TEACHER" not in content["KD"]
    commands = read_commands(recipe)
    assert commands
    for command in commands:
        assert recipe in command
        check_run(load(*command), recipe)


def test_a_pair_is_its_student_with_the_recipe():
    """A file of a published pair is the student's file with the recipe, and says no more."""
    for name in PAIRS:
        student, recipe = read(name)["_BASE_"]
        student = os.path.normpath(Path(name).parent / student)
        joined = load(student, os.path.normpath(Path(name).parent / recipe)).clone()
        joined.OUTPUT_DIR = load(name).OUTPUT_DIR
        assert joined == load(name)


def test_each_student_has_a_teacher_that_one_can_get():
    assert len(STUDENTS) == 20
    for name in STUDENTS:
        teacher = load(name).KD.TEACHER
        trained = f"{load(teacher.CONFIG_FILE).OUTPUT_DIR}/model_final.pth"
        if teacher.CONFIG_FILE in FILES:
            assert teacher.WEIGHTS == "" or teacher.WEIGHTS.startswith("https://download.pytorch.org/models/resnet")
        elif trained != teacher.WEIGHTS:
            assert model_zoo.get_checkpoint_url(teacher.CONFIG_FILE)
            assert teacher.WEIGHTS == ""


def test_no_name_is_also_one_of_the_model_zoo():
    zoo = Path(model_zoo.__file__).parent / "configs"
    assert not [name for name in ALL if (zoo / name).is_file() and not Path(name).name.startswith("Base-")]


def test_no_two_runs_share_a_folder():
    """The default of OUTPUT_DIR, which follows from the names of the files, is never overridden."""
    assert not [name for name in ALL if "OUTPUT_DIR" in read(name)]
    folders = [default_output_dir([name]) for name in FILES]
    folders += [default_output_dir([student, recipe]) for student in STUDENTS for recipe in RECIPES]
    assert len(folders) == len(set(folders))


@pytest.mark.parametrize("name", BASELINES)
def test_distilled_student_is_its_baseline(name):
    """Same data, schedule, initial weights and model, which can be built in full size."""
    distilled, baseline = load(name).clone(), load(BASELINES[name]).clone()
    student = student_config(distilled)
    for cfg in (student, baseline):
        cfg.OUTPUT_DIR, cfg.KD, cfg.MODEL.DEVICE, cfg.MODEL.TIMM.PRETRAINED = "", "", "meta", False
    assert student == baseline
    with torch.device("meta"):  # It allocates nothing.
        build_model(student)


# ReviewKD's weights and channels of its fusion modules.
REVIEW = {
    "reviewkd_r101_r18": (1.2, 256),
    "COCO-Detection/reviewkd_faster_rcnn_R_50_FPN_from_R_101": (1.0, 256),
    "COCO-Detection/reviewkd_faster_rcnn_MobileNetV2_FPN_from_R_50": (2.0, 256),
    "COCO-Detection/reviewkd_retinanet_R_50_FPN_from_R_101": (1.0, 256),
    "COCO-InstanceSegmentation/reviewkd_mask_rcnn_R_18_FPN_from_R_101": (1.5, 256),
    "COCO-InstanceSegmentation/reviewkd_mask_rcnn_R_50_FPN_from_R_101": (0.8, 256),
    "COCO-InstanceSegmentation/reviewkd_mask_rcnn_MobileNetV2_FPN_from_R_50": (1.0, 256),
    "Classification/reviewkd_cifar100_resnet20_from_resnet56": (0.6, 64),
    "Classification/reviewkd_cifar100_resnet32_from_resnet110": (1.0, 64),
    "Classification/reviewkd_cifar100_resnet8x4_from_resnet32x4": (5.0, 256),
    "Classification/reviewkd_cifar100_wrn_16_2_from_wrn_40_2": (5.0, 128),
    "Classification/reviewkd_cifar100_wrn_40_1_from_wrn_40_2": (5.0, 64),
    "Classification/reviewkd_imagenet_resnet18_from_resnet34": (1.0, 512),
    "Classification/reviewkd_imagenet_mobilenet_from_resnet50": (8.0, 256),
}
# What is published of other methods, for commands that are a student and recipes.
CIFAR100, IMAGENET = "Classification/cifar100_resnet20.yaml", "Classification/imagenet_resnet18.yaml"
PUBLISHED = {
    (CIFAR100, "attention_transfer"): {"ATTENTION_TRANSFER.WEIGHT": 1000.0, "ATTENTION_TRANSFER.REDUCTION": "mean"},
    (CIFAR100, "hint"): {"HINT.WEIGHT": 100.0, "HINT.IN_FEATURES": ["res3"], "HINT.REGRESSOR": "rectified"},
    (CIFAR100, "hint_two_stage_cifar"): {"SOFT_TARGET.TEMPERATURE": 3.0, "SOFT_TARGET.WEIGHT": 4.0, "HINT.WEIGHT": 1.0},
    (CIFAR100, "soft_target_cifar"): {"TASK_WEIGHT": 0.1, "SOFT_TARGET.WEIGHT": 0.9, "SOFT_TARGET.TEMPERATURE": 4.0},
    (CIFAR100, "knowledge_adjustment", "soft_target_cifar"): {"TASK_WEIGHT": 0.1, "SOFT_TARGET.TEMPERATURE": 4.0},
    (CIFAR100, "dynamic_temperature", "soft_target_cifar"): {"TASK_WEIGHT": 0.1, "SOFT_TARGET.TEMPERATURE": 4.0},
    (CIFAR100, "factor_transfer"): {"FACTOR_TRANSFER.WEIGHT": 500.0, "FACTOR_TRANSFER.SCALE": "code"},
    (CIFAR100, "inherit_explore"): {"INHERIT_EXPLORE.WEIGHT": 50.0, "INHERIT_EXPLORE.SCALE": "code"},
    (CIFAR100, "overhaul"): {"OVERHAUL.MARGIN": "batch_norm", "OVERHAUL.SCALE": "code", "TASK_WEIGHT": 1.0},
    (CIFAR100, "activation_boundary"): {"ACTIVATION_BOUNDARY.SCALE": "code"},
    (CIFAR100, "softmax_regression"): {"SOFTMAX_REGRESSION.IN_FEATURE": "res4", "SOFTMAX_REGRESSION.WEIGHT": 1.0},
    (CIFAR100, "dkd"): {"SOFT_TARGET.TEMPERATURE": 4.0, "SOFT_TARGET.OTHER_WEIGHT": 2.0, "TASK_WEIGHT": 1.0},
    ("COCO-Detection/faster_rcnn_R_18_FPN.yaml", "dkd"): {"SOFT_TARGET.OTHER_WEIGHT": 0.25, "SOFT_TARGET.WEIGHT": 1.0},
    ("BCCD/student.yaml", "dkd"): {"SOFT_TARGET.SOURCES": ["roi"], "SOFT_TARGET.WEIGHT": 1.0},
    (IMAGENET, "dkd"): {"SOFT_TARGET.SOURCES": ["cls"], "SOFT_TARGET.OTHER_WEIGHT": 0.5},
    (RETINANET, "dist"): {"SOFT_TARGET.SOURCES": ["dense"], "SOFT_TARGET.OTHER_WEIGHT": 1.0},
    ("COCO-Detection/faster_rcnn_R_50_FPN.yaml", "dist"): {"SOFT_TARGET.OTHER_WEIGHT": 1.0, "SOFT_TARGET.WEIGHT": 1.0},
    ("COCO-Detection/faster_rcnn_R_50_FPN.yaml", "pearson"): {"PEARSON.WEIGHT": 6.0},
    (RETINANET, "pearson"): {"PEARSON.WEIGHT": 10.0, "PEARSON.IN_FEATURES": ["p3", "p4", "p5", "p6"]},
    (RETINANET, "masked_generation"): {"MASKED_GENERATION.WEIGHT": 2e-5, "MASKED_GENERATION.MASK_RATIO": 0.65},
    (RETINANET, "focal_global"): {"FOCAL_GLOBAL.FOREGROUND_WEIGHT": 1e-3, "FOCAL_GLOBAL.ATTENTION_WEIGHT": 5e-4},
    (IMAGENET, "soft_target_imagenet"): {"TASK_WEIGHT": 0.5, "SOFT_TARGET.WEIGHT": 0.5, "SOFT_TARGET.TEMPERATURE": 1.0},
    (IMAGENET, "attention_transfer"): {"ATTENTION_TRANSFER.WEIGHT": 1000.0, "ATTENTION_TRANSFER.REDUCTION": "mean"},
}


def test_weights_of_reviewkd_are_the_published_ones():
    nodes = {name: load(f"{name}.yaml").KD.REVIEW for name in REVIEW}
    assert {name: (node.WEIGHT, node.MID_CHANNELS) for name, node in nodes.items()} == REVIEW
    assert {f"{name}.yaml" for name in REVIEW} == set(PAIRS) - {"quickstart/distilled.yaml"}


@pytest.mark.parametrize("command", PUBLISHED, ids=" ".join)
def test_a_recipe_gives_a_student_what_is_published(command):
    student, *recipes = command
    cfg = load(student, *(f"recipes/{recipe}.yaml" for recipe in recipes))
    assert {key: look_up(cfg.KD, key) for key in PUBLISHED[command]} == PUBLISHED[command]


@pytest.mark.parametrize(
    ("ours", "zoo"),
    [
        ("COCO-Detection/faster_rcnn_R_50_FPN.yaml", "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"),
        ("COCO-Detection/retinanet_R_50_FPN.yaml", "COCO-Detection/retinanet_R_50_FPN_1x.yaml"),
        ("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN.yaml", "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"),
        ("PascalVOC-Detection/faster_rcnn_R_101_FPN.yaml", "PascalVOC-Detection/faster_rcnn_R_50_FPN.yaml"),
    ],
)
def test_baseline_is_that_of_the_model_zoo(ours, zoo):
    """But for the schedule on COCO: half the images per iteration, half the learning rate, twice the iterations.

    The zoo's only network on VOC is the ResNet-50, and kd_det's the other two.
    """
    ours, zoo = load(ours).clone(), load(zoo).clone()
    if ours.MODEL.RESNETS.DEPTH == 101:
        zoo.MODEL.WEIGHTS, zoo.MODEL.RESNETS.DEPTH = zoo.MODEL.WEIGHTS.replace("R-50", "R-101"), 101
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


@pytest.mark.slow
def test_documented_command_trains_evaluates_and_saves_a_plain_student(tmp_path):
    make_coco(tmp_path)
    cfg = load(COMMAND).clone()
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
    path.write_text(f"_BASE_: {FOLDER / COMMAND}\n{text}\n")
    with pytest.raises(InputError, match=re.escape(f"{path}: Non-existent config key: {key}")):
        load(str(path))
