"""Tests the average of a student's weights: its values, and how it is saved, resumed, evaluated and exported."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from children import Task, end, final_state, same, two_ranks
from classification.models import classifier_cfg
from helpers import interrupted_at, save_teacher, tiny_cfg, write_yaml
from torch import nn

from kd_det import InputError
from kd_det.config import student_config
from kd_det.data import register_datasets
from kd_det.engine import Trainer
from kd_det.engine.ema import build_ema
from kd_det.engine.stages import train
from kd_det.export import export_student, load_student

pytestmark = pytest.mark.usefixtures("in_process")
SIZE = {"MODEL.CLASSIFIER.NUM_CLASSES": 10, "INPUT.CLASSIFICATION.SIZE": 8}


@pytest.fixture
def make(tmp_path):
    """Makes the config of a distilled classifier of digits, whose weights are averaged in four iterations."""

    def make(**options):
        run = {"SEED": 4, "SOLVER.MAX_ITER": 4, "SOLVER.CHECKPOINT_PERIOD": 1, "SOLVER.EMA_DECAY": 0.5}
        run |= {"SOLVER.BASE_LR": 0.05, "SOLVER.WARMUP_ITERS": 0, "OUTPUT_DIR": str(tmp_path / "run")}
        run |= {"MODEL.META_ARCHITECTURE": "TeacherStudent", "KD.STUDENT_ARCHITECTURE": "ImageClassifier"}
        run |= {"KD.HEADS": ["HintHead", "SoftTargetHead"], "KD.HINT.IN_FEATURES": ["res3"]}
        run |= save_teacher(tmp_path / "teacher", classifier_cfg(teacher=True, options=SIZE))
        cfg = classifier_cfg(options=SIZE | run)
        cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("digits_train",), ()
        cfg.merge_from_list([part for pair in options.items() for part in pair])
        register_datasets(cfg)
        Path(cfg.OUTPUT_DIR).mkdir(exist_ok=True)
        return cfg

    return make


def load(folder, name="model_final"):
    return torch.load(Path(folder, f"{name}.pth"), weights_only=True)


def averaged(checkpoint):
    """The averaged student, under the student's names."""
    return {key.removeprefix("module."): value for key, value in checkpoint["ema"].items() if key != "n_averaged"}


# ---- Numbers ----
class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.register_buffer("statistic", torch.zeros(()))

    def set(self, value):
        self.weight.data.fill_(value)
        self.statistic.fill_(10 * value)


def test_decay_grows_to_the_configured_value():
    """Behind the first update, which copies, decays are 2/11, 3/12, and then 0.3, since 4/13 is more."""
    cfg, model = tiny_cfg(options={"SOLVER.EMA_DECAY": 0.3}), Counting()
    ema = build_ema(cfg, model)
    found = []
    for value in (11.0, 22.0, 0.0, 100.0):
        model.set(value)
        ema.update_parameters(model)
        found.append(ema.module.weight.item())
    assert found == pytest.approx([11, 20, 5, 71.5])
    assert ema.module.statistic.item() == pytest.approx(715)
    assert not ema.module.weight.requires_grad


def test_whole_numbers_are_those_of_the_student():
    model = nn.BatchNorm1d(2)
    ema = build_ema(tiny_cfg(options={"SOLVER.EMA_DECAY": 0.9}), model)
    for count in (3, 8):
        model.num_batches_tracked.fill_(count)
        ema.update_parameters(model)
        assert ema.module.num_batches_tracked == count


@pytest.mark.parametrize("decay", [1.0, -0.1, float("nan")])
def test_invalid_decays_are_refused(decay):
    told = rf"^SOLVER.EMA_DECAY: must be 0 or more and below 1, got {decay}\.$"
    with pytest.raises(InputError, match=told):
        build_ema(tiny_cfg(options={"SOLVER.EMA_DECAY": decay}), nn.Linear(1, 1))


def test_mutual_students_have_no_average():
    cfg = tiny_cfg(options={"SOLVER.EMA_DECAY": 0.9, "MODEL.META_ARCHITECTURE": "MutualStudents"})
    with pytest.raises(InputError, match=r"^SOLVER.EMA_DECAY: got 0.9, but MutualStudents have no averages"):
        build_ema(cfg, nn.Linear(1, 1))


# ---- In a run ----
@pytest.mark.parametrize("options", [{}, {"SOLVER.ACCUMULATE": 2}])
def test_saved_average_matches_the_saved_students(make, options):
    """One update for each step of the optimizer, however many parts a batch has."""
    cfg = make(**options)
    train(cfg, resume=False)
    checkpoints = [load(cfg.OUTPUT_DIR, f"model_{i:07d}") for i in range(4)]
    expected = checkpoints[0]["model"]
    for checkpoint, decay in zip(checkpoints[1:], (2 / 11, 3 / 12, 4 / 13), strict=True):
        expected = {key: decay * expected[key] + (1 - decay) * value for key, value in checkpoint["model"].items()}
    final = load(cfg.OUTPUT_DIR)
    assert final.keys() == {"model", "kd_heads", "ema", "trainer", "iteration"}
    assert final["ema"]["n_averaged"] == 4
    found = averaged(final)
    assert found.keys() == final["model"].keys()
    for key, value in found.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-6)
    assert not same(found, final["model"])


def test_training_is_the_same_without_an_average(make, tmp_path):
    train(make(), resume=False)
    train(make(OUTPUT_DIR=str(tmp_path / "without"), **{"SOLVER.EMA_DECAY": 0.0}), resume=False)
    kept, without = load(tmp_path / "run"), load(tmp_path / "without")
    assert "ema" not in without
    assert same(kept["model"], without["model"])


def test_resumed_run_has_the_average_of_an_uninterrupted_one(make, tmp_path):
    """The stage before the run has no average."""
    options = {"KD.HINT.STAGES": 2, "KD.PRETRAIN.MAX_ITER": 2, "SOLVER.CHECKPOINT_PERIOD": 2}
    cfg = make(**options)
    with interrupted_at(3):
        train(cfg, resume=False)
    train(cfg, resume=True)
    train(make(OUTPUT_DIR=str(tmp_path / "whole"), **options), resume=False)
    assert same(final_state(tmp_path / "run"), final_state(tmp_path / "whole"))
    assert "ema" not in load(tmp_path / "run" / "pretrain")


def test_run_without_an_average_cannot_resume_with_one(make):
    train(make(**{"SOLVER.EMA_DECAY": 0.0}), resume=False)
    with pytest.raises(InputError, match=r"cannot be resumed: it has model, .*but no ema\.$"):
        train(make(**{"SOLVER.MAX_ITER": 6}), resume=True)


@dataclass(frozen=True)
class SaveAverage:
    """At the end each rank writes down its average."""

    path: Path

    def __call__(self):
        end_of_training = Trainer.after_train

        def after_train(trainer):
            torch.save(dict(trainer.ema.module.named_parameters()), self.path)
            end_of_training(trainer)

        Trainer.after_train = after_train


def test_two_ranks_share_one_average(make, tmp_path):
    task = Task(write_yaml(tmp_path / "config.yaml", make()), tmp_path)
    files = [tmp_path / f"rank_{i}.pth" for i in range(2)]
    ranks = [(rank, SaveAverage(file)) for rank, file in zip(two_ranks(), files, strict=True)]
    assert end(*[task.start("two", prepare=prepare, log=f"log_{i}") for i, prepare in enumerate(ranks)]) == [0, 0]
    first, second = (torch.load(file, weights_only=True) for file in files)
    assert same(first, second)
    saved = averaged(load(tmp_path / "two"))
    assert same(first, {key: saved[key] for key in first})


# ---- Evaluation ----
def test_student_and_average_are_evaluated(make, tmp_path):
    cfg = make(**{"SOLVER.BASE_LR": 0.2, "TEST.EVAL_PERIOD": 2, "TEST.BEST_METRIC": "ema/classification/top1"})
    cfg.DATASETS.TEST = ("digits_test",)
    train(cfg, resume=False)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.json").read_text().splitlines()]
    told = {
        name: [row[name] for row in rows if name in row] for name in ("classification/top1", "ema/classification/top1")
    }
    assert [len(values) for values in told.values()] == [2, 2]
    assert told["classification/top1"][-1] != told["ema/classification/top1"][-1]
    alone = student_config(cfg)
    for name, ema in (("classification/top1", False), ("ema/classification/top1", True)):
        model = load_student(alone, str(tmp_path / "run" / "model_final.pth"), "cpu", ema=ema)
        assert Trainer.test(alone, model)["classification"]["top1"] == told[name][-1]
    best = load(tmp_path / "run", "model_best")
    assert best["best"] == {"ema/classification/top1": max(told["ema/classification/top1"])}


def test_precise_batch_norm_uses_the_averaged_weights(make):
    """They are next to the student's own here; so must be their statistics, which an average of running ones is not."""
    cfg = make(**{"SOLVER.EMA_DECAY": 1e-6, "TEST.PRECISE_BN.ENABLED": True, "TEST.PRECISE_BN.NUM_ITER": 2})
    train(cfg, resume=False)
    final = load(cfg.OUTPUT_DIR)
    found = averaged(final)
    for key, value in final["model"].items():
        if "running" in key:
            torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-3)


# ---- Export ----
def test_exported_average_can_teach(make, tmp_path):
    cfg = make()
    train(cfg, resume=False)
    weights = str(tmp_path / "run" / "model_final.pth")
    export_student(student_config(cfg), weights, str(tmp_path / "out"), ema=True)
    exported = load(tmp_path / "out", "student")["model"]
    assert same(exported, averaged(load(tmp_path / "run")))
    twin = make(
        **{"KD.TEACHER.CONFIG_FILE": str(tmp_path / "out" / "student.yaml"), "OUTPUT_DIR": str(tmp_path / "next")}
    )
    twin.KD.TEACHER.WEIGHTS = str(tmp_path / "out" / "student.pth")
    assert same(dict(Trainer(twin).plain_model.teacher.model.state_dict()), exported)
