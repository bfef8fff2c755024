"""tools/benchmark.py: runs, and times the same work on both sides. Times themselves are not tested."""

import json
import re
import sys

import pytest
import torch
from detectron2.utils.events import EventStorage
from helpers import LEVELS, tiny_cfg, with_data, write_yaml

from kd_det import Teacher


@pytest.fixture
def benchmark(load_tool, monkeypatch):
    """The tool with tiny detectors, and without processes of their own."""
    module = load_tool("benchmark")

    def config(depth, heads):
        options = {"MODEL.RESNETS.RES2_OUT_CHANNELS": depth, "MODEL.RESNETS.NORM": "FrozenBN", "SOLVER.BASE_LR": 0.0}
        cfg = tiny_cfg(options=options | {"MODEL.ROI_HEADS.NUM_CLASSES": 6})
        cfg.KD.HEADS = heads
        cfg.KD.SOFT_TARGET.SOURCES = ["roi", "rpn", "mask"]
        cfg.KD.HINT.IN_FEATURES = LEVELS
        return cfg

    monkeypatch.setattr(module, "detector_config", config)
    monkeypatch.setattr(module, "in_new_processes", lambda jobs: [module.measure_memory(job) for job in jobs])
    return module


def run(benchmark, monkeypatch, *arguments):
    tiny = ["--size", 64, "--batch", 1, "--rounds", 2, "--depths", 8, 16]
    monkeypatch.setattr(sys, "argv", ["benchmark", *map(str, [*tiny, *arguments])])
    benchmark.run_tool(benchmark.main)


def test_table_and_json(benchmark, monkeypatch, tmp_path, capsys):
    run(benchmark, monkeypatch, "--heads", "none", "HintHead,SoftTargetHead", "--output", tmp_path / "out")
    table = (tmp_path / "out/benchmark.md").read_text()
    assert table in capsys.readouterr().out
    assert "| HintHead,SoftTargetHead" in table
    results = json.loads((tmp_path / "out/benchmark.json").read_text())
    none, both = (results["combinations"][name] for name in ("none", "HintHead,SoftTargetHead"))
    assert none["B"] < both["B"]
    assert both["ratio_low"] <= both["ratio"] <= both["ratio_high"]
    assert both["memory"] > 0


def test_weights_and_boxes_stay(benchmark, monkeypatch):
    """All steps of a case do the same work: they change no weight, and the teacher sees the boxes of the student."""
    monkeypatch.setattr(sys, "argv", ["benchmark", "--size", "64", "--batch", "1", "--depths", "8", "16"])
    args = benchmark.parse_args()
    student = benchmark.build_detector(benchmark.detector_config(8, [])).train()
    teacher = Teacher(benchmark.build_detector(benchmark.detector_config(16, [])))
    with EventStorage():
        case = benchmark.Case(["SoftTargetHead"], student, teacher, args)
        before = {key: value.clone() for key, value in student.state_dict().items()}
        case.plain_step()
        case.distilled_step()
        again = benchmark.Case(["SoftTargetHead"], student, teacher, args)
    assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())
    assert torch.equal(case.signals["roi_boxes"], again.signals["roi_boxes"])
    found = teacher(case.batch, case.names, case.signals)
    assert len(found["roi_logits"]) == len(case.signals["roi_boxes"]) > 0


@pytest.mark.usefixtures("in_process")
def test_loader(benchmark, monkeypatch, coco_folder, tmp_path, capsys):
    monkeypatch.setattr(benchmark, "LOADER_SECONDS", 0.1)
    config = write_yaml(tmp_path / "config.yaml", with_data(tiny_cfg(), coco_folder, tmp_path))
    run(benchmark, monkeypatch, "--loader", config, "SOLVER.IMS_PER_BATCH", 3)
    found = re.fullmatch(r"\S+: (\d+) images per second with 0 workers, 3 per batch\n", capsys.readouterr().out)
    assert int(found[1]) > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", 0], "--rounds"),
        (["--heads", "NoHead"], "'NoHead' is not a distillation head"),
        (["--loader", "a.yaml"], "--config-file"),
    ],
)
def test_mistakes_end_in_one_line(arguments, message, benchmark, monkeypatch):
    with pytest.raises(SystemExit, match=message):
        run(benchmark, monkeypatch, *arguments)
