"""Tests kd-det similarity, which measures the CKA of a student's halves and its teacher."""

import numpy as np
import pytest
import torch
from classification.models import classifier_cfg
from detectron2.data import DatasetCatalog
from detectron2.structures import BoxMode
from helpers import tiny_cfg, with_data

from kd_det.analysis.cka import linear_cka
from kd_det.analysis.compare_halves import compare_halves
from kd_det.analysis.probing import labelled_boxes
from kd_det.classification.image_mapper import ClassificationMapper
from kd_det.errors import InputError
from kd_det.export import load_student

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
