"""Tests kd-det compare --html: the numbers, the gallery and the attention maps of real models on a tiny data set."""

import json
import re

import cv2
import numpy as np
import pytest
import torch
from classification.models import classifier_cfg
from detectron2.structures import Boxes, BoxMode, Instances
from helpers import tiny_cfg, with_data
from reporting.chromium import Shown, browse, needs_browser
from reporting.pages import HOSTILE
from reporting.test_page import Elements

from kd_det.analysis import examples
from kd_det.analysis.differences import find_differences
from kd_det.analysis.examples import detection_gallery, differing_classes, draw_attention, outline
from kd_det.analysis.html_report import brief_difference, difference_cells, interval, is_detail, verdict
from kd_det.engine.matching import OperatingPoint
from kd_det.engine.picture_grid import Mark
from kd_det.engine.pictures import FALSE, HIT, KINDS, MISSED, Choice
from kd_det.reporting.gallery import embed

pytestmark = pytest.mark.usefixtures("in_process")
DIGITS = {"MODEL.CLASSIFIER.NUM_CLASSES": 10, "INPUT.CLASSIFICATION.SIZE": 8, "DATASETS.TEST": ("digits_test",)}


@pytest.fixture
def hostile_folder(coco_folder, tmp_path):
    """The data set of four images, with hostile names of its classes and of its images' files."""
    data = json.loads((coco_folder / "instances.json").read_text())
    (tmp_path / "data/images").mkdir(parents=True)
    for category, name in zip(data["categories"], HOSTILE, strict=False):
        category["name"] = name
    for image, name in zip(data["images"], ("<script>x</script>", '"q" onload=x', "]]>&lt;'", "日本 é"), strict=True):
        new = name.replace("/", "_") + ".png"
        (tmp_path / "data/images" / new).symlink_to(coco_folder / "images" / image["file_name"])
        image["file_name"] = new
    (tmp_path / "data/instances.json").write_text(json.dumps(data))
    return tmp_path / "data"


@pytest.mark.slow
def test_detectors(hostile_folder, tmp_path, save_run, run_tool):
    """Everything is there, hostile names are text, and the page holds one copy of each image."""
    name = "<b onload>'\""
    masks = save_run(tmp_path / "masks", with_data(tiny_cfg(), hostile_folder, tmp_path, "hostile"))
    boxes = save_run(tmp_path / "boxes", with_data(tiny_cfg("retinanet"), hostile_folder, tmp_path, "hostile"))
    (tmp_path / "masks/metrics.json").write_text('{"iteration": 1, "total_loss": 2.0, "loss_</script>": 1}\n')
    out = tmp_path / "out"
    run_tool("compare", "--run", f"{name}={masks}", "--run", f"boxes={boxes}", "--output", out, "--html")
    text = (out / "report.html").read_text()
    elements = Elements(text)
    assert [x["id"] for x in elements.named("section")] == [
        *("results", "classes", "costs", "curves", "gallery", "attention", "details")
    ]
    assert elements.named("script") == [{}]
    assert len(elements.named("article")) == 4
    assert len(elements.named("image")) == 4
    assert len(elements.named("use")) == 8
    assert len(elements.named("img")) == 3 * 3 * 2  # Attention: images, levels, models.
    assert "weights (MiB)" in text
    assert "small objects" in text
    assert "kd-det compare --run" in text
    for style in KINDS:  # The colours of comparison.png.
        assert f".{style.name} {{ --mark: {style.color}; }}" in text
    metrics = json.loads((out / "comparison.json").read_text())["runs"][0]["metrics"]
    assert {"bbox APs", "bbox APm", "bbox APl", "segm APs"} <= metrics.keys()


def test_images_limits_the_gallery_of_classifiers(tmp_path, save_run, run_tool):
    runs = [save_run(tmp_path / f"{seed}", classifier_cfg(options=DIGITS), seed=seed) for seed in (0, 1)]
    arguments = [x for name, run in zip("ab", runs, strict=True) for x in ("--run", f"{name}={run}")]
    run_tool("compare", *arguments, "--output", tmp_path / "out", "--html", "--images", 3)
    text = (tmp_path / "out/report.html").read_text()
    elements = Elements(text)
    assert len(elements.named("article")) == 3
    assert len(re.findall(r"[✓✗] \d", text)) == 6
    assert len([x for x in elements.named("img") if "label: " in x["alt"]]) == 3


@needs_browser
@pytest.mark.slow
def test_the_report_of_the_quickstart_in_a_browser(tmp_path, monkeypatch, run_tool):
    """With the quickstart's configs on few scenes and few iterations."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    run_tool("prepare-shapes", "--output", tmp_path / "shapes", "--train", 8, "--test", 6, "--size", 64)
    students = [f"{name}=quickstart/{file}.yaml" for name, file in (("plain", "student"), ("distilled", "distilled"))]
    run_tool(
        *("repeat", "--teacher", "quickstart/teacher.yaml", "--seeds", 1, "--output", tmp_path / "out"),
        *(x for student in students for x in ("--student", student)),
        *("SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 2, "TEST.EVAL_PERIOD", 1, "DATALOADER.NUM_WORKERS", 0),
    )
    page = tmp_path / "out/comparison/report.html"
    shown = Shown(browse(tmp_path, page, "--dump-dom", fragment="class=disc"))
    assert shown.filters_work
    assert shown.count.endswith("of 6 images")
    browse(tmp_path, page, f"--screenshot={tmp_path / 'picture.png'}", "--window-size=1280,4000")
    assert cv2.imread(str(tmp_path / "picture.png")).std() > 5


# ---- Parts ----
def mark(style, category: int, box=(0, 0, 1, 1)) -> Mark:
    return Mark(box, style, category=category)


@pytest.mark.parametrize(
    ("models", "expected"),
    [
        ([[mark(HIT, 0)], [mark(HIT, 0, (5, 5, 9, 9))]], set()),
        ([[mark(HIT, 0)], [mark(MISSED, 0)]], {0}),
        ([[mark(MISSED, 1, (0, 0, 2, 2))], [mark(MISSED, 1, (3, 3, 4, 4))]], {1}),
        ([[mark(FALSE, 0), mark(HIT, 1)], [mark(HIT, 1), mark(FALSE, 2), mark(FALSE, 0)]], {2}),
        ([[mark(MISSED, 0)]], set()),
        ([], set()),
    ],
)
def test_models_differ_by_what_they_miss_and_by_false_detections(models, expected):
    assert differing_classes(models) == expected


def test_the_gallery_has_the_boxes_of_the_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(examples, "class_names", lambda _: ["ant", "bee"])
    path = str(tmp_path / "a.png")
    cv2.imwrite(path, np.full((64, 96, 3), 128, np.uint8))
    boxes = [(10, 10, 40, 50), (60, 20, 90, 55)]
    annotations = [
        {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": i, "segmentation": [[10, 10, 40, 10, 40, 50]]}
        for i, box in enumerate(boxes)
    ]
    found = Instances((64, 96), pred_boxes=Boxes(torch.tensor(boxes[:1]).float()), scores=torch.tensor([0.9]))
    found.pred_classes, found.pred_masks = torch.tensor([0]), torch.ones(1, 64, 96, dtype=torch.bool)
    image = {"file_name": path, "annotations": annotations}
    choices = {"m": Choice(OperatingPoint(0.5, 0.5), "")}
    gallery = detection_gallery([image], "insects", {"m": [found]}, choices)
    (example,) = gallery.examples
    truth, model = example.views
    assert [(x.kind, x.category, x.box) for x in model.marks] == [
        ("hit", 0, (10.0, 10.0, 40.0, 50.0)),
        ("missed", 1, (60.0, 20.0, 90.0, 55.0)),
    ]
    assert model.marks[0].mask.startswith("M")
    assert truth.marks[0].mask == "M10.0 10.0L40.0 10.0L40.0 50.0Z"
    assert model.description == "m, a.png: 1 hit, 0 false, 1 missed"


def test_an_outline_has_few_points():
    y, x = np.mgrid[:200, :200]
    disc = (x - 100) ** 2 + (y - 100) ** 2 < 80**2
    path = outline(disc, embed(np.zeros((200, 200, 3), np.uint8)))
    assert path.count("M") == 1
    assert 10 < path.count("L") < 80


def test_models_without_common_levels_have_no_attention_maps():
    assert draw_attention([], [{}]) == []


def test_verdicts_are_words_and_signs():
    difference = {"mean": 1.5, "low": 0.5, "high": 2.5, "seeds": 3, "verdict": "helps"}
    assert [(cell.text, cell.kind) for cell in difference_cells(difference)] == [
        *(("+1.50", ""), ("[+0.50, +2.50]", ""), ("3", ""), ("helps", "helps"))
    ]
    alone = difference | {"low": float("nan"), "high": float("nan"), "seeds": 1, "verdict": ""}
    assert [cell.text for cell in difference_cells(alone)] == ["+1.50", "-", "1", "too few seeds"]
    assert interval(alone) == ""
    assert brief_difference(difference) == "+1.50 [+0.50, +2.50] helps"
    assert brief_difference(None) == "-"


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        *(("bbox AP", False), ("bbox AP-hot dog", True), ("segm APs", True), ("top1", False), ("top1-hot dog", True)),
        *(("F1", False), ("ms per image", False), ("score threshold", False), ("voc AP50", False)),
    ],
)
def test_metrics_of_one_class_or_size(metric, expected):
    assert is_detail(metric) is expected


def test_the_verdict_of_three_seeds_and_what_cannot_be_paired():
    values = {"plain": 20.0, "PKD": 30.0}
    runs = [
        {"name": name, "seed": seed, "metrics": {"bbox AP": value + seed, "bbox AP-x": 1.0, "ms per image": 1.0}}
        for name, value in values.items()
        for seed in (1, 2, 3)
    ]
    runs.append({"name": "other", "seed": 9, "metrics": {"bbox AP": 1.0}})
    section = verdict({"runs": runs} | find_differences(runs, [("", "plain")]))
    first, others = section.tables
    ((name, cells),) = first.rows
    assert name == "PKD"
    assert [cell.text for cell in cells] == ["+10.00", "[+10.00, +10.00]", "3", "helps"]
    assert first.note == "Not compared: other, no seed in common with plain."
    assert [metric for metric, _ in others.rows] == ["ms per image"]
    assert verdict({"runs": runs}) is None
