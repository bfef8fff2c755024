"""``KD.DETERMINISTIC`` sets what PyTorch needs for equal runs on a GPU; no GPU is needed to see that it is set."""

import os

import pytest
import torch
from helpers import parse, tiny_cfg, train_net, with_data, write_yaml

from kd_det.engine import setup
from kd_det.engine.determinism import make_deterministic

VARIABLE = "CUBLAS_WORKSPACE_CONFIG"


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    yield
    torch.use_deterministic_algorithms(False)
    os.environ.pop(VARIABLE, None)


def state():
    return torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic, os.environ.get(VARIABLE)


def test_it_is_set_if_asked_for():
    make_deterministic(tiny_cfg())
    assert state() == (False, False, None)
    make_deterministic(tiny_cfg(options={"KD.DETERMINISTIC": True}))
    assert state() == (True, True, ":4096:8")


def test_a_workspace_that_the_user_has_chosen_stays():
    os.environ[VARIABLE] = ":16:8"
    make_deterministic(tiny_cfg(options={"KD.DETERMINISTIC": True}))
    assert os.environ[VARIABLE] == ":16:8"


@pytest.mark.usefixtures("in_process")
def test_a_run_sets_it_before_anything_is_built(coco_folder, tmp_path):
    config = write_yaml(tmp_path / "config.yaml", with_data(tiny_cfg(), coco_folder, tmp_path))
    setup(parse("--config-file", config, "KD.DETERMINISTIC", "True"))
    assert state() == (True, True, ":4096:8")


@pytest.mark.usefixtures("in_process")
def test_algorithms_chosen_by_their_speed_are_not_repeated(coco_folder, tmp_path):
    config = write_yaml(tmp_path / "config.yaml", with_data(tiny_cfg(), coco_folder, tmp_path))
    with pytest.raises(SystemExit, match=r"^error: CUDNN_BENCHMARK: must be False where KD.DETERMINISTIC is True"):
        train_net("--config-file", config, "KD.DETERMINISTIC", "True", "CUDNN_BENCHMARK", "True")
