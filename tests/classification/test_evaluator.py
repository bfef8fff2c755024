"""Accuracies, by hand and over two processes."""

import pytest
import torch
from children import run_processes
from detectron2.data import DatasetCatalog, MetadataCatalog

from kd_det.classification.evaluator import ClassificationEvaluator
from kd_det.engine.evaluation import build_evaluator
from kd_det.errors import InputError

NAMES = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu"]
# The order of the classes by score, the label, and whether that is among the first 1 and the first 5.
PREDICTIONS = [
    ([0, 1, 2, 3, 4, 5, 6], 0, (1, 1)),
    ([1, 0, 2, 3, 4, 5, 6], 0, (0, 1)),
    ([6, 5, 4, 3, 2, 1, 0], 2, (0, 1)),
    ([6, 5, 4, 3, 2, 1, 0], 1, (0, 0)),
    ([6, 5, 4, 3, 2, 1, 0], 6, (1, 1)),
    ([6, 5, 4, 3, 2, 1, 0], 6, (1, 1)),
    ([3, 5, 4, 1, 2, 6, 0], 6, (0, 0)),
    ([3, 5, 4, 1, 2, 6, 0], 3, (1, 1)),
]


def batch(predictions):
    """Inputs and outputs; the first class has the score 7, the last 1."""
    scores = torch.zeros(len(predictions), len(predictions[0][0]))
    for row, (order, _, _) in zip(scores, predictions, strict=True):
        row[order] = torch.arange(len(order), 0, -1.0)
    return [{"label": label} for _, label, _ in predictions], [{"scores": row} for row in scores]


@pytest.fixture
def evaluator(cfg):
    DatasetCatalog.register("animals", lambda: [])
    MetadataCatalog.get("animals").set(thing_classes=NAMES, evaluator_type="classification")
    return build_evaluator(cfg, "animals")


def test_values_by_hand(evaluator):
    assert isinstance(evaluator, ClassificationEvaluator)
    evaluator.process(*batch(PREDICTIONS[:5]))
    evaluator.process(*batch(PREDICTIONS[5:]))
    expected = {
        "top1": 100 * 4 / 8,
        "top5": 100 * 6 / 8,
        "error": 50,
        "top1-ant": 50,
        "top1-bee": 0,
        "top1-cat": 0,
        "top1-dog": 100,
        "top1-gnu": 100 * 2 / 3,
    }
    assert evaluator.evaluate() == {"classification": pytest.approx(expected)}
    evaluator.reset()
    evaluator.process(*batch(PREDICTIONS[:1]))
    assert evaluator.evaluate()["classification"]["top1"] == 100


def test_hits_of_each_image(evaluator):
    for prediction in PREDICTIONS:
        evaluator.reset()
        evaluator.process(*batch([prediction]))
        found = evaluator.evaluate()["classification"]
        assert (found["top1"] / 100, found["top5"] / 100) == prediction[2]


def test_few_classes_have_no_top5(evaluator):
    evaluator.process(*batch([([1, 0, 2, 3, 4], 1, None), ([1, 0, 2, 3, 4], 4, None)]))
    found = evaluator.evaluate()["classification"]
    assert found == {"top1": 50, "error": 50, "top1-bee": 100, "top1-eel": 0}


def test_many_classes_are_not_listed(evaluator):
    evaluator.process([{"label": 100}], [{"scores": torch.arange(101.0)}])
    assert evaluator.evaluate() == {"classification": {"top1": 100, "top5": 100, "error": 0}}


def test_classes_without_names_are_numbered(cfg):
    DatasetCatalog.register("nameless", lambda: [])
    evaluator = ClassificationEvaluator("nameless")
    evaluator.process(*batch(PREDICTIONS[:1]))
    assert evaluator.evaluate()["classification"]["top1-0"] == 100


def test_no_predictions(evaluator, caplog):
    assert evaluator.evaluate() == {}
    assert "animals: no predictions were given to the evaluator" in caplog.text


def evaluate(rank, folder, parts):
    torch.distributed.init_process_group("gloo", f"file://{folder}/init", world_size=len(parts), rank=rank)
    evaluator = ClassificationEvaluator("digits_test")
    evaluator.process(*batch(parts[rank]))
    torch.save(evaluator.evaluate(), f"{folder}/{rank}.pth")
    torch.distributed.destroy_process_group()


def test_sum_over_processes(tmp_path):
    """Shares of different size: the result is that of all images, not the mean of the shares' results."""
    parts = [PREDICTIONS[:6], PREDICTIONS[6:]]
    run_processes(evaluate, str(tmp_path), parts)
    alone = ClassificationEvaluator("digits_test")
    alone.process(*batch(PREDICTIONS))
    found = [torch.load(tmp_path / f"{rank}.pth") for rank in range(2)]
    assert found == [alone.evaluate(), {}]
    assert found[0]["classification"]["top1"] == 50


def test_process_without_images(evaluator, monkeypatch):
    evaluator.process(*batch(PREDICTIONS))
    monkeypatch.setattr("detectron2.utils.comm.gather", lambda counts: [None, counts])
    assert evaluator.evaluate()["classification"]["top1"] == 50


def test_choice_of_the_evaluator(cfg):
    assert isinstance(build_evaluator(cfg, "cifar10_test"), ClassificationEvaluator)
    assert isinstance(build_evaluator(cfg, "imagenet_val"), ClassificationEvaluator)
    MetadataCatalog.get("other").set(evaluator_type="sem_seg")
    with pytest.raises(InputError, match=r"'sem_seg'; allowed are coco, pascal_voc, classification"):
        build_evaluator(cfg, "other")
    MetadataCatalog.remove("other")
