"""Runs that earlier versions began go on with this one; ``earlier_runs/write_runs.py`` says how they were made."""

import json
import tarfile
from pathlib import Path

import pytest
import torch
from children import same
from helpers import train_net

from kd_det.config import read_config
from kd_det.data import register_datasets
from kd_det.engine import Trainer
from kd_det.engine.stages import PretrainingTrainer, stage_config

pytestmark = pytest.mark.usefixtures("in_process")
ARCHIVES = sorted(Path(__file__).with_name("earlier_runs").glob("*.tar.xz"))
RUNS = ["heads", "stage", "mutual"]


@pytest.fixture(params=ARCHIVES, ids=lambda path: path.name.split(".")[0])
def earlier(request, tmp_path, monkeypatch):
    """The working folder of the earlier version's runs, which is this one's, too."""
    with tarfile.open(request.param) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DETECTRON2_DATASETS", ".")
    return tmp_path


def last_line(path):
    return json.loads(path.read_text().splitlines()[-1])


@pytest.mark.parametrize("run", RUNS)
def test_an_earlier_run_goes_on_as_it_did_with_the_code_that_began_it(earlier, run):
    """The same images, boxes, learning rates and losses; the tolerance is for other processors."""
    train_net("--config-file", f"{run}/config.yaml", "--resume")
    expected = {k: v for k, v in json.loads(Path("expected.json").read_text()).items() if k.startswith(f"{run}/")}
    assert {str(path) for path in Path(run).rglob("metrics.json")} == expected.keys() != set()
    for metrics, values in expected.items():
        line = last_line(Path(metrics))
        assert {key: line.get(key) for key in values} == pytest.approx(values, rel=1e-4), metrics


@pytest.mark.parametrize("run", RUNS)
def test_all_that_an_earlier_checkpoint_holds_is_loaded(earlier, run):
    """Weights, adapters, averages, momentum and the state of the schedule, bit for bit and under the same names."""
    cfg = read_config(f"{run}/config.yaml")
    register_datasets(cfg)
    staged = Path(run, "pretrain").is_dir()
    trainer = PretrainingTrainer(stage_config(cfg, Path(run, "pretrain"))) if staged else Trainer(cfg)
    trainer.resume_or_load(resume=True)
    (path,) = earlier.joinpath(run).rglob("model_0000001.pth")
    saved = torch.load(path, weights_only=True)
    assert trainer.start_iter == saved.pop("iteration") + 1 == 2
    found = {"model": trainer.student} | trainer.checkpointer.checkpointables
    found = {key: value.state_dict() for key, value in found.items()}
    assert set(saved["trainer"]) <= set(found["trainer"])
    found["trainer"] = {key: found["trainer"][key] for key in saved["trainer"]}
    for part in saved:
        assert same(found[part], saved[part]), part
    assert found.keys() == saved.keys()
