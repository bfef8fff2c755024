"""Tests kd-det concepts, which measures visual concepts of runs over their checkpoints."""

import math
from pathlib import Path

import pytest
import torch
from classification.models import classifier_cfg
from detectron2.structures import BoxMode
from helpers import build, tiny_cfg, with_data

from kd_det.analysis import compare_concepts as concepts
from kd_det.analysis.compare_concepts import METRICS, compare_concepts, find_foreground
from kd_det.analysis.run_history import find_checkpoints
from kd_det.errors import InputError

pytestmark = pytest.mark.usefixtures("in_process")

DIGITS = {"MODEL.CLASSIFIER.NUM_CLASSES": 10, "INPUT.CLASSIFICATION.SIZE": 8, "DATASETS.TEST": ("digits_test",)}
SEARCH = {"images": 3, "grid": 4, "steps": 4, "copies": 4}


@pytest.fixture
def classifier(tmp_path, save_run):
    """Writes a run with two checkpoints; the last one exists twice, under its number and as model_final.pth."""
    cfg = classifier_cfg(options=DIGITS)
    folder = save_run(tmp_path / "run", cfg)
    for name, iteration in (("model_0000002", 2), ("model_final", 2)):
        torch.save({"model": build(cfg, seed=5).state_dict(), "iteration": iteration}, f"{folder}/{name}.pth")
    (tmp_path / "run" / "last_checkpoint").write_text("model_final.pth")
    return folder


def test_metrics_of_a_classifier(classifier):
    found = compare_concepts([("a", classifier), ("a", classifier)], "res4", **SEARCH)["a"]
    assert list(found) == list(METRICS)
    assert all(x["std"] == 0 for x in found.values())
    assert 0 < found["N_fg"]["mean"] + found["N_bg"]["mean"] <= 16
    assert 0 <= found["lambda"]["mean"] <= 1
    assert 0 <= found["rho"]["mean"] <= 1
    # The weights moved to the second and last checkpoint, or not at all.
    models = [torch.load(f"{classifier}/model_000000{i}.pth")["model"] for i in (1, 2)]
    names = [name for name in models[0] if not name.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    first, last = (torch.cat([model[name].flatten().double() for name in names]) for model in models)
    share = found["D_mean"]["mean"] / ((last - first).norm() / first.norm()).item()
    assert round(3 * share, 4) in (0, 1, 2, 3)  # There are three images.


def scripted(monkeypatch, *found):
    """Makes the search return these entropies, one after the other."""
    answers = iter(found)
    monkeypatch.setattr(concepts, "measure_entropies", lambda *_, **__: next(answers))


def entropies(*cells):
    """Returns entropies that are -1 in the given cells, and 0 elsewhere."""
    found = torch.zeros(16, 16)
    for row, column in cells:
        found[row, column] = -1
    return found


def test_known_concepts(classifier, monkeypatch):
    """One of three images does not respond; one loses a concept on its object, one gains one there and one outside."""
    nothing = torch.full((16, 16), math.nan)
    first = entropies((5, 5), (5, 6), (0, 0)), entropies((8, 8)), nothing
    last = entropies((5, 5), (0, 0)), entropies((8, 8), (9, 9), (15, 15)), nothing
    scripted(monkeypatch, *first, *last)
    metrics = {name: x["mean"] for name, x in compare_concepts([("a", classifier)], "res4", images=3)["a"].items()}
    # The first image had the most concepts at the first checkpoint, the second image at the last one.
    distance = metrics.pop("D_mean") * 2
    assert metrics.pop("D_std") == pytest.approx((distance / 2) ** 2)
    assert metrics == pytest.approx({"N_fg": 1.5, "N_bg": 1.0, "lambda": (1 / 2 + 2 / 3) / 2, "rho": (1 / 2 + 1) / 2})


def test_a_feature_that_responds_to_no_image_is_refused(classifier, monkeypatch):
    scripted(monkeypatch, *[torch.full((16, 16), math.nan)] * 6)
    with pytest.raises(InputError, match=r"^--feature: res4 of 'a' does not change with any of the images\.$"):
        compare_concepts([("a", classifier)], "res4", images=3)


def test_checkpoints_of_an_earlier_run_are_left_out(classifier):
    """The folder still has a later checkpoint of a longer run."""
    for name, run, iteration in (("model_0000001", "new", 1), ("model_0000009", "old", 9), ("model_final", "new", 2)):
        torch.save({"model": {}, "iteration": iteration, "trainer": {"run": run}}, f"{classifier}/{name}.pth")
    names = [Path(path).stem for path in find_checkpoints(classifier)]
    assert names == ["model_0000001", "model_final"]


def test_no_image_counts_twice(coco_folder, tmp_path, save_run, monkeypatch):
    """Twenty images are requested, but there are only four."""
    folder = save_run(tmp_path / "run", with_data(tiny_cfg(), coco_folder, tmp_path))
    scripted(monkeypatch, *[entropies((0, 0))] * 4)
    compare_concepts([("a", folder)], "p3", images=20)


def test_a_single_checkpoint_shows_no_learning(classifier, run_tool, capsys):
    source = f"{classifier}/config.yaml:{classifier}/model_final.pth"
    options = [part for key, value in SEARCH.items() for part in (f"--{key}", str(value))]
    run_tool("concepts", "--feature", "pooled", *options, "--run", f"one={source}", "--run", f"all={classifier}")
    rows = [
        [cell.strip() for cell in row.strip("|").split("|")] for row in capsys.readouterr().out.strip().splitlines()
    ]
    assert rows[0] == ["concepts", *METRICS]
    one, every = rows[2:]
    assert one[4:] == ["-", "-", "-"]
    assert "-" not in every
    assert one[1:4] == every[1:4]


@pytest.mark.parametrize("feature", ["p3", "res4", "roi_box_features"])
def test_metrics_of_a_detector(feature, coco_folder, tmp_path, save_run):
    folder = save_run(tmp_path / "run", with_data(tiny_cfg(), coco_folder, tmp_path))
    found = compare_concepts([("a", folder)], feature, images=2, grid=4, steps=2, copies=2)["a"]
    assert 0 <= found["N_fg"]["mean"] + found["N_bg"]["mean"] <= 16
    assert math.isnan(found["rho"]["mean"])


def test_foreground_is_the_cells_whose_centres_lie_in_boxes():
    """An image of 80 x 40 pixels is resized to half its size; cells have 10 x 5 pixels."""
    sample = {"image": torch.zeros(3, 20, 40), "height": 40, "width": 80}
    # The first box reaches to x 15.5 and y 14.5, the second one from x 35 and y 15 to y 19.5.
    boxes = [[0, 0, 31, 29], [70, 30, 10, 9]]
    record = {"annotations": [{"bbox": box, "bbox_mode": BoxMode.XYWH_ABS} for box in boxes]}
    found = find_foreground(record, sample, 4).int().tolist()
    assert found == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 1]]


def test_foreground_is_masks_where_there_are_any():
    """Of two objects, one has a triangle as its mask and the other one has none; the mask of a crowd does not count."""
    sample = {"image": torch.zeros(3, 20, 40), "height": 40, "width": 80}
    triangle, everywhere = [[0, 0, 80, 0, 0, 40]], [[0, 0, 80, 0, 80, 40, 0, 40]]
    masks = {"segmentation": triangle}, {}, {"segmentation": everywhere, "iscrowd": 1}
    boxes = [0, 0, 80, 40], [70, 30, 10, 9], [0, 0, 80, 40]
    annotations = [{"bbox": box, "bbox_mode": BoxMode.XYWH_ABS} | mask for box, mask in zip(boxes, masks, strict=True)]
    found = find_foreground({"annotations": annotations}, sample, 4).int().tolist()
    assert [row[:3] for row in found[:3]] == [[1, 1, 1], [1, 1, 0], [1, 0, 0]]
    assert found[3] == [0, 0, 0, 1]
    assert find_foreground({"annotations": annotations}, sample, 4, masks=False).all()


def test_foreground_of_a_classifiers_image_is_its_middle():
    found = find_foreground({"label": 3}, {"image": torch.zeros(3, 32, 32)}, 16)
    assert found[2:14, 2:14].all()
    assert found.sum() == 12 * 12


def test_mistakes_end_in_one_line(classifier, run_tool):
    with pytest.raises(InputError, match=r"'logits' is no feature of 'a', which has res2, .*, pooled"):
        compare_concepts([("a", classifier)], "logits", **SEARCH)
    (Path(classifier).parent / "gen_1").mkdir()
    with pytest.raises(InputError, match=r"^a=.*: is a chain of generations; name one of them, such as .*/gen_1\.$"):
        compare_concepts([("a", str(Path(classifier).parent))], "res4", **SEARCH)
    for option, value in (("--copies", "0"), ("--bound", "0.0"), ("--bound", "nan")):
        with pytest.raises(SystemExit, match=f"error: {option}: must be above 0, got {value}"):
            run_tool("concepts", "--feature", "res4", "--run", f"a={classifier}", option, value)
    with pytest.raises(SystemExit, match="error: --foreground: 'discs' is not one of masks, boxes"):
        run_tool("concepts", "--feature", "res4", "--run", f"a={classifier}", "--foreground", "discs")
