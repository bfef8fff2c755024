"""Tests the best checkpoint, and precise batch norm in resumed runs."""

import math

import pytest
import torch
from children import same
from classification.models import classifier_cfg
from helpers import interrupted_at

from kd_det import InputError
from kd_det.data import register_datasets
from kd_det.engine import Trainer
from kd_det.engine.stages import train

pytestmark = pytest.mark.usefixtures("in_process")


@pytest.fixture
def cfg(tmp_path):
    """A classifier of digits, evaluated after each of four iterations."""
    options = {"MODEL.CLASSIFIER.NUM_CLASSES": 10, "INPUT.CLASSIFICATION.SIZE": 8, "SEED": 4, "SOLVER.MAX_ITER": 4}
    options |= {"OUTPUT_DIR": str(tmp_path), "TEST.EVAL_PERIOD": 1, "TEST.BEST_METRIC": "classification/top1"}
    cfg = classifier_cfg(options=options | {"SOLVER.CHECKPOINT_PERIOD": 1})
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("digits_train",), ("digits_test",)
    register_datasets(cfg)
    return cfg


@pytest.fixture
def evaluations(monkeypatch):
    """Accuracies that the next evaluations find; None stops the run."""
    values = []

    def evaluate(cls, cfg, model, evaluators=None):
        if values[0] is None:
            raise KeyboardInterrupt
        return {"classification": {"top1": values.pop(0), "error": 1.0}}

    monkeypatch.setattr(Trainer, "test", classmethod(evaluate))
    return values


def best(folder):
    data = torch.load(folder / "model_best.pth", weights_only=True)
    return data["iteration"], data["best"]["classification/top1"]


@pytest.mark.parametrize(
    ("values", "expected"),
    [([1, 3, 2, 3], (1, 3)), ([math.nan, 3, 2, 4], (3, 4)), ([0, -1, 0, 0], (0, 0)), ([4, math.nan, 3, 2], (0, 4))],
)
def test_first_of_equally_good_checkpoints_stays(cfg, evaluations, tmp_path, values, expected):
    evaluations.extend(map(float, values))
    train(cfg, resume=False)
    assert best(tmp_path) == expected
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    data = torch.load(tmp_path / "model_best.pth", weights_only=True)
    assert same(data["model"], torch.load(tmp_path / f"model_{expected[0]:07d}.pth", weights_only=True)["model"]), (
        "the weights that were evaluated"
    )


def test_metric_that_is_always_nan_writes_no_checkpoint(cfg, evaluations, tmp_path, caplog):
    evaluations.extend([math.nan] * 4)
    train(cfg, resume=False)
    assert not (tmp_path / "model_best.pth").exists()
    assert caplog.text.count("TEST.BEST_METRIC: classification/top1 is nan, so this evaluation writes no") == 4


@pytest.mark.parametrize(("later", "expected"), [([2.0, 2.5], (0, 3.0)), ([2.0, 4.0], (3, 4.0))])
def test_resumed_run_remembers_the_best_result(cfg, evaluations, tmp_path, later, expected):
    """It is stopped in the evaluation after its second checkpoint, and goes on behind it."""
    evaluations.extend([3.0, None])
    with pytest.raises(KeyboardInterrupt):
        train(cfg, resume=False)
    evaluations[:] = later
    train(cfg, resume=True)
    assert best(tmp_path) == expected


def test_best_checkpoint_of_another_run_is_ignored(cfg, evaluations, tmp_path):
    evaluations.extend([9.0, 9.0, 9.0, 9.0])
    train(cfg, resume=False)
    evaluations.append(None)
    with pytest.raises(KeyboardInterrupt):
        train(cfg, resume=False)
    evaluations[:] = [1.0, 2.0, 1.5]
    train(cfg, resume=True)
    assert best(tmp_path) == (2, 2.0)


@pytest.mark.parametrize("damage", ["flipped", "text", "empty", "a number", "other keys", "no metrics"])
def test_damaged_best_checkpoint_does_not_stop_the_run(cfg, evaluations, tmp_path, caplog, damage):
    evaluations.extend([3.0, None])
    with pytest.raises(KeyboardInterrupt):
        train(cfg, resume=False)
    path = tmp_path / "model_best.pth"
    if damage == "flipped":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage in ("text", "empty"):
        path.write_bytes(b"text" if damage == "text" else b"")
    else:
        run = torch.load(tmp_path / "model_0000000.pth", weights_only=True)["trainer"]["run"]
        others = {"other keys": {"model": {}}, "no metrics": {"trainer": {"run": run}, "best": 5}}
        torch.save(others.get(damage, 5), path)
    evaluations[:] = [2.0, 1.0, 1.0]
    train(cfg, resume=True)
    assert "The result of the best checkpoint cannot be read" in caplog.text
    assert best(tmp_path) == (2, 2.0)


def test_unknown_metric_is_refused(cfg):
    cfg.TEST.BEST_METRIC = "bbox/AP"
    told = r"^TEST.BEST_METRIC: got 'bbox/AP'; the evaluation gives classification/top1, classification/top5,"
    with pytest.raises(InputError, match=told):
        train(cfg, resume=False)


def test_metric_without_evaluation_is_refused(cfg):
    cfg.DATASETS.TEST = ()
    with pytest.raises(
        InputError, match=r"^TEST.BEST_METRIC: got 'classification/top1', but DATASETS.TEST names no data set\.$"
    ):
        train(cfg, resume=False)


def test_precise_batch_norm_is_the_same_after_resuming(cfg, tmp_path):
    cfg.DATASETS.TEST, cfg.TEST.BEST_METRIC = (), ""
    cfg.TEST.PRECISE_BN.ENABLED, cfg.TEST.PRECISE_BN.NUM_ITER = True, 2
    cfg.OUTPUT_DIR = str(tmp_path / "whole")
    train(cfg, resume=False)
    cfg.OUTPUT_DIR = str(tmp_path / "cut")
    with interrupted_at(2):
        train(cfg, resume=False)
    train(cfg, resume=True)
    whole, cut = (torch.load(tmp_path / x / "model_final.pth", weights_only=True)["model"] for x in ("whole", "cut"))
    assert same(whole, cut)
