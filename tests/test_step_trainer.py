"""Tests gradient accumulation: gradients and logged losses equal those of the whole batch."""

import json

import pytest
import torch
from children import Event, Task, end, final_state, same, two_ranks
from classification.models import classifier_cfg
from helpers import distilled_cfg, train_net, with_data, write_yaml

pytestmark = pytest.mark.usefixtures("in_process")


@pytest.fixture
def config(tmp_path):
    """A classifier whose images do not meet: group norm, and no batch norm."""
    options = {"MODEL.RESNETS.NORM": "GN", "MODEL.CLASSIFIER.NUM_CLASSES": 10, "SEED": 1, "SOLVER.MAX_ITER": 3}
    options |= {"INPUT.CLASSIFICATION.SIZE": 8}
    cfg = classifier_cfg("detectron2", options=options | {"SOLVER.WARMUP_ITERS": 0, "SOLVER.BASE_LR": 0.01})
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("digits_train",), ()
    return write_yaml(tmp_path / "config.yaml", cfg)


def results(folder):
    """Weights, and the loss of the last iteration."""
    weights = torch.load(folder / "model_final.pth", weights_only=True)["model"]
    return weights, json.loads((folder / "metrics.json").read_text().splitlines()[-1])["total_loss"]


def assert_close(a, b):
    (weights, loss), (other_weights, other_loss) = results(a), results(b)
    assert loss == pytest.approx(other_loss, rel=1e-4)
    assert weights.keys() == other_weights.keys()
    for key, value in weights.items():
        torch.testing.assert_close(value, other_weights[key], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_step_equals_that_of_the_whole_batch(config, tmp_path, parts):
    train_net("--config-file", config, "OUTPUT_DIR", tmp_path / "whole")
    train_net("--config-file", config, "OUTPUT_DIR", tmp_path / "parts", "SOLVER.ACCUMULATE", parts)
    assert_close(tmp_path / "parts", tmp_path / "whole")


def test_accumulation_in_two_processes(config, tmp_path):
    task = Task(config, tmp_path)
    assert end(*[task.start("parts", "SOLVER.ACCUMULATE", 2, prepare=(rank,)) for rank in two_ranks()]) == [0, 0]
    assert task.run("whole") == 0
    assert_close(tmp_path / "parts", tmp_path / "whole")


def test_accumulating_detector_resumes_bit_for_bit(teacher, coco_folder, tmp_path):
    options = {"SOLVER.MAX_ITER": 4, "SOLVER.CHECKPOINT_PERIOD": 2, "SOLVER.ACCUMULATE": 2}
    cfg = with_data(distilled_cfg(teacher, ["ReviewKDHead"], options), coco_folder, tmp_path)
    cfg.DATASETS.TEST = ()
    task = Task(write_yaml(tmp_path / "config.yaml", cfg), tmp_path)
    assert task.run("cut", prepare=(Event("Trainer", 3),)) == -9
    assert task.run("cut", resume=True) == 0
    assert task.run("whole") == 0
    assert same(final_state(tmp_path / "cut"), final_state(tmp_path / "whole"))


def test_unknown_precision_is_refused(config, tmp_path):
    with pytest.raises(SystemExit, match=r"^error: SOLVER.AMP.DTYPE: got 'half'; allowed are float16, bfloat16\.$"):
        train_net("--config-file", config, "OUTPUT_DIR", tmp_path, "SOLVER.AMP.DTYPE", "half")


@pytest.mark.parametrize("parts", [0, -1, 3, 8])
def test_parts_must_divide_the_batch(config, tmp_path, parts):
    told = rf"^error: SOLVER.ACCUMULATE: got {parts}; it must divide the 4 image\(s\) of a process and step\.$"
    with pytest.raises(SystemExit, match=told):
        train_net("--config-file", config, "OUTPUT_DIR", tmp_path, "SOLVER.ACCUMULATE", parts)
