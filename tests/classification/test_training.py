"""Classifiers through ``tools/train_net.py``: plain, distilled, resumed and evaluated; and schedules in epochs."""

import json
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from helpers import ROOT, interrupted_at, train_net

from kd_det import InputError
from kd_det.engine.run_config import epochs_to_iterations

from .models import classifier_cfg

CONFIGS = ROOT / "configs/Classification"
DISTILLED = ["--config-file", "Classification/digits_student.yaml", "recipes/soft_target.yaml"]
SHORT = ["SOLVER.IN_EPOCHS", "False", "SOLVER.MAX_ITER", "3", "SOLVER.CHECKPOINT_PERIOD", "1", "SEED", "3"]
pytestmark = pytest.mark.usefixtures("in_process")


def metrics(folder):
    """The newest value of every metric."""
    rows = map(json.loads, Path(folder, "metrics.json").read_text().splitlines())
    return {key: value for row in rows for key, value in row.items()}


@pytest.fixture
def teacher(tmp_path):
    """Options that name a teacher that was trained for three iterations."""
    config, output = CONFIGS / "digits_teacher.yaml", tmp_path / "teacher"
    train_net("--config-file", config, *SHORT, "OUTPUT_DIR", output)
    return ["KD.TEACHER.CONFIG_FILE", output / "config.yaml", "KD.TEACHER.WEIGHTS", output / "model_final.pth"]


def test_a_classifier_is_distilled_resumed_and_evaluated(teacher, tmp_path):
    student, output = CONFIGS / "digits_student.yaml", tmp_path / "output"
    command = [*DISTILLED, *SHORT, *teacher, "OUTPUT_DIR", output]
    train_net(*command)
    values = metrics(output)
    assert values["loss_kd_soft_target_cls"] > 0
    assert 0 < values["classification/top1"] <= 100
    checkpoint = torch.load(output / "model_final.pth", weights_only=True)
    cfg = classifier_cfg(options={"MODEL.CLASSIFIER.NUM_CLASSES": 10})
    build_model(cfg).load_state_dict(checkpoint["model"], strict=True)

    train_net("--resume", *command, "SOLVER.MAX_ITER", "5")
    assert torch.load(output / "model_final.pth", weights_only=True)["iteration"] == 4

    weights, evaluation = output / "model_final.pth", tmp_path / "evaluation"
    train_net("--eval-only", "--config-file", student, "MODEL.WEIGHTS", weights, "OUTPUT_DIR", evaluation)
    values = [f"{metrics(output)[f'classification/{name}']:.4f}" for name in ("top1", "top5", "error")]
    assert f"copypaste: {','.join(values)}" in (evaluation / "log.txt").read_text()


def test_any_classifiers_config_becomes_a_distillation_run(teacher, tmp_path):
    output = tmp_path / "output"
    arguments = ["--teacher", teacher[1], "--teacher-weights", teacher[3], "--kd-heads", "HintHead,SoftTargetHead"]
    train_net("--config-file", CONFIGS / "digits_student.yaml", *arguments, *SHORT, "OUTPUT_DIR", output)
    assert {"loss_kd_hint", "loss_kd_soft_target_cls"} < metrics(output).keys()


def test_a_run_in_epochs(tmp_path):
    """An epoch of 1442 images in batches of 721 has two iterations."""
    options = ["SOLVER.MAX_ITER", "2", "SOLVER.IMS_PER_BATCH", "721", "DATASETS.TEST", "()"]
    train_net("--config-file", CONFIGS / "digits_student.yaml", *options, "OUTPUT_DIR", tmp_path)
    assert torch.load(tmp_path / "model_final.pth", weights_only=True)["iteration"] == 3


def test_an_interrupted_classifier_gives_the_weights_of_an_uninterrupted_one(teacher, tmp_path):
    command = [*DISTILLED, *SHORT, *teacher]
    train_net(*command, "OUTPUT_DIR", tmp_path / "whole")
    with interrupted_at(2):
        train_net(*command, "OUTPUT_DIR", tmp_path / "cut")
    train_net("--resume", *command, "OUTPUT_DIR", tmp_path / "cut")
    whole, cut = (torch.load(tmp_path / x / "model_final.pth", weights_only=True)["model"] for x in ("whole", "cut"))
    assert all(torch.equal(whole[key], cut[key]) for key in whole)


# ---- Schedules in epochs ----
def test_epochs_become_iterations():
    """1000 images in batches of 40 are 25 iterations an epoch."""
    cfg = classifier_cfg(options={"SOLVER.IN_EPOCHS": True, "SOLVER.IMS_PER_BATCH": 40, "SOLVER.MAX_ITER": 240})
    cfg.SOLVER.STEPS, cfg.SOLVER.WARMUP_ITERS, cfg.TEST.EVAL_PERIOD = (150, 180), 1, 0
    cfg.SOLVER.CHECKPOINT_PERIOD, cfg.KD.REVIEW.SCHEDULE.WARMUP = 20, 20
    cfg.KD.PRETRAIN.MAX_ITER, cfg.KD.PRETRAIN.STEPS = 6, [4]
    epochs_to_iterations(cfg, 1000)
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.SOLVER.WARMUP_ITERS) == (6000, (3750, 4500), 25)
    assert (cfg.SOLVER.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD) == (500, 0)
    assert (cfg.KD.PRETRAIN.MAX_ITER, cfg.KD.PRETRAIN.STEPS) == (150, [100])
    schedule = cfg.KD.REVIEW.SCHEDULE
    assert (schedule.START, schedule.WARMUP, schedule.STOP) == (0, 500, -1)
    assert not cfg.SOLVER.IN_EPOCHS


def test_less_than_one_iteration():
    cfg = classifier_cfg(options={"SOLVER.IN_EPOCHS": True, "SOLVER.IMS_PER_BATCH": 64, "SOLVER.MAX_ITER": 1})
    with pytest.raises(InputError, match=r"^SOLVER.MAX_ITER: 1 epochs of 20 images are less than one iteration\.$"):
        epochs_to_iterations(cfg, 20)
