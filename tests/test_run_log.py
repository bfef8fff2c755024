"""Tests what a run shows in the terminal and in its log file, and where an evaluation writes."""

import logging
import re
from types import SimpleNamespace

import pytest
import torch
from helpers import distilled_cfg, run_train_net, save_teacher, tiny_cfg, train_net, with_data, write_yaml

from kd_det.engine.hooks import BestCheckpointer
from kd_det.engine.results import ClosingTable, results_table
from kd_det.engine.run_log import is_for_terminal


def message(name: str, text: str, level: int = logging.INFO) -> logging.LogRecord:
    return logging.LogRecord(name, level, "", 0, text, None, None)


@pytest.mark.parametrize(
    ("name", "text", "shown"),
    [
        ("detectron2", "Environment info:\n", False),
        ("detectron2.engine.defaults", "Model:\n", False),
        ("detectron2.evaluation.testing", "copypaste: AP", False),
        ("detectron2.utils.events", " eta: 0:00:07  iter: 19", True),
        ("detectron2.evaluation.evaluator", "Inference done 11/20. Total: 0.0579 s/iter. ETA=0:00:59", False),
        ("detectron2.evaluation.evaluator", "Inference done 11/20. Total: 9.0579 s/iter. ETA=0:01:12", True),
        ("fvcore.common.checkpoint", "Saving checkpoint to a.pth", True),
        ("kd_det.engine.summary", "Summary of the run:", True),
    ],
)
def test_terminal_omits_details(name, text, shown):
    assert is_for_terminal(message(name, text)) == shown
    assert is_for_terminal(message(name, text, logging.WARNING))
    assert not is_for_terminal(message(name, text, logging.DEBUG)) or name.startswith(("detectron2", "fvcore"))


def test_run_of_200_iterations_shows_fewer_than_80_lines(coco_folder, tmp_path):
    """The longest kind: boxes and masks, a teacher, averaged weights, the best checkpoint."""
    teacher = save_teacher(tmp_path, tiny_cfg())
    options = {"SOLVER.MAX_ITER": 21, "SOLVER.EMA_DECAY": 0.9, "TEST.BEST_METRIC": "bbox/AP"}
    cfg = with_data(distilled_cfg(teacher, ["ReviewKDHead", "SoftTargetHead"], options), coco_folder, tmp_path / "run")
    done = run_train_net("--config-file", write_yaml(tmp_path / "run.yaml", cfg))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    progress = [line for line in lines if " iter: " in line]
    assert len(lines) + len(done.stderr.splitlines()) + 200 / 20 - len(progress) < 80
    assert "Warning" not in done.stderr
    assert len(set(lines) - {""}) > len(lines) - 10  # Only tables repeat a line.
    for shown in (
        "Summary of the run:",
        "total_loss: ",
        "model_final.pth",
        f"{tmp_path}/run/log.txt",
        "Results in",
    ):
        assert shown in done.stdout
    log = (tmp_path / "run/log.txt").read_text()
    for detail in ("Environment info:", "Running with full config:", "Model:", "Average Precision", "copypaste: "):
        assert detail not in done.stdout
        assert detail in log
    table = done.stdout.partition("Results in")[2]
    assert re.search(r"student +EMA +best bbox/AP\n", table)
    assert re.search(r"segm/AP50( +[\d.]+){3}\n", table)
    assert re.search(r"iteration +20 +20 +20\n", table)
    assert re.search(r"file +model_final.pth +model_final.pth \(ema\) +model_best.pth\n", table)
    assert "Results in" in log


def test_evaluation_writes_into_the_folder_of_its_run(coco_folder, tmp_path, in_process, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    cfg = with_data(tiny_cfg(options={"SOLVER.MAX_ITER": 1}), coco_folder, "output")
    config = write_yaml(tmp_path / "run.yaml", cfg)
    train_net("--config-file", config, "OUTPUT_DIR", run, "DATASETS.TEST", "()")
    before = {name: (run / name).read_bytes() for name in ("config.yaml", "log.txt", "metrics.json")}
    assert "The results" not in capsys.readouterr().out  # Nothing was evaluated.
    arguments = ("--config-file", config, "--eval-only", "MODEL.WEIGHTS", run / "model_final.pth")
    train_net(*arguments)
    assert (run / "inference/coco_instances_results.json").is_file()
    assert all((run / name).read_bytes().startswith(text) for name, text in before.items())
    assert (run / "config.yaml").read_bytes() == before["config.yaml"]
    assert not (tmp_path / "output").exists()
    out = capsys.readouterr().out
    assert f"The evaluation writes into {run}, the folder of the run that it evaluates." in out
    assert re.search(r"bbox +[\d.]+", out)
    train_net(*arguments, "OUTPUT_DIR", tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere/inference/coco_instances_results.json").is_file()


def test_results_table():
    tasks = {"bbox": {"AP": 12.345, "AP50": 30.0, "AP-cat": 10.0, "AP-polar bear": float("nan")}, "segm": {"AP": 1.0}}
    head, _, *lines = results_table(tasks).splitlines()
    assert head.split() == ["AP", "AP50"]
    assert [line.split() for line in lines[:2]] == [["bbox", "12.35", "30.00"], ["segm", "1.00"]]
    assert lines[2:] == ["bbox, classes: cat 10.00, polar bear nan"]


@pytest.fixture
def close(caplog):
    """The closing table of a run of 30 iterations with these results, as rows of cells."""

    def close(results, *, peers=(), best=None, iteration=30):
        hook = ClosingTable(list(peers), best)
        cfg = SimpleNamespace(OUTPUT_DIR="output/run")
        hook.trainer = SimpleNamespace(iter=iteration, max_iter=30, cfg=cfg, _last_eval_results=results)
        with caplog.at_level(logging.INFO):
            hook.after_train()
        table = caplog.messages[-1].splitlines() if caplog.messages else []
        return [re.split("  +", line.strip()) for line in table[1:]]

    return close


def test_closing_table_of_several_test_sets_and_averaged_weights(close):
    best = BestCheckpointer(10, "ema/b/bbox/AP")
    best.results, best.iteration = {"a/bbox/AP": 1, "ema/a/bbox/AP": 5, "b/bbox/AP": 1, "ema/b/bbox/AP": 6}, 19
    results = {"a": {"bbox": {"AP": 1.0, "AP-cat": 9.0}}, "b": {"bbox": {"AP": 2.0}}}
    results["ema"] = {"a": {"bbox": {"AP": 3.0}}, "b": {"bbox": {"AP": 4.0}}}
    assert close(results, best=best) == [
        ["student", "EMA", "best ema/b/bbox/AP"],
        ["---------", "---------------", "---------------------", "--------------------"],
        ["a/bbox/AP", "1.00", "3.00", "5.00"],
        ["b/bbox/AP", "2.00", "4.00", "6.00"],
        ["iteration", "29", "29", "19"],
        ["file", "model_final.pth", "model_final.pth (ema)", "model_best.pth (ema)"],
    ]


def test_closing_table_of_mutual_classifiers(close):
    results = {"classification": {"top1": 50.0, "top1-cat": 1.0}, "peer_2": {"classification": {"top1": 60.0}}}
    rows = close(results, peers=["output/run/peer_2"])
    assert rows[0] == ["student", "student 2"]
    assert rows[2] == ["classification/top1", "50.00", "60.00"]
    assert rows[-1] == ["file", "model_final.pth", "peer_2/model_final.pth"]


def test_no_closing_table_without_results_or_before_the_end(close):
    assert close({}) == []
    assert close({"bbox": {"AP": 1.0}}, iteration=20) == []


@pytest.mark.parametrize("results", [{}, {"bbox/AP": 7.0, "segm/AP": 8.0}])
def test_resumed_run_remembers_its_best_results(results, tmp_path):
    """A checkpoint of an older version has only the metric."""
    data = {"trainer": {"run": "r"}, "iteration": 9, "best": {"bbox/AP": 7.0}} | (
        {"results": results} if results else {}
    )
    torch.save(data, tmp_path / "model_best.pth")
    hook = BestCheckpointer(10, "bbox/AP")
    hook.trainer = SimpleNamespace(start_iter=20, run="r", checkpointer=SimpleNamespace(save_dir=str(tmp_path)))
    hook.before_train()
    assert (hook.best, hook.iteration, hook.results) == (7.0, 9, results or {"bbox/AP": 7.0})
