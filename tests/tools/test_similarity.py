"""Tests kd-det similarity, which measures the CKA of a student's halves and its teacher."""

import numpy as np
import pytest
import torch
from classification.models import classifier_cfg
from detectron2.data import DatasetCatalog
from detectron2.layers import ShapeSpec
from detectron2.structures import BoxMode
from helpers import tiny_cfg, with_data

from kd_det.analysis.cka import linear_cka
from kd_det.analysis.compare_halves import compare_halves
from kd_det.analysis.probing import labelled_boxes
from kd_det.classification.image_mapper import ClassificationMapper
from kd_det.errors import InputError
from kd_det.export import load_student
from kd_det.heads import InheritExploreHead

pytestmark = pytest.mark.usefixtures("in_process")

DIGITS = {"MODEL.CLASSIFIER.NUM_CLASSES": 10, "INPUT.CLASSIFICATION.SIZE": 8, "DATASETS.TEST": ("digits_test",)}


@pytest.fixture
def classifiers(tmp_path, save_run):
    cfg = classifier_cfg(options=DIGITS)
    return cfg, [save_run(tmp_path / str(seed), cfg, seed=seed) for seed in (0, 1)]


def read_features(cfg, folder: str) -> torch.Tensor:
    """Computes res4 of all test images with the model itself, averaged over cells."""
    model = load_student(cfg, f"{folder}/model_0000001.pth", "cpu")
    mapper = ClassificationMapper(cfg, is_train=False)
    images = [mapper(record) for record in DatasetCatalog.get("digits_test")]
    with torch.no_grad():
        return model.backbone(model.preprocess_image(images))["res4"].mean(dim=(2, 3)).double()


def test_halves_follow_the_order_that_the_run_drew(classifiers):
    cfg, (teacher, student) = classifiers
    target, features = read_features(cfg, teacher), read_features(cfg, student)
    order = torch.from_numpy(np.random.default_rng(0).permutation(features.shape[1]))
    path = f"{student}/model_0000001.pth"
    torch.save(torch.load(path) | {"kd_heads": {"InheritExploreHead.order_res4": order}}, path)

    found = compare_halves(teacher, [("a", student)], "res4")["a"]
    half = len(order) // 2
    inherit, explore = features[:, order[:half]], features[:, order[half:]]
    for pair, sides in {
        "inherit, teacher": (inherit, target),
        "explore, teacher": (explore, target),
        "inherit, explore": (inherit, explore),
    }.items():
        assert found[pair]["mean"] == pytest.approx(linear_cka(*sides).item(), abs=1e-6), pair
    assert found["inherit, teacher"]["mean"] != pytest.approx(found["explore, teacher"]["mean"], abs=1e-4)


@pytest.fixture
def ie_run(tmp_path, save_run):
    """An output folder of IE-KD with random weights, whose inheriting half is the first, and its head."""
    cfg = classifier_cfg(options=DIGITS | {"KD.INHERIT_EXPLORE.IN_FEATURES": ["res4"]})
    folder = save_run(tmp_path / "ie", cfg, seed=3)
    spec = {"res4": ShapeSpec(channels=64, stride=4)}
    torch.manual_seed(0)
    head = InheritExploreHead(cfg, spec, spec).eval()
    state = {f"InheritExploreHead.{key}": x for key, x in head.state_dict().items()}
    path = f"{folder}/model_0000001.pth"
    torch.save(torch.load(path) | {"kd_heads": state}, path)
    return folder, head


def test_halves_in_each_others_encoders(classifiers, ie_run):
    """Compared with factors computed from the models themselves."""
    cfg, (teacher, _) = classifiers
    student, head = ie_run
    maps = {}
    for name, folder in (("teacher", teacher), ("student", student)):
        model = load_student(cfg, f"{folder}/model_0000001.pth", "cpu")
        mapper = ClassificationMapper(cfg, is_train=False)
        images = [mapper(record) for record in DatasetCatalog.get("digits_test")]
        with torch.no_grad():
            maps[name] = model.backbone(model.preprocess_image(images))["res4"]
    halves = dict(zip(("inherit", "explore"), maps["student"].chunk(2, dim=1), strict=True))
    found = compare_halves(teacher, [("a", student)], "res4", swap=True)["a"]
    with torch.no_grad():
        target = head.auto_encoders["res4"].encoder(maps["teacher"]).mean(dim=(2, 3)).double()
        for half in halves:
            for encoder in halves:
                factor = head.encoders[encoder]["res4"](halves[half]).mean(dim=(2, 3)).double()
                expected = linear_cka(factor, target).item()
                assert found[f"{half} by {encoder}"]["mean"] == pytest.approx(expected, abs=1e-5)
    assert len({round(x["mean"], 6) for x in found.values()}) == 4


def test_runs_without_encoders_cannot_be_swapped(classifiers):
    _, (teacher, student) = classifiers
    with pytest.raises(InputError, match=r"^--swap: 'a' is not the output folder of a run of IE-KD that has enc"):
        compare_halves(teacher, [("a", student)], "res4", swap=True)


def test_each_name_has_a_row(classifiers, run_tool, capsys):
    _, (teacher, student) = classifiers
    runs = "--run", f"one={teacher}", "--run", f"two={student}", "--run", f"two={teacher}"
    run_tool("similarity", "--teacher", teacher, "--feature", "res4", *runs)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("| one", "| two"))]
    assert len(rows) == 2
    assert ["±" in row for row in rows] == [False, True]  # A single run has no deviation.


def test_features_of_boxes_can_be_compared(coco_folder, tmp_path, save_run):
    cfg = with_data(tiny_cfg(), coco_folder, tmp_path)
    folders = [save_run(tmp_path / str(seed), cfg, seed=seed) for seed in (0, 1)]
    found = compare_halves(folders[0], [("a", folders[1]), ("a", folders[0])], "roi_features")
    assert all(-1 < x["mean"] <= 1 and x["std"] > 0 for x in found["a"].values())


def test_boxes_are_scaled_like_their_images():
    box = {"bbox": [10, 20, 30, 40], "bbox_mode": BoxMode.XYWH_ABS}
    batch = [{"image": torch.zeros(3, 50, 80), "height": 100, "width": 200} for _ in range(2)]
    boxes = labelled_boxes([{"annotations": [box | {"iscrowd": 1}]}, {"annotations": [box]}], batch)
    assert boxes.tolist() == [pytest.approx([1, 4, 10, 16, 30])]  # The scale is 80 / 200 for x, 50 / 100 for y.


def test_a_feature_that_is_not_a_map_is_refused(classifiers):
    _, (teacher, student) = classifiers
    with pytest.raises(InputError, match="'logits' is no feature of 'teacher', which has res2, res3, res4"):
        compare_halves(teacher, [("a", student)], "logits")
