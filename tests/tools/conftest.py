"""Commands in this process, and output folders of runs, made without training."""

from pathlib import Path

import pytest
import torch
from helpers import build, measured_cfg, write_yaml

from kd_det.benchmarking import case
from kd_det.commands.console import run_command


@pytest.fixture(scope="session")
def run_tool():
    """Run ``kd-det NAME`` in this process; a user's mistake raises SystemExit with its one line."""

    def run(name: str, *arguments: str) -> None:
        run_command(name, list(map(str, arguments)))

    return run


@pytest.fixture
def tiny_networks(monkeypatch):
    """Makes the networks of measurements tiny."""
    monkeypatch.setattr(case, "detector_config", measured_cfg)


@pytest.fixture(scope="session")
def save_run():
    """Write the output folder of a run: its config as dumped, and the student's random weights."""

    def save(folder: Path, cfg, *, seed: int = 0) -> str:
        folder.mkdir(parents=True)
        write_yaml(folder / "config.yaml", cfg)
        model = build(cfg, seed=seed)
        if hasattr(model, "head"):
            # RetinaNet's scores start equal, and an order among equals means nothing.
            torch.nn.init.normal_(model.head.cls_score.weight, std=0.3)
        student = getattr(model, "student", model)
        if hasattr(student, "linear"):
            # A classifier that is sure of everything leaves an ensemble nothing but ties.
            torch.nn.init.normal_(student.linear.weight, std=0.01)
        torch.save({"model": student.state_dict(), "iteration": 1}, folder / "model_0000001.pth")
        (folder / "last_checkpoint").write_text("model_0000001.pth")
        return str(folder)

    return save
