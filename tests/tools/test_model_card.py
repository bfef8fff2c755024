"""Tests what kd-det export writes for the Hugging Face Hub: weights as safetensors, and a model card."""

import json
import os
import sys
import time

import pytest
import torch
from helpers import CLASSES, build, distilled_cfg, tiny_cfg, with_data, write_yaml
from huggingface_hub import ModelCard
from safetensors import safe_open

from kd_det.checkpoint.safe_loading import SafeCheckpointer
from kd_det.commands.export import parse_args
from kd_det.export import Origin, export_student, find_run, load_student, read_student_config, student
from kd_det.export.model_card import make_card
from kd_det.export.student import write_card
from kd_det.teacher import build_teacher


@pytest.fixture
def run(teacher, coco_folder, tmp_path, save_run):
    """The folder of a distilled run, one of kd-det repeat with two seeds."""
    cfg = with_data(distilled_cfg(teacher, ["HintHead"], {"KD.HINT.WEIGHT": 0.25}), coco_folder, tmp_path, "things")
    run = save_run(tmp_path / "repeat/hint_seed1", cfg)
    metrics = {"bbox AP": 30.123, "segm AP": None, "bbox AP-bar": 1.0}
    difference = {"mean": 2.5, "low": 1.25, "high": 3.75, "seeds": 3, "verdict": "helps"}
    comparison = {
        "runs": [
            {"name": "hint", "source": "output/repeat/hint_seed1", "metrics": metrics},
            {"name": "hint", "source": "output/repeat/hint_seed2", "metrics": {"bbox AP": 9.0}},
        ],
        "summary": {"hint": {"bbox AP": {"mean": 19.5, "std": 14.94}, "segm AP": {"mean": None, "std": None}}},
        "differences": {"plain": {"hint": {"bbox AP": difference}}},
    }
    (tmp_path / "repeat/comparison").mkdir()
    (tmp_path / "repeat/comparison/comparison.json").write_text(json.dumps(comparison))
    (tmp_path / "repeat/repeat.json").write_text(json.dumps({"commands": ["kd-det repeat --teacher t.yaml"]}))
    return run


def test_the_card_says_where_the_student_comes_from(run, teacher, tmp_path, run_tool):
    run_tool("export", "--run", run, "--output", tmp_path / "out", "--no-torchscript", "--model-card", "--safetensors")
    assert sorted(os.listdir(tmp_path / "out")) == ["README.md", "student.pth", "student.safetensors", "student.yaml"]
    card = ModelCard.load(tmp_path / "out/README.md")
    assert (card.data.license, card.data.pipeline_tag) == ("unknown", "image-segmentation")
    (result,) = card.data.eval_results
    assert (result.dataset_name, result.metric_name, result.metric_value) == ("things", "bbox AP", 30.12)
    text = card.text
    for part in (
        "# hint_seed1",
        f"Image segmentation of 3 classes: {', '.join(CLASSES)}.",
        f"| teacher | {teacher['KD.TEACHER.CONFIG_FILE']}, weights: {teacher['KD.TEACHER.WEIGHTS']} |",
        "| distillation heads | HintHead (WEIGHT 0.25) |",
        "On things, as kd-det repeat compared it (one of 2 seeds):",
        "| bbox AP | 30.12 (all seeds: 19.50 ± 14.94) |",
        "| bbox AP | plain | +2.50 [+1.25, +3.75] | 3 | helps |",
        "- `student.safetensors`: ",
        "kd-det export --run ",
        "kd-det repeat --teacher t.yaml",
        "To be filled in",
    ):
        assert part in text, part
    assert "| segm AP" not in text


def test_the_speed_is_that_of_the_files(tmp_path, monkeypatch):
    cfg, opened = tiny_cfg(), []

    def open_file(path, cfg, key):
        opened.append(key)
        return lambda batch: time.sleep(0.05)

    monkeypatch.setattr(student, "ExportedModel", open_file)
    for name in ("student.onnx", "student.pth"):
        (tmp_path / name).touch()
    write_card(Origin(cfg, "", "kd-det export"), build(cfg).eval(), cfg, torch.rand(3, 64, 96) * 255, tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "Median time for one image of 64 x 96 pixels, on " in text
    rows = {
        line.split("|")[1].strip(): line.split("|")[2] for line in text.splitlines() if line.startswith("| student.")
    }
    assert opened == ["student.onnx"]
    assert float(rows["student.onnx"]) > 50 - 1
    assert float(rows["student.pth"]) > 0


def test_a_run_of_its_own_has_the_metrics_of_its_last_evaluation(tmp_path, save_run):
    cfg = tiny_cfg()
    folder = save_run(tmp_path / "run", cfg)
    lines = [{"iteration": 1, "bbox/AP": 5.0}, {"iteration": 2, "bbox/AP": 7.5, "ema/bbox/AP": 8.0}, {"iteration": 3}]
    (tmp_path / "run/metrics.json").write_text("\n".join([*map(json.dumps, lines), '{"iteration": 4, "bbox']))
    for ema, value in ((False, "7.50"), (True, "8.00")):
        text = make_card(Origin(cfg, folder, "kd-det export", ema), build(cfg), [], {}, "").text
        assert f"| bbox AP | {value} |" in text
        assert "in the last evaluation of the run (iteration 2)" in text
        assert "| teacher | none |" in text
        assert "Differences" not in text
        assert "Not measured." in text
    text = make_card(Origin(cfg, "", "kd-det export"), build(cfg), [], {}, "").text
    assert text.count("Not measured.") == 2


def test_safetensors_load_wherever_a_checkpoint_is_named(tmp_path, save_run):
    """As MODEL.WEIGHTS, as the teacher's weights, and as the weights of a run."""
    cfg = tiny_cfg()
    _, weights = find_run(save_run(tmp_path / "run", cfg))
    export_student(cfg, weights, str(tmp_path / "out"), safetensors=True)
    file = str(tmp_path / "out/student.safetensors")
    with safe_open(file, "pt") as content:
        assert content.metadata() == {"format": "pt"}
    expected = torch.load(tmp_path / "out/student.pth", weights_only=True)["model"]

    student = build(cfg, seed=5)
    SafeCheckpointer(student).load(file)
    options = {"KD.TEACHER.CONFIG_FILE": write_yaml(tmp_path / "teacher.yaml", cfg), "KD.TEACHER.WEIGHTS": file}
    teacher = build_teacher(distilled_cfg(options, []))
    config = read_student_config(str(tmp_path / "out/student.yaml"))
    for model in (student, teacher.model, load_student(config, file, "cpu")):
        loaded = model.state_dict()
        assert loaded.keys() == expected.keys()
        assert all(torch.equal(loaded[key], value) for key, value in expected.items())


def test_a_shared_tensor_is_written_under_each_of_its_names(tmp_path, save_run):
    """RetinaNet's head has its convolutions once for all levels, also where norms belong to a level."""
    cfg = tiny_cfg("retinanet", {"MODEL.RETINANET.NORM": "BN"})
    _, weights = find_run(save_run(tmp_path / "run", cfg))
    export_student(cfg, weights, str(tmp_path / "out"), safetensors=True)
    with safe_open(str(tmp_path / "out/student.safetensors"), "pt") as content:
        assert set(content.keys()) == torch.load(weights, weights_only=True)["model"].keys()


def test_a_missing_package_is_named(tmp_path, save_run, run_tool, monkeypatch):
    run = save_run(tmp_path / "run", tiny_cfg())
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(SystemExit, match=r"--model-card: needs huggingface_hub \("):
        run_tool("export", "--run", run, "--output", tmp_path / "out", "--no-torchscript", "--model-card")
    assert not (tmp_path / "out").exists()


def test_the_command_stands_in_the_card_as_it_was_given():
    args = parse_args(["--run", "my run", "--output", "out", "--model-card"])
    assert args.command == "kd-det export --run 'my run' --output out --model-card"
