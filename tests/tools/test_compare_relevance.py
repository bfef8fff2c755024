"""Tests kd-det relevance, its figures, and what the report shows of them and of the noise."""

import json
import math
import re

import cv2
import numpy as np
import pytest
import torch
from classification.models import classifier_cfg
from helpers import build, tiny_cfg, with_data
from reporting.test_page import Elements

from kd_det.analysis.compare_relevance import IN_BOX, IN_MASK, Sample, choose_samples, find_regions, find_views
from kd_det.analysis.learned import read_learned
from kd_det.analysis.relevance_figures import NEGATIVE, POSITIVE, color_relevance, rank_correlation, relevance_inside
from kd_det.analysis.run import Run
from kd_det.errors import InputError
from kd_det.reporting.page import Page, render

pytestmark = pytest.mark.usefixtures("in_process")

DIGITS = {
    "MODEL.CLASSIFIER.NUM_CLASSES": 10,
    "INPUT.CLASSIFICATION.SIZE": 8,
    "DATASETS.TEST": ("digits_test",),
    "SOLVER.IMS_PER_BATCH": 32,
}
HALVES = ("", ", inherit", ", explore")


def test_classifiers(tmp_path, save_run, run_tool):
    """One of two students has the teacher's weights; the report shows the maps, and the noise as well."""
    teacher, same, other = (
        save_run(tmp_path / name, classifier_cfg(options=DIGITS), seed=seed)
        for name, seed in (("teacher", 0), ("same", 0), ("other", 1))
    )
    output = tmp_path / "out"
    runs = ["--run", f"same={same}", "--run", f"other|<b>={other}"]
    options = ["--feature", "res3", "--images", 5, "--output", output]
    run_tool("relevance", "--teacher", teacher, *runs, *options)
    results = json.loads((output / "relevance.json").read_text())
    found = {run["name"]: run["metrics"] for run in results["runs"]}
    assert list(found) == ["teacher", *(f"{name}{half}" for name in ("same", "other|<b>") for half in HALVES)]
    assert {name for metrics in found.values() for name in metrics} == {"rank correlation"}
    assert found["teacher"]["rank correlation"] is None
    assert found["same"]["rank correlation"] == pytest.approx(1)
    assert abs(found["other|<b>"]["rank correlation"]) < 0.9
    assert "| other\\|<b>, explore" in (output / "relevance.md").read_text()
    height, width = cv2.imread(str(output / "relevance.png")).shape[:2]
    assert width > height

    learned = read_learned(output)
    assert [table.caption for table in learned.tables] == ["Relevance"]
    run_tool("noise", *runs, "--feature", "res3", "--strengths", 0, 1, "--draws", 1, "--images", 9, "--output", output)
    learned = read_learned(output)
    captions = [table.caption for table in learned.tables]
    assert captions == [
        "Relevance",
        *(f"{x} by strength of the noise in res3" for x in ("Task loss", "Top-1 accuracy (%)")),
    ]
    (name, cells), *_ = learned.tables[1].rows
    loss = json.loads((output / "noise.json").read_text())["summary"]["same"][1]["metrics"]["loss"]["mean"]
    assert (name, cells[1].text) == ("same", f"{loss:.3f}")
    elements = Elements(render(Page("title", (), sections=[learned])))
    assert [x["src"][:23] for x in elements.named("img")] == ["data:image/webp;base64,"] * 2
    assert [x["id"] for x in elements.named("section")] == ["learned"]
    assert not elements.named("b")


def test_detectors(coco_folder, tmp_path, save_run, run_tool):
    boxes, masks = (
        save_run(tmp_path / family, with_data(tiny_cfg(family), coco_folder, tmp_path))
        for family in ("retinanet", "mask_rcnn")
    )
    output = tmp_path / "out"
    run_tool(
        *("relevance", "--teacher", masks, "--run", f"IE={boxes}", "--feature", "res3", "--images", 2),
        *("--composite", "zero", "--output", output),
    )
    results = json.loads((output / "relevance.json").read_text())
    assert [run["name"] for run in results["runs"]] == ["teacher", "IE", "IE, inherit", "IE, explore"]
    for run in results["runs"]:
        assert (
            0 < run["metrics"][IN_BOX] == run["metrics"][IN_MASK] <= 1
        )  # The masks of these objects fill their boxes.
    assert results["area"][IN_BOX] == pytest.approx(36 * 40 / (96 * 64))
    text = (output / "relevance.md").read_text()
    assert "through the halves of res3" in text
    assert "share of the area: box 0.234, mask 0.234" in text


def test_halves_follow_the_drawn_order(tmp_path, save_run):
    cfg = classifier_cfg(options=DIGITS)
    source = save_run(tmp_path / "run", cfg)
    checkpoint = torch.load(tmp_path / "run/model_0000001.pth", weights_only=True)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    checkpoint["kd_heads"] = {"InheritExploreHead.order_res3": order}
    torch.save(checkpoint, tmp_path / "run/model_0000001.pth")
    views = find_views(Run("IE", source, cfg, build(cfg)), "res3")
    assert [view.name for view in views] == ["IE", "IE, inherit", "IE, explore"]
    assert views[1].channels.tolist() == order[:16].tolist()
    assert views[2].channels.tolist() == order[16:].tolist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", 0], "error: --images: must be at least 1, got 0."),
        (["--composite", "deep"], "error: --composite: 'deep' is not one of layered, zero, epsilon, gamma, z_plus."),
        (["--feature", "p9"], "error: --feature: 'p9' is not a map of the backbone of 'a', which has res2, res3, res4"),
        (
            ["--run", "teacher=x"],
            "error: --run: 'teacher' is the name of the network of --teacher",
        ),
    ],
)
def test_mistakes(arguments, message, tmp_path, save_run, run_tool):
    run = save_run(tmp_path / "run", classifier_cfg(options=DIGITS))
    with pytest.raises(SystemExit) as error:
        run_tool("relevance", "--teacher", run, "--run", f"a={run}", "--output", tmp_path / "out", *arguments)
    assert str(error.value).startswith(message)
    assert not (tmp_path / "out").exists()


# ---- Parts ----
def test_the_largest_object_that_is_no_crowd_is_explained():
    sizes = [(0, 0, 2, 2, 0), (0, 0, 5, 5, 0), (0, 0, 9, 9, 1)]
    objects = [
        {"bbox": box, "bbox_mode": 0, "category_id": i, "iscrowd": crowd} for i, (*box, crowd) in enumerate(sizes)
    ]
    (sample,) = choose_samples([{"annotations": objects}, {"annotations": objects[2:]}, {"annotations": []}], 9)
    assert (sample.label, sample.annotation) == (1, objects[1])


def test_regions_are_pixels_of_the_file():
    triangle = [[0, 0, 4, 0, 4, 4]]
    annotation = {"bbox": (1, 0, 3, 2), "bbox_mode": 0, "segmentation": triangle}
    regions = find_regions(Sample({"height": 3, "width": 4}, 0, annotation))
    assert regions[IN_BOX].tolist() == [[False, True, True, False], [False, True, True, False], [False] * 4]
    assert 0 < regions[IN_MASK].sum() < 12
    assert regions[IN_MASK][0, 3]
    assert not regions[IN_MASK][2, 0]


def test_share_of_the_positive_relevance():
    relevance = torch.tensor([[4.0, -9.0], [1.0, 3.0]])
    assert relevance_inside(relevance, torch.tensor([[True, True], [False, False]])) == 0.5
    assert math.isnan(relevance_inside(-relevance.abs(), torch.ones(2, 2, dtype=torch.bool)))


def test_ranks_of_cells_are_compared():
    ascending = torch.arange(16.0).view(4, 4)
    assert rank_correlation(ascending, ascending.exp()) == pytest.approx(1)
    assert rank_correlation(ascending, -ascending) == pytest.approx(-1)
    # A map of twice the size has the same cells, and one of opposite rows the opposite order of the rows.
    assert rank_correlation(ascending, ascending.repeat_interleave(2, 0).repeat_interleave(2, 1)) == pytest.approx(1)
    assert rank_correlation(ascending, ascending.flip(0)) < -0.8
    # Within a cell, the order does not matter.
    assert rank_correlation(ascending, ascending.flip(0), grid=1) != rank_correlation(ascending, ascending, grid=2)
    assert math.isnan(rank_correlation(ascending, torch.ones(4, 4)))


def test_colours_show_the_sign():
    relevance = torch.zeros(40, 60)
    relevance[5:15, 5:25], relevance[25:35, 35:55] = 1, -1
    shown = color_relevance(np.zeros((40, 60, 3), np.uint8), relevance)
    assert (shown.dtype, shown.shape) == (np.uint8, (40, 60, 3))
    np.testing.assert_allclose(shown[10, 15], POSITIVE, atol=3)
    np.testing.assert_allclose(shown[30, 45], NEGATIVE, atol=3)
    assert np.ptp(shown[20, 30]) == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"relevance.json: is not what kd-det relevance writes"),
        ("[1]", r"relevance.json: is not what kd-det relevance writes"),
        ('{"runs": [], "summary": {"a": {}}, "table": ""}', r"relevance.png: is missing or damaged"),
    ],
)
def test_damaged_results_are_named(content, message, tmp_path):
    assert read_learned(tmp_path) is None
    (tmp_path / "relevance.json").write_text(content)
    with pytest.raises(InputError, match=re.escape(message)):
        read_learned(tmp_path)
