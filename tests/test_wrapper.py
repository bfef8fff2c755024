"""Tests that a wrapper of one's own is trained, saved, resumed and summarised by its interface alone."""

import copy
import json
from pathlib import Path

import pytest
import torch
from children import same
from classification.models import classifier_cfg
from detectron2.modeling import META_ARCH_REGISTRY
from helpers import interrupted_at
from torch import nn

from kd_det import WRAPPER_REGISTRY, StudentWrapper
from kd_det.config import has_peers, has_teacher, is_wrapped, student_config
from kd_det.data import register_datasets
from kd_det.engine import Trainer
from kd_det.engine import summary as summary_module
from kd_det.engine.stages import train
from kd_det.meta_arch import build_student
from kd_det.wrapper import Network, PlainStudent, as_wrapper

pytestmark = pytest.mark.usefixtures("in_process")


class AveragedStudent(StudentWrapper):
    """Pulls a student towards the average of its own earlier weights."""

    def __init__(self, cfg):
        super().__init__()
        self.students = nn.ModuleList([build_student(cfg)])
        self.average = copy.deepcopy(self.students[0]).requires_grad_(False)

    @property
    def checkpointables(self):
        return {"average": self.average}

    def networks(self, cfg):
        return [*super().networks(cfg), Network("average", self.average, student_config(cfg), dtype=torch.float32)]

    def describe(self, cfg):
        return ["The average pulls."]

    def forward(self, batched_inputs):
        (student,) = self.students
        if not self.training:
            return student(batched_inputs)
        pairs = list(zip(self.average.parameters(), student.parameters(), strict=True))
        for average, own in pairs:
            average.lerp_(own.detach(), 0.5)
        pull = sum((own - average).square().sum() for average, own in pairs)
        return student(batched_inputs) | {"loss_average": pull}


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Makes the config of a run of four iterations with this wrapper."""
    for registry in (META_ARCH_REGISTRY, WRAPPER_REGISTRY):
        monkeypatch.setitem(registry._obj_map, "AveragedStudent", AveragedStudent)

    def make(folder):
        options = {"MODEL.META_ARCHITECTURE": "AveragedStudent", "KD.STUDENT_ARCHITECTURE": "ImageClassifier"}
        options |= {"MODEL.CLASSIFIER.NUM_CLASSES": 10, "INPUT.CLASSIFICATION.SIZE": 8, "SEED": 2}
        options |= {"SOLVER.MAX_ITER": 4, "SOLVER.CHECKPOINT_PERIOD": 2, "SOLVER.WARMUP_ITERS": 0}
        cfg = classifier_cfg(options=options | {"OUTPUT_DIR": str(tmp_path / folder)})
        cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("digits_train",), ()
        register_datasets(cfg)
        Path(cfg.OUTPUT_DIR).mkdir()
        return cfg

    return make


@pytest.mark.slow
def test_it_is_trained_saved_resumed_and_summarised(make, caplog, monkeypatch):
    caplog.set_level("INFO", "kd_det.engine.summary")
    monkeypatch.setattr(summary_module, "count_gflops", lambda model, image: 1.0)
    whole, cut = make("whole"), make("cut")
    train(whole, resume=False)
    summary = next(message for message in caplog.messages if message.startswith("Summary of the run:"))
    assert summary.splitlines()[1].split() == ["student", "average"]
    assert "\n\nThe average pulls.\n\n" in summary
    with interrupted_at(3):
        train(cut, resume=False)
    train(cut, resume=True)
    first, second = (torch.load(Path(cfg.OUTPUT_DIR, "model_final.pth"), weights_only=True) for cfg in (whole, cut))
    assert same(first["model"], second["model"])
    assert same(first["average"], second["average"])
    assert not same(first["model"], first["average"])
    assert first["model"].keys() == build_student(whole).state_dict().keys()
    lines = [json.loads(line) for line in Path(cut.OUTPUT_DIR, "metrics.json").read_text().splitlines()]
    assert all(line["loss_average"] > 0 for line in lines)


def test_a_config_says_what_wraps_its_student(make):
    cfg = make("run")
    assert (is_wrapped(cfg), has_teacher(cfg), has_peers(cfg)) == (True, False, False)
    assert student_config(cfg).MODEL.META_ARCHITECTURE == "ImageClassifier"
    assert not is_wrapped(student_config(cfg))
    for name, teacher in (("TeacherStudent", True), ("MutualStudents", False)):
        cfg.MODEL.META_ARCHITECTURE = name
        assert (has_teacher(cfg), has_peers(cfg)) == (teacher, not teacher)


def test_a_plain_model_is_its_own_student(make):
    cfg = student_config(make("run"))
    model = Trainer.build_model(cfg)
    wrapper = as_wrapper(model)
    assert isinstance(wrapper, PlainStudent)
    assert as_wrapper(wrapper) is wrapper
    assert [network.model for network in wrapper.networks(cfg)] == list(wrapper.students) == [model]
    assert (wrapper.turns, wrapper.checkpointables, wrapper.describe(cfg)) == (1, {}, [])
