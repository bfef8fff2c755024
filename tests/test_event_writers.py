"""Tests metrics.json, also across resumes, and Weights & Biases with a fake that records its calls."""

import json
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from classification.models import classifier_cfg
from detectron2.config import CfgNode
from helpers import distilled_cfg, interrupted_at, with_data

from kd_det import InputError
from kd_det.data import register_datasets
from kd_det.engine import Trainer
from kd_det.engine.event_writers import as_uint8, drop_lines
from kd_det.engine.stages import generation_config, stage_config, train

pytestmark = pytest.mark.usefixtures("in_process")


def digits(folder, **options) -> CfgNode:
    """A classifier of digits, evaluated after each fourth of twelve iterations."""
    size = {"MODEL.CLASSIFIER.NUM_CLASSES": 10, "INPUT.CLASSIFICATION.SIZE": 8, "SEED": 4, "OUTPUT_DIR": str(folder)}
    size |= {"SOLVER.MAX_ITER": 12, "SOLVER.CHECKPOINT_PERIOD": 3, "TEST.EVAL_PERIOD": 4, "SOLVER.BASE_LR": 0.01}
    cfg = classifier_cfg(options=size | options)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("digits_train",), ("digits_test",)
    register_datasets(cfg)
    return cfg


def read(folder) -> list[dict]:
    """The lines of metrics.json, which must be JSON by the letter."""

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    lines = (folder / "metrics.json").read_text(encoding="utf-8").splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def iterations(folder) -> list[int]:
    return [line["iteration"] for line in read(folder)]


# ---- metrics.json ----
def test_metrics_of_a_whole_run(teacher, coco_folder, tmp_path):
    heads = ["ReviewKDHead", "SoftTargetHead"]
    options = {"SOLVER.MAX_ITER": 5, "KD.SOFT_TARGET.SOURCES": ["roi", "rpn"]}
    cfg = with_data(distilled_cfg(teacher, heads, options), coco_folder, tmp_path)
    register_datasets(cfg)
    train(cfg, resume=False)
    step, evaluation = read(tmp_path)
    assert (step["iteration"], evaluation["iteration"]) == (4, 5)
    losses = {"loss_cls", "loss_box_reg", "loss_mask", "loss_rpn_cls", "loss_rpn_loc"}
    losses |= {"loss_kd_review", "loss_kd_soft_target_roi", "loss_kd_soft_target_rpn"}
    assert {name for name in step if name.startswith("loss_")} == losses
    assert {"total_loss", "lr", "time", "data_time"} <= step.keys()
    assert {"bbox/AP", "bbox/AP50", "bbox/AP-square", "segm/AP"} <= evaluation.keys()
    assert evaluation["bbox/APl"] is None  # The data set has no large object.


def test_each_evaluation_is_written_at_once(tmp_path, monkeypatch):
    """Also where there are several between two lines of losses."""
    cfg = digits(tmp_path, **{"SOLVER.MAX_ITER": 24, "TEST.EVAL_PERIOD": 5})
    found = []

    def evaluate(cls, cfg, model, evaluators=None):
        if found:
            assert found[-1] in [line.get("classification/top1") for line in read(tmp_path)]
        found.append(float(len(found)))
        return {"classification": {"top1": found[-1]}}

    monkeypatch.setattr(Trainer, "test", classmethod(evaluate))
    train(cfg, resume=False)
    lines = {line["iteration"]: line.get("classification/top1") for line in read(tmp_path)}
    assert lines == {4: 0.0, 9: 1.0, 14: 2.0, 19: 3.0, 23: None, 24: 4.0}
    assert iterations(tmp_path) == list(lines)


def test_resumed_run_neither_repeats_nor_loses_a_line(tmp_path):
    """It goes on behind iteration 8, when lines 11 and, half-written, another one are there already."""
    train(digits(tmp_path / "whole"), resume=False)
    cut, folder = digits(tmp_path / "cut", **{"SOLVER.CHECKPOINT_PERIOD": 9}), tmp_path / "cut"
    with interrupted_at(11):
        train(cut, resume=False)
    written = iterations(folder)
    assert written[:2] == [3, 7]
    assert written[-1] > 8
    with open(folder / "metrics.json", "a", encoding="utf-8") as file:
        file.write('{"data_time": 0.1, "iterat')
    train(cut, resume=True)
    assert iterations(folder) == iterations(tmp_path / "whole") == [3, 7, 11, 12]
    whole, resumed = ([x.get("classification/top1") for x in read(tmp_path / name)] for name in ("whole", "cut"))
    assert whole == resumed


def test_run_extended_beyond_its_end_keeps_its_evaluation(tmp_path):
    train(digits(tmp_path, **{"SOLVER.MAX_ITER": 5}), resume=False)
    before = read(tmp_path)
    train(digits(tmp_path), resume=True)
    assert read(tmp_path)[: len(before)] == before
    assert iterations(tmp_path) == [3, 4, 5, 7, 11, 12]


def test_new_run_in_the_same_folder_keeps_earlier_lines(tmp_path):
    cfg = digits(tmp_path, **{"SOLVER.MAX_ITER": 1})
    cfg.DATASETS.TEST = ()
    for _ in range(2):
        train(cfg, resume=False)
    assert iterations(tmp_path) == [0, 0]


def test_unwritable_file_is_reported_in_the_first_iteration(tmp_path):
    (tmp_path / "metrics.json").mkdir()
    with pytest.raises(IsADirectoryError, match=r"metrics\.json"):
        train(digits(tmp_path, **{"SOLVER.MAX_ITER": 1}), resume=False)


@pytest.mark.parametrize(
    ("start", "kept"), [(0, []), (19, []), (20, [19]), (40, [19, 39]), (60, [19, 39, 59]), (99, [19, 39, 59])]
)
@pytest.mark.parametrize("cut_off", ["", '{"iteration": 1', '{"iteration": 1}'])
def test_dropped_lines(tmp_path, start, kept, cut_off):
    path = tmp_path / "metrics.json"
    path.write_text("".join(f'{{"iteration": {i}, "lr": NaN}}\n' for i in (19, 39, 59)) + cut_off, encoding="utf-8")
    before = path.stat().st_ino
    drop_lines(str(path), start)
    assert [json.loads(line)["iteration"] for line in path.read_text().splitlines()] == kept
    assert (path.stat().st_ino == before) == (len(kept) == 3 and not cut_off)
    assert os.listdir(tmp_path) == ["metrics.json"]


@pytest.mark.parametrize(
    "odd",
    ["", "no JSON", "5", "[]", '{"lr": 1}', '{"iteration": null}', '{"iteration": "7"}', '{"iteration": NaN}', "\xff"],
)
@pytest.mark.parametrize(("start", "kept"), [(40, 2), (20, 1)])
def test_odd_lines_are_dropped_and_quoted(tmp_path, caplog, odd, start, kept):
    """Wherever they are among those that are dropped; before these they stay."""
    path = tmp_path / "metrics.json"
    path.write_text("".join(f'{{"iteration": {i}}}\n{odd}\n' for i in (19, 39)), encoding="latin-1")
    before = path.read_bytes().splitlines()
    drop_lines(str(path), start)
    assert path.read_bytes().splitlines() == before[: 2 * kept - 1]
    assert f"{path}: drops line 4, which belongs to no iteration: {odd.encode('latin-1')!r}"[:-1] in caplog.text


def test_missing_file_has_nothing_to_drop(tmp_path):
    drop_lines(str(tmp_path / "metrics.json"), 5)
    assert not os.listdir(tmp_path)


# ---- Weights & Biases ----
class FakeWandb:
    """Of the package ``wandb`` what the writer uses."""

    def __init__(self):
        self.runs = []

    def init(self, **arguments):
        self.runs.append(SimpleNamespace(arguments=arguments, logged=[], exit_codes=[]))
        run = self.runs[-1]
        run.log = lambda values, step: run.logged.append((step, values))
        run.finish = lambda exit_code: run.exit_codes.append(exit_code)
        return run

    class Image:
        def __init__(self, pixels):
            self.pixels = pixels


@pytest.fixture
def wandb(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_scalars_pictures_and_config_are_sent(teacher, coco_folder, tmp_path, wandb):
    options = {"VIS_PERIOD": 1, "SOLVER.MAX_ITER": 2, "WANDB.PROJECT": "detectors", "WANDB.NAME": "tiny"}
    options |= {"KD.ATTENTION_TRANSFER.IN_FEATURES": ["p2", "p5"]}
    cfg = with_data(distilled_cfg(teacher, ["AttentionTransferHead"], options), coco_folder, tmp_path)
    register_datasets(cfg)
    train(cfg, resume=False)
    (run,) = wandb.runs
    saved = torch.load(tmp_path / "model_final.pth", weights_only=True)["trainer"]["run"]
    config = run.arguments.pop("config")
    expected = {"project": "detectors", "name": "tiny", "id": saved, "resume": "allow", "dir": str(tmp_path)}
    assert run.arguments == expected
    assert config == json.loads(json.dumps(config))
    assert (config["SOLVER"]["MAX_ITER"], config["KD"]["HEADS"]) == (2, ["AttentionTransferHead"])
    assert [step for step, _ in run.logged] == [0, 1, 2]
    first, last, evaluation = (values for _, values in run.logged)
    assert {"loss_kd_attention_transfer", "loss_mask", "total_loss", "lr"} <= last.keys()
    assert "bbox/AP" in evaluation
    for values in (first, last):
        assert {"predictions", "attention/p2", "attention/p5"} <= values.keys()
        images = [value.pixels for value in values.values() if isinstance(value, wandb.Image)]
        assert len(images) > 5  # Detectron2's own, too.
        assert all(image.dtype == np.uint8 and image.shape[2] == 3 for image in images)
    assert run.exit_codes == [0]
    assert sum(path.stat().st_size for path in tmp_path.glob("events.out.*")) > 100_000  # TensorBoard has them, too.


def test_resumed_run_continues_its_wandb_run_and_a_new_one_does_not(tmp_path, wandb):
    cfg = digits(tmp_path, **{"WANDB.PROJECT": "digits", "TEST.EVAL_PERIOD": 0})
    with interrupted_at(8):
        train(cfg, resume=False)
    train(cfg, resume=True)
    train(cfg, resume=False)
    ids = [run.arguments["id"] for run in wandb.runs]
    assert ids[0] == ids[1] != ids[2]
    assert [run.exit_codes for run in wandb.runs] == [[1], [0], [0]]
    assert wandb.runs[0].arguments["name"] == str(tmp_path)


def test_stages_and_generations_have_their_own_names(tmp_path):
    cfg = digits(tmp_path, **{"WANDB.NAME": "ban"})
    assert stage_config(cfg, tmp_path / "pretrain").WANDB.NAME == "ban/pretrain"
    assert generation_config(cfg, 2).WANDB.NAME == "ban/gen_2"
    cfg.WANDB.NAME = ""
    assert generation_config(cfg, 2).WANDB.NAME == ""


def test_run_does_not_start_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    told = r"^WANDB.PROJECT: got 'digits', which needs wandb \(.*\): pip install wandb\.$"
    with pytest.raises(InputError, match=told):
        train(digits(tmp_path, **{"WANDB.PROJECT": "digits"}), resume=False)
    assert not any(tmp_path.glob("*.pth"))


def test_wandb_is_off_by_default(tmp_path, wandb):
    cfg = digits(tmp_path, **{"SOLVER.MAX_ITER": 1})
    cfg.DATASETS.TEST = ()
    train(cfg, resume=False)
    assert not wandb.runs


def test_pictures_are_converted_to_bytes():
    floats = torch.tensor([0.0, 0.5, 1.0], requires_grad=True)[:, None, None].expand(3, 2, 4)
    assert as_uint8(floats)[1, 3].tolist() == [0, 127, 255]
    array = np.arange(24, dtype=np.uint8).reshape(3, 2, 4)
    assert as_uint8(array).tolist() == array.transpose(1, 2, 0).tolist()
