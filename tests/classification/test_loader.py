"""Batches of image classifiers: every image once in tests, endless in training, and labels that cannot be."""

import itertools
import re

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.evaluation import inference_on_dataset

from kd_det.classification.evaluator import ClassificationEvaluator
from kd_det.classification.image_classifier import stack
from kd_det.classification.image_loader import build_classification_test_loader, build_classification_train_loader
from kd_det.data import count_training_images, register_datasets
from kd_det.errors import InputError


@pytest.fixture
def register(cfg):
    """Register 4 x 4 images under a name, each of one grey, its number."""
    cfg.MODEL.CLASSIFIER.NUM_CLASSES = 6
    cfg.INPUT.CLASSIFICATION.SIZE = 4
    cfg.INPUT.CLASSIFICATION.PADDING = 0
    cfg.SOLVER.IMS_PER_BATCH = 4
    cfg.DATALOADER.NUM_WORKERS = 0

    def register(name, labels, start=0):
        records = [
            {"image": np.full((4, 4, 3), start + i, np.uint8), "label": label, "file_name": f"{name}[{i}]"}
            for i, label in enumerate(labels)
        ]
        DatasetCatalog.register(name, lambda: records)

    return register


def numbers(batch):
    return [int(x["image"][0, 0, 0]) for x in batch]


@pytest.mark.parametrize("workers", [0, 2])
def test_test_images_come_once_and_in_order(cfg, register, workers):
    register("a", [0, 1, 2, 3, 4, 5, 0, 1, 2, 3])
    cfg.DATALOADER.NUM_WORKERS = workers
    loader = build_classification_test_loader(cfg, "a")
    batches = list(loader)
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert len(loader) == 3
    records = [record for batch in batches for record in batch]
    assert [number for batch in batches for number in numbers(batch)] == list(range(10))
    assert [record["label"] for record in records] == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3]
    assert [record["file_name"] for record in records] == [f"a[{i}]" for i in range(10)]
    assert {record["image"].shape for record in records} == {(3, 4, 4)}


@pytest.mark.parametrize("workers", [0, 2])
def test_training_images_come_once_per_epoch(cfg, register, workers):
    """Two data sets of 6 images, 4 per batch: 3 batches are an epoch."""
    register("a", [0] * 6)
    register("b", [1] * 6, start=6)
    cfg.DATASETS.TRAIN = ("a", "b")
    cfg.DATALOADER.NUM_WORKERS = workers
    batches = list(itertools.islice(build_classification_train_loader(cfg), 6))
    epochs = [[number for batch in batches[i : i + 3] for number in numbers(batch)] for i in (0, 3)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(12))] * 2
    assert epochs[0] != epochs[1]
    assert all(record["label"] == (number >= 6) for x in batches for record, number in zip(x, numbers(x), strict=True))


def test_a_share_of_the_images(cfg, register):
    """The same images in each epoch and with each SEED; others with another seed of the draw."""
    register("a", [0] * 12)
    cfg.DATASETS.TRAIN = ("a",)
    cfg.DATASETS.TRAIN_SHARE = 0.34
    assert count_training_images(cfg) == 4
    chosen = []
    for draw in (0, 0, 1):
        cfg.DATASETS.TRAIN_SHARE_SEED, cfg.SEED = draw, len(chosen)
        batches = itertools.islice(build_classification_train_loader(cfg), 3)
        epochs = [sorted(numbers(batch)) for batch in batches]
        assert epochs[0] == epochs[1] == epochs[2]
        chosen.append(epochs[0])
    assert all(len(set(images)) == 4 for images in chosen)
    assert chosen[0] == chosen[1] != chosen[2]
    cfg.DATASETS.TRAIN_SHARE = 0.01
    assert count_training_images(cfg) == 1
    assert sum(map(len, build_classification_test_loader(cfg, "a"))) == 12


@pytest.mark.parametrize(
    ("device", "gpu", "pinned"), [("cuda", True, True), ("cuda", False, False), ("cpu", True, False)]
)
def test_batches_for_a_gpu_are_pinned(cfg, register, monkeypatch, device, gpu, pinned):
    register("a", [0])
    cfg.DATASETS.TRAIN, cfg.MODEL.DEVICE = ("a",), device
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    loaders = build_classification_train_loader(cfg), build_classification_test_loader(cfg, "a")
    assert [x.loader.pin_memory for x in loaders] == [pinned] * 2


def test_images_of_a_batch_are_stacked_without_a_copy(cfg, register):
    register("a", [0, 1, 2, 3])
    (batch,) = build_classification_test_loader(cfg, "a")
    images = [x["image"] for x in batch]
    for part in (images, images[1:3], images[3:]):
        stacked = stack(part)
        assert torch.equal(stacked, torch.stack(part))
        assert stacked.data_ptr() == part[0].data_ptr()


def test_other_images_are_stacked_by_a_copy():
    batch = torch.arange(4.0 * 3 * 2 * 2).reshape(4, 3, 2, 2)
    separate = [torch.zeros(3, 2, 2), torch.ones(3, 2, 2)]
    for images in (separate, [batch[1], batch[0]], [batch[0], batch[2]], list(batch.mT)):
        stacked = stack(images)
        assert torch.equal(stacked, torch.stack(images))
        assert all(stacked.data_ptr() != x.data_ptr() for x in images)


def test_each_image_gets_its_own_gradient():
    batch = torch.zeros(3, 1, 2, 2, requires_grad=True)
    (stack(list(batch)) * torch.tensor([1.0, 2.0, 3.0])[:, None, None, None]).sum().backward()
    assert batch.grad[:, 0, 0, 0].tolist() == [1, 2, 3]


def test_more_images_per_batch_than_there_are(cfg, register):
    register("a", [0, 1, 2])
    cfg.DATASETS.TRAIN = ("a",)
    assert [len(batch) for batch in itertools.islice(build_classification_train_loader(cfg), 5)] == [4] * 5


def test_workers_draw_different_random_numbers(cfg, register):
    register("a", [0])
    cfg.DATASETS.TRAIN = ("a",)
    cfg.INPUT.CLASSIFICATION.PADDING = 4
    cfg.DATALOADER.NUM_WORKERS = 2
    DatasetCatalog.get("a")[0]["image"][:] = np.arange(48).reshape(4, 4, 3)
    first, second = itertools.islice(build_classification_train_loader(cfg), 2)
    assert not torch.equal(torch.stack([x["image"] for x in first]), torch.stack([x["image"] for x in second]))


def test_evaluation_by_detectron2(cfg, register):
    """The model says what is at the image's number: 7 of 10 labels."""
    register("a", [0, 1, 2, 3, 4, 5, 0, 0, 0, 0])
    answers = torch.eye(6)[[0, 1, 2, 3, 4, 5, 0, 1, 2, 3]]
    results = inference_on_dataset(
        lambda batch: [{"scores": answers[number]} for number in numbers(batch)],
        build_classification_test_loader(cfg, "a"),
        ClassificationEvaluator("a"),
    )
    assert results["classification"]["top1"] == pytest.approx(70)


@pytest.mark.parametrize("label", [-1, 6, 1.0, "cat", None])
def test_label_that_cannot_be(cfg, register, label):
    register("a", [0, 5, label])
    cfg.DATASETS.TRAIN = ("a",)
    message = re.escape(
        f"a[2]: got label {label!r} in data set 'a'; MODEL.CLASSIFIER.NUM_CLASSES allows whole numbers from 0 to 5."
    )
    with pytest.raises(InputError, match=message):
        build_classification_train_loader(cfg)
    with pytest.raises(InputError, match=message):
        build_classification_test_loader(cfg, "a")


def test_dict_without_a_label(cfg, register):
    DatasetCatalog.register("boxes", lambda: [{"file_name": "a.png", "annotations": []}])
    with pytest.raises(InputError, match=r"data set 'boxes': dict 0 has file_name, annotations; file_name and label"):
        build_classification_test_loader(cfg, "boxes")


def test_data_set_without_images(cfg, register):
    register("a", [])
    with pytest.raises(InputError, match=r"^data set 'a' has no images"):
        build_classification_test_loader(cfg, "a")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("DATASETS.TRAIN", (), "DATASETS.TRAIN: no data set is named."),
        ("SOLVER.IMS_PER_BATCH", 0, "SOLVER.IMS_PER_BATCH: got 0; a multiple of the 1 process"),
        ("DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler", "DATALOADER.SAMPLER_TRAIN: got 'RepeatFactor"),
    ],
)
def test_values_that_cannot_be(cfg, register, key, value, message):
    register("a", [0])
    cfg.DATASETS.TRAIN = ("a",)
    cfg.merge_from_list([key, value])
    with pytest.raises(InputError, match=message):
        build_classification_train_loader(cfg)


def test_batch_that_processes_cannot_share(cfg, register, monkeypatch):
    register("a", [0])
    cfg.DATASETS.TRAIN = ("a",)
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 3)
    with pytest.raises(InputError, match=r"SOLVER.IMS_PER_BATCH: got 4; a multiple of the 3 process"):
        build_classification_train_loader(cfg)


def test_image_of_a_folder_that_is_corrupt(cfg, register, tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "mine" / name).mkdir(parents=True)
        cv2.imwrite(str(tmp_path / "mine" / name / "a.png"), np.zeros((4, 4, 3), np.uint8))
    cfg.DATASETS.IMAGE_FOLDER["mine"] = {"ROOT": "mine"}
    register_datasets(cfg)
    (batch,) = build_classification_test_loader(cfg, "mine")
    assert [x["label"] for x in batch] == [0, 1]
    broken = tmp_path / "mine/dog/a.png"
    broken.write_bytes(broken.read_bytes()[:40])
    with pytest.raises(InputError, match=f"^{broken}: not an image that can be read: "):
        list(build_classification_test_loader(cfg, "mine"))
