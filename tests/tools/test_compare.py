"""Tests kd-det compare: table, JSON and picture of several runs on a tiny data set."""

import io
import json
import math
import re
import shutil
import sys

import cv2
import numpy as np
import pytest
import torch
from classification.models import classifier_cfg
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances
from helpers import tiny_cfg, with_data, write_yaml
from torch import nn

from kd_det.analysis import compare_detectors
from kd_det.analysis.differences import find_differences, paired_difference
from kd_det.analysis.run import Run
from kd_det.analysis.runs import load_runs
from kd_det.analysis.table import decimals, make_difference_tables, make_rows, make_table, summarise, without_nan
from kd_det.classification.image_mapper import ClassificationMapper
from kd_det.data import DetectionMapper, choose_images, register_datasets
from kd_det.data.shapes import CLASSES
from kd_det.data.shapes_folder import write_shapes
from kd_det.engine import pictures, run_tool
from kd_det.engine.picture_grid import Words
from kd_det.engine.pictures import CELL, FALSE, HIT, SMALL_CELL
from kd_det.export import find_run, load_student, read_student_config

pytestmark = pytest.mark.usefixtures("in_process")

DIGITS = {
    "MODEL.CLASSIFIER.NUM_CLASSES": 10,
    "INPUT.CLASSIFICATION.SIZE": 8,
    "DATASETS.TEST": ("digits_test",),
    "SOLVER.IMS_PER_BATCH": 64,
}


@pytest.fixture
def photos(tmp_path):
    """The config of a classifier whose test set is a folder of three images."""
    for name in ("ant", "bee", "cat"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        cv2.imwrite(str(tmp_path / "photos" / name / "0.png"), np.zeros((20, 30, 3), np.uint8))
    cfg = classifier_cfg(options={"DATASETS.TEST": ("photos",)})
    cfg.DATASETS.IMAGE_FOLDER["photos"] = CfgNode({"ROOT": str(tmp_path / "photos")})
    return cfg


def read_rows(table: str) -> dict[str, list[str]]:
    """Maps the first cell of each row of a Markdown table to the other cells."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in rows if not row[0].startswith(":-")}


def test_masks_boxes_and_seeds(coco_folder, tmp_path, save_run, run_tool, capsys):
    masks = with_data(tiny_cfg(), coco_folder, tmp_path)
    boxes = with_data(tiny_cfg("retinanet"), coco_folder, tmp_path)
    one = save_run(tmp_path / "masks", masks)
    two = [save_run(tmp_path / f"boxes{seed}", boxes, seed=seed) for seed in (0, 1)]
    runs = [f"masks={one}", f"boxes={two[0]}", f"boxes={two[1]}/config.yaml:{two[1]}/model_0000001.pth"]
    output = tmp_path / "comparison"
    run_tool("compare", *(x for run in runs for x in ("--run", run)), "--output", output, "--images", 2)

    text = (output / "comparison.md").read_text()
    assert text in capsys.readouterr().out + "\n"
    rows = read_rows(text)
    assert {"bbox AP", "bbox AP75", "bbox AP-triangle", "segm AP50", "parameters (M)", "GFLOPs", "ms per image"} <= set(
        rows
    )
    assert rows[""] == ["masks", "boxes (2 runs)"]
    assert rows["segm AP"][1] == "-"
    assert ["±" in cell for cell in rows["F1"]] == [False, True]
    assert "±: standard deviation" in text

    results = json.loads((output / "comparison.json").read_text())
    assert [run["name"] for run in results["runs"]] == ["masks", "boxes", "boxes"]
    assert results["runs"][1]["metrics"]["ms per image"] > 0
    assert results["summary"]["masks"]["GFLOPs"]["mean"] > 0
    assert 0 < results["runs"][0]["metrics"]["score threshold"] < 1
    height, width, _ = cv2.imread(str(output / "comparison.png")).shape
    assert width == 3 * CELL
    assert height > 2 * CELL * 64 / 96 * 0.9


class Oracle(nn.Module):
    """A detector that gives an image's objects as they are labelled, but for those of some classes."""

    def __init__(self, dataset: str, unseen=()):
        super().__init__()
        self.records = {record["image_id"]: record for record in DatasetCatalog.get(dataset)}
        self.unseen = unseen

    def forward(self, batch: list[dict]) -> list[dict]:
        return [{"instances": self.find(self.records[image["image_id"]])} for image in batch]

    def find(self, record: dict) -> Instances:
        things = [x for x in record["annotations"] if x["category_id"] not in self.unseen]
        found = Instances((record["height"], record["width"]))
        boxes = [BoxMode.convert(x["bbox"], x["bbox_mode"], BoxMode.XYXY_ABS) for x in things]
        found.pred_boxes = Boxes(torch.tensor(boxes).reshape(-1, 4))
        found.scores = torch.full((len(things),), 0.25)
        found.pred_classes = torch.tensor([x["category_id"] for x in things], dtype=torch.int64)
        return found


@pytest.fixture
def measure(coco_folder, tmp_path):
    """Measures oracles on the data set of four images, with other names of its categories."""

    def run(names: list[str], *, objects: bool = True, **options) -> dict[str, float]:
        data = json.loads((coco_folder / "instances.json").read_text())
        data["categories"] = [{"id": i, "name": name} for i, name in enumerate(names, 1)]
        data["annotations"] = data["annotations"] if objects else []
        (tmp_path / "instances.json").write_text(json.dumps(data))
        (tmp_path / "images").symlink_to(coco_folder / "images")
        cfg = with_data(tiny_cfg("retinanet"), tmp_path, tmp_path)
        register_datasets(cfg)
        (dataset,) = cfg.DATASETS.TEST
        oracle = Run("oracle", "", cfg, Oracle(dataset, **options))
        (metrics,) = compare_detectors.evaluate([oracle], dataset, DatasetCatalog.get(dataset))
        return metrics

    return run


def test_perfect_detections(measure):
    """Classes of one name keep separate rows; the AP of one without objects is not a number."""
    metrics = measure(["cell", "cell", "nucleus", "a|b"])
    assert list(metrics) == [
        *("bbox AP", "bbox AP50", "bbox AP75"),
        *("bbox AP-cell (class 1)", "bbox AP-cell (class 2)", "bbox AP-nucleus", "bbox AP-a|b"),
        *("F1", "score threshold"),
    ]
    assert math.isnan(metrics.pop("bbox AP-a|b"))
    assert metrics.pop("score threshold") == 0.25
    assert list(metrics.values()) == pytest.approx([100] * 7)


def test_a_detector_that_finds_nothing_has_zeros(measure):
    metrics = measure(["a", "b", "c"], unseen=(0, 1, 2))
    assert metrics == {"bbox AP": 0, "bbox AP50": 0, "bbox AP75": 0, "F1": 0, "score threshold": 1}


def test_a_data_set_without_objects_has_no_ap(measure):
    metrics = measure(["a", "b", "c"], objects=False)
    assert all(math.isnan(value) for name, value in metrics.items() if name.startswith("bbox AP"))
    assert metrics["F1"] == 0


def test_a_model_may_have_more_classes_than_the_data_set(coco_folder, tmp_path, save_run, run_tool):
    cfg = with_data(tiny_cfg(options={"MODEL.ROI_HEADS.NUM_CLASSES": 5}), coco_folder, tmp_path)
    run = save_run(tmp_path / "run", cfg)
    dataset, (loaded,) = load_runs([("a", run)], None, "cpu")
    found = loaded.predict(DetectionMapper(cfg, is_train=False)(DatasetCatalog.get(dataset)[0]))
    assert found.pred_classes.min() <= 2 < found.pred_classes.max()
    run_tool("compare", "--run", f"a={run}", "--output", tmp_path / "out", "--images", 1)
    rows = read_rows((tmp_path / "out/comparison.md").read_text())
    assert [name for name in rows if "bbox AP-" in name] == ["bbox AP-square", "bbox AP-triangle", "bbox AP-bar"]


def test_a_model_that_detects_nothing_is_refused(coco_folder, tmp_path, save_run, run_tool):
    cfg = with_data(tiny_cfg(), coco_folder, tmp_path)
    cfg.MODEL.META_ARCHITECTURE = "ProposalNetwork"
    with pytest.raises(SystemExit, match="--run rpn: its model gives proposals"):
        run_tool("compare", "--run", f"rpn={save_run(tmp_path / 'run', cfg)}", "--output", tmp_path / "out")


def test_voc_has_both_metrics(tmp_path, save_run, run_tool):
    write_shapes(tmp_path / "shapes", train=2, test=3, size=64)
    cfg = tiny_cfg(options={"MODEL.ROI_HEADS.NUM_CLASSES": 6})
    entry = {"ROOT": str(tmp_path / "shapes"), "SPLIT": "test", "CLASSES": list(CLASSES)}
    cfg.DATASETS.VOC_FORMAT["tiny_voc"] = CfgNode(entry)
    cfg.DATASETS.TEST = ("tiny_voc",)
    run = save_run(tmp_path / "run", cfg)
    run_tool("compare", "--run", f"a={run}", "--output", tmp_path / "out", "--images", 1)
    assert "json_file" not in MetadataCatalog.get("tiny_voc").as_dict()  # The converted copy is gone.
    results = json.loads((tmp_path / "out/comparison.json").read_text())
    metrics = results["runs"][0]["metrics"]
    assert {"bbox AP", "bbox AP-star", "voc AP", "voc AP50"} <= set(metrics)
    assert not any(name.startswith("segm") for name in metrics)  # The model has masks, the data set has none.
    assert "PASCAL VOC AP" in results["table"]


def test_classifiers_and_seeds(tmp_path, save_run, run_tool):
    wide = save_run(tmp_path / "wide", classifier_cfg("wide_resnet", options=DIGITS))
    cfg = classifier_cfg(options=DIGITS)
    narrow = [save_run(tmp_path / f"narrow{seed}", cfg, seed=seed) for seed in (0, 1)]
    runs = [f"narrow={narrow[0]}", f"narrow={narrow[1]}", f"wide={wide}"]
    output = tmp_path / "comparison"
    run_tool("compare", *(x for run in runs for x in ("--run", run)), "--output", output, "--images", 3)

    rows = read_rows((output / "comparison.md").read_text())
    classes = [f"top1-{digit}" for digit in range(10)]
    assert list(rows) == ["", "top1", "top5", *classes, "parameters (M)", "GFLOPs", "ms per image"]
    assert rows[""] == ["narrow (2 runs)", "wide"]
    assert "±" in rows["top1"][0]
    assert float(rows["GFLOPs"][1]) > 0  # At two decimals it would be 0.00.

    results = json.loads((output / "comparison.json").read_text())
    assert (results["dataset"], results["dataset_images"]) == ("digits_test", 355)
    config, weights = find_run(wide)
    model, mapper = load_student(read_student_config(config), weights, "cpu"), ClassificationMapper(cfg, is_train=False)
    images = [mapper(record) for record in DatasetCatalog.get("digits_test")]
    with torch.no_grad():
        answers = [output["scores"].argmax().item() for output in model(images)]
    hits = [answer == image["label"] for answer, image in zip(answers, images, strict=True)]
    assert results["runs"][2]["metrics"]["top1"] == pytest.approx(100 * sum(hits) / len(hits))
    assert cv2.imread(str(output / "comparison.png")).shape[1] == 4 * SMALL_CELL  # image, label, narrow, wide


def test_differences_to_a_baseline(photos, tmp_path, save_run, run_tool, capsys):
    runs = []
    for seed in (0, 1, 2):
        photos.SEED = seed
        runs += [("other" if seed else "teacher", save_run(tmp_path / f"other{seed}", photos, seed=seed))]
        runs += [("plain", save_run(tmp_path / f"plain{seed}", photos, seed=10 + seed))] * (seed > 0)
    arguments = [x for name, path in runs for x in ("--run", f"{name}={path}")] + ["--images", 1]
    output = tmp_path / "out"
    run_tool("compare", *arguments, "--baseline", "plain", "--baseline", "plain=other", "--output", output)
    text = (output / "comparison.md").read_text()
    assert text in capsys.readouterr().out + "\n"
    to_plain, to_other = text.split("seed by seed:\n\n")[1:]
    assert read_rows(to_plain)[""] == ["other (2 seeds)"]
    assert read_rows(to_other)[""] == ["plain (2 seeds)"]
    assert "Not compared: teacher, no seed in common with plain." in to_plain
    results = json.loads((output / "comparison.json").read_text())
    assert [run["seed"] for run in results["runs"]] == [0, 1, 1, 2, 2]
    plain, other = ([x["metrics"]["top1"] for x in results["runs"] if x["name"] == name] for name in ("plain", "other"))
    expected = paired_difference(other, plain)
    assert results["differences"]["plain"]["other"]["top1"] == expected
    mean, low, high = (f"{x:+.2f}" for x in (expected["mean"], expected["low"], expected["high"]))
    assert read_rows(to_plain)["top1"] == [f"{mean} [{low}, {high}]"]

    arguments = ["--run", f"a={runs[1][1]}", "--run", f"a={runs[1][1]}", "--run", f"b={runs[0][1]}"]
    with pytest.raises(SystemExit, match=r"--baseline a: runs are paired .* two runs of a have SEED 1\.") as error:
        run_tool("compare", *arguments, "--baseline", "a", "--output", tmp_path / "none")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "none").exists()


def test_generations_and_their_ensemble_have_the_seed_of_the_chain(tmp_path, save_run):
    cfg = classifier_cfg(options=DIGITS | {"SEED": 40})
    save_chain(tmp_path / "chain", cfg, save_run)
    cfg.SEED = -1
    single = save_run(tmp_path / "single", cfg)
    _, loaded = load_runs([("ban", str(tmp_path / "chain")), ("single", single)], None, "cpu")
    assert [(run.name, run.seed) for run in loaded] == [
        ("ban gen 1", 40),
        ("ban gen 2", 40),
        ("ban ensemble", 40),
        ("single", None),
    ]


def test_a_table_of_differences():
    """An experiment may have fewer seeds than others, lack a metric, or not be a number."""
    runs = [{"name": "plain", "seed": seed, "metrics": {"bbox AP": 10.0 * seed, "GFLOPs": 0.008}} for seed in (1, 2, 3)]
    for name, values in {"few": {1: 12.0, 2: 25.0}, "one": {3: 29.0}, "hidden": {1: 1.0, 2: math.nan, 3: 2.0}}.items():
        runs += [{"name": name, "seed": seed, "metrics": {"bbox AP": value}} for seed, value in values.items()]
    runs += [{"name": "same", "seed": seed, "metrics": {"bbox AP": 10.0 * seed, "GFLOPs": 0.01}} for seed in (1, 2, 3)]
    names, measured = [run["name"] for run in runs], [run["metrics"] for run in runs]
    results = {"runs": runs, "summary": summarise(names, measured)} | find_differences(runs, [("", "plain")])
    assert read_rows(make_difference_tables(results)) == {
        "": ["few (2 seeds)", "one (1 seed)", "hidden (3 seeds)", "same (3 seeds)"],
        "bbox AP": ["+3.50 [-15.56, +22.56]", "-1.00", "nan", "+0.00 [+0.00, +0.00] no evidence"],
        "GFLOPs": ["-", "-", "-", "+0.0020 [+0.0020, +0.0020] hurts"],
    }


def save_chain(folder, cfg, save_run, *, seed: int = 0) -> list[str]:
    """The output folder of two generations, below config.yaml as a training leaves it; a third is an older chain's."""
    generations = []
    for i in (1, 2, 3):
        generation = cfg.clone()
        generation.SEED += i
        generations.append(save_run(folder / f"gen_{i}", generation, seed=seed + i))
    chain = cfg.clone()
    chain.KD.GENERATIONS = 2
    write_yaml(folder / "config.yaml", chain)
    return generations[:2]


def test_unfinished_runs_are_reported(tmp_path, save_run, caplog):
    cfg = classifier_cfg(options=DIGITS)
    chain, finished = tmp_path / "chain", tmp_path / "finished"
    save_chain(chain, cfg, save_run)
    shutil.rmtree(chain / "gen_2")
    save_run(finished, cfg)
    (finished / "model_0000001.pth").rename(finished / "model_final.pth")
    (finished / "last_checkpoint").write_text("model_final.pth")
    load_runs([("ban", str(chain)), ("plain", str(finished))], "digits_test", "cpu")
    assert [record.getMessage() for record in caplog.records if record.name.startswith("kd_det.")] == [
        f"ban={chain}: the chain is not finished, of 2 generations only 1 are there.",
        f"{chain / 'gen_1'}: the run is not finished; its newest checkpoint is model_0000001.pth.",
    ]


def test_generations_of_classifiers_and_their_ensemble(tmp_path, save_run, run_tool):
    cfg = classifier_cfg(options=DIGITS)
    generations = [save_chain(tmp_path / f"seed{seed}", cfg, save_run, seed=seed) for seed in (10, 20)]
    run_tool(
        "compare",
        *(
            "--run",
            f"ban={tmp_path / 'seed10'}",
            "--run",
            f"ban={tmp_path / 'seed20'}",
            "--run",
            f"one={generations[0][1]}",
        ),
        *("--output", tmp_path / "out", "--images", 1),
    )
    rows = read_rows((tmp_path / "out/comparison.md").read_text())
    assert rows[""] == ["ban gen 1 (2 runs)", "ban gen 2 (2 runs)", "ban ensemble (2 runs)", "one"]
    parameters = [float(cell.split()[0]) for cell in rows["parameters (M)"]]
    assert parameters[2] == pytest.approx(parameters[0] + parameters[1], rel=0.1)
    assert float(rows["GFLOPs"][2].split()[0]) > float(rows["GFLOPs"][0].split()[0])

    models = [load_student(cfg, path + "/model_0000001.pth", "cpu") for path in generations[0]]
    mapper = ClassificationMapper(cfg, is_train=False)
    images = [mapper(record) for record in DatasetCatalog.get("digits_test")]
    with torch.no_grad():
        scores = sum(torch.stack([output["scores"] for output in model(images)]) for model in models)
    hits = (scores.argmax(dim=1) == torch.tensor([image["label"] for image in images])).double().mean()
    results = json.loads((tmp_path / "out/comparison.json").read_text())
    ensembles = [run["metrics"]["top1"] for run in results["runs"] if run["name"] == "ban ensemble"]
    assert ensembles[0] == pytest.approx(100 * hits.item())


def test_generations_of_detectors_and_their_ensemble(coco_folder, tmp_path, save_run, run_tool):
    save_chain(tmp_path / "chain", with_data(tiny_cfg(), coco_folder, tmp_path), save_run)
    run_tool("compare", "--run", f"ban={tmp_path / 'chain'}", "--output", tmp_path / "out", "--images", 1)
    rows = read_rows((tmp_path / "out/comparison.md").read_text())
    assert rows[""] == ["ban gen 1", "ban gen 2", "ban ensemble"]
    assert rows["segm AP"][2] == "-"  # Boxes are fused, masks are not.
    assert rows["bbox AP"][2] != "-"


def test_folders_of_images_name_the_classes(photos, tmp_path, save_run, run_tool):
    run_tool("compare", "--run", f"a={save_run(tmp_path / 'run', photos)}", "--output", tmp_path / "out")
    rows = read_rows((tmp_path / "out/comparison.md").read_text())
    assert list(rows)[1:5] == ["top1", "top1-ant", "top1-bee", "top1-cat"]  # Of three classes there is no top 5.
    assert (tmp_path / "out/comparison.png").is_file()


def test_picture_has_each_classifiers_prediction_next_to_the_label(monkeypatch):
    drawn = []
    monkeypatch.setattr(pictures, "draw_grid", lambda *arguments: drawn.extend(arguments))
    image = {"image": np.zeros((8, 8, 3), np.uint8), "label": 1}
    scores = {"right": [torch.tensor([0.2, 0.7, 0.1])], "wrong": [torch.tensor([0.2, 0.2, 0.6])]}
    pictures.draw_classifications([image], ["ant", "bee"], scores)
    titles, rows = drawn[:2]
    assert titles == ["image", "label", "right", "wrong"]
    assert rows[0][0] is image["image"]
    assert rows[0][1:] == [Words("bee"), Words("✓ bee\n70%", HIT.color), Words("✗ 2\n60%", FALSE.color)]


def test_detectors_and_classifiers_are_not_compared(coco_folder, tmp_path, save_run, run_tool):
    detector = save_run(tmp_path / "detector", with_data(tiny_cfg(), coco_folder, tmp_path))
    classifier = save_run(tmp_path / "classifier", classifier_cfg(options=DIGITS))
    with pytest.raises(SystemExit, match="'b' is an image classifier, 'a' is a detector") as error:
        run_tool("compare", "--run", f"a={detector}", "--run", f"b={classifier}", "--output", tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run", "nameless"], "NAME=FOLDER"),
        (["--run", "a=nowhere"], "neither an output folder nor CONFIG:WEIGHTS"),
        (["--run", "a={run}", "--dataset", "unheard_of"], "unknown data set 'unheard_of'"),
        (["--run", "a={run}", "--images", "0"], "--images"),
        (["--run", "a={run}", "--threshold", "nan"], "--threshold"),
        (["--run", "a={run}", "--threshold", "50"], "--threshold"),
    ],
)
def test_mistakes_end_in_one_line(arguments, message, coco_folder, tmp_path, save_run, run_tool):
    run = save_run(tmp_path / "run", with_data(tiny_cfg(), coco_folder, tmp_path))
    with pytest.raises(SystemExit, match=message):
        run_tool("compare", *(argument.format(run=run) for argument in arguments), "--output", tmp_path / "out")


def test_mean_and_deviation_over_seeds():
    summary = summarise("aba", [{"bbox AP": x} for x in (10.0, 50.0, 14.0)])
    assert summary["a"]["bbox AP"] == {"mean": 12.0, "std": pytest.approx(8**0.5)}  # (4 + 4) / (2 - 1)
    assert summary["b"]["bbox AP"] == {"mean": 50.0, "std": 0.0}
    runs = [{"name": name} for name in "aba"]
    table = make_table({"summary": summary, "runs": runs, "dataset": "d", "dataset_images": 1, "device": "x"})
    assert "12.00 ± 2.83" in table
    assert "| 50.00" in table


def test_only_several_runs_have_a_deviation():
    summary = summarise("aba", [{"CKA": x} for x in (0.25, 0.5, 0.75)])
    rows = read_rows(make_rows(summary, "CKA", [(name, "") for name in "aba"]))
    assert rows == {"CKA": ["CKA"], "a": ["0.500 ± 0.354"], "b": ["0.500"]}
    results = {"runs": [{"name": "b"}], "dataset": "d", "dataset_images": 1, "device": "x"}
    assert "±" not in make_table(results | {"summary": {"b": {"bbox AP": summary["b"]["CKA"]}}})


def test_table_tells_nan_from_what_a_model_lacks():
    summary = summarise("ab", [{"bbox AP": math.nan, "segm AP": 1.0}, {"bbox AP": 2.0}])
    runs = [{"name": name} for name in "ab"]
    table = make_table({"summary": summary, "runs": runs, "dataset": "d", "dataset_images": 1, "device": "x"})
    assert read_rows(table) == {"": ["a", "b"], "bbox AP": ["nan", "2.00"], "segm AP": ["1.00", "-"]}


@pytest.mark.parametrize(
    "name", ["a|b", "a\\|b", "a\\", "a\nb", "a\r\n|\u2028b\x85c", "\ud800", "\x1b[2J", "日本|é", "| |"]
)
def test_no_name_breaks_the_table(name):
    """As Markdown reads it: a bar ends a cell, unless a backslash stands before it."""
    summary = {name: {f"bbox AP-{name}": {"mean": 1.0, "std": 0.0}, "bbox AP": {"mean": 2.0, "std": 0.0}}}
    runs = [{"name": name}]
    table = make_table({"summary": summary, "runs": runs, "dataset": name, "dataset_images": 1, "device": "x"})
    assert table.encode()  # A lone surrogate cannot be written.
    lines = table.splitlines()
    assert len(lines) == 6
    seeds = [{"name": x, "seed": 1, "metrics": {"bbox AP": 1.0, f"bbox AP-{name}": 2.0}} for x in (name, "b")]
    summary["b"] = summary[name]
    other = {"name": f"{name}{name}", "seed": 0, "metrics": {}}
    results = {"summary": summary} | find_differences([*seeds, other], [("", name), ("", "b")])
    differences = make_difference_tables(results)
    assert differences.encode()
    assert len(differences.splitlines()) == 2 * 9 + 1
    for line in [*lines[:4], *(line for line in differences.splitlines() if line.startswith("|"))]:
        assert len(re.sub(r"\\.", "", line).split("|")) == 4, line
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029]", table + differences)


def test_a_terminal_may_lack_characters(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    run_tool(lambda: print("é ±"))
    terminal.flush()
    assert terminal.buffer.getvalue().splitlines() == [rb"\xe9 \xb1"]


@pytest.mark.parametrize(
    ("values", "digits"), [([37.7, 4.2], 2), ([0.57, 3.4], 2), ([0.078], 3), ([0.0112, 0.0008], 5), ([0.0], 2), ([], 2)]
)
def test_small_numbers_keep_two_digits(values, digits):
    assert decimals(values) == digits


def test_a_seed_may_lack_a_metric():
    summary = summarise("aa", [{"bbox AP": 1.0, "bbox AP-x": 1.0}, {"bbox AP": 0.0}])
    assert without_nan(summary["a"]["bbox AP-x"]) == {"mean": None, "std": None}


def test_chosen_images_are_spread_and_have_objects():
    records = [{"annotations": [1] * (i % 2), "i": i} for i in range(12)]
    assert [x["i"] for x in choose_images(records, 3)] == [1, 5, 9]
    assert choose_images(records, 99) == records[1::2]
    assert choose_images(records[:1], 2) == records[:1]


def test_json_has_no_nan():
    assert without_nan({"a": [float("nan"), 1.0]}) == {"a": [None, 1.0]}
