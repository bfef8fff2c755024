"""Data sets for image classification that need no definition."""

import importlib.util
import pickle
import struct
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetCatalog
from torchvision.datasets import CIFAR10, CIFAR100

from kd_det.data import check_files, class_names
from kd_det.errors import InputError

KINDS = {"cifar10": (CIFAR10, "labels"), "cifar100": (CIFAR100, "fine_labels")}


def load_script(path):
    spec = importlib.util.spec_from_file_location("script", Path(__file__).resolve().parents[2] / path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def write_archive(root, reader, key):
    """Four images per file: in image i of a file of number f, red is f, green is i and blue is the column."""
    folder = root / reader.base_folder
    folder.mkdir()
    for number, (name, _) in enumerate([*reader.train_list, *reader.test_list]):
        data = np.empty((4, 3, 32, 32), np.uint8)
        data[:, 0], data[:, 1], data[:, 2] = number, np.arange(4)[:, None, None], np.arange(32)
        entry = {"data": data.reshape(4, -1), key: [3, 1, 0, 2], "coarse_labels": [0] * 4}
        (folder / name).write_bytes(pickle.dumps(entry))
    (folder / reader.meta["filename"]).write_bytes(pickle.dumps({reader.meta["key"]: ["a", "b", "c", "d"]}))


@pytest.fixture
def archives(tmp_path, monkeypatch):
    """Both archives, tiny, and readers that compare no checksums."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    for reader, key in KINDS.values():
        write_archive(tmp_path, reader, key)
        for files in ("train_list", "test_list"):
            monkeypatch.setattr(reader, files, [[name, None] for name, _ in getattr(reader, files)])
        monkeypatch.setattr(reader, "meta", reader.meta | {"md5": None})
    return tmp_path


@pytest.mark.parametrize(
    ("name", "count", "first"), [("cifar10_train", 20, 0), ("cifar10_test", 4, 5), ("cifar100_train", 4, 0)]
)
def test_cifar(archives, name, count, first):
    records = DatasetCatalog.get(name)
    assert [record["file_name"] for record in records] == [f"{name}[{i}]" for i in range(count)]
    assert [record["label"] for record in records[:4]] == [3, 1, 0, 2]
    image = records[2]["image"]
    assert (image.shape, image.dtype) == ((32, 32, 3), np.uint8)
    assert image[7, 9].tolist() == [first, 2, 9]
    assert class_names(name) == ["a", "b", "c", "d"]


@pytest.mark.parametrize("name", ["cifar10_train", "cifar100_test"])
def test_missing_cifar(cfg, tmp_path, name):
    cfg.DATASETS.TRAIN = (name,)
    reader = KINDS[name.split("_")[0]][0]
    message = (
        f"^{tmp_path}/{reader.base_folder}: folder not found, .*; download {reader.url} and unpack it in {tmp_path}"
    )
    with pytest.raises(InputError, match=message):
        check_files(cfg)


def test_cifar_that_is_not_the_official_one(tmp_path, monkeypatch):
    """A pickle can run code: nothing is read but the files of the known checksums."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    write_archive(tmp_path, *KINDS["cifar10"])
    monkeypatch.setattr(pickle, "load", lambda *_, **__: pytest.fail("a pickle was loaded"))
    message = f"^{tmp_path}/cifar-10-batches-py: a file is missing or differs from the official one; download "
    with pytest.raises(InputError, match=message):
        DatasetCatalog.get("cifar10_test")
    with pytest.raises(InputError, match=message):
        class_names("cifar10_test")


def test_cifar_with_a_file_less(archives):
    (archives / "cifar-100-python/test").unlink()
    with pytest.raises(InputError, match="cifar-100-python: a file is missing or differs"):
        DatasetCatalog.get("cifar100_train")


def write_mnist(root, images=3, labels=(7, 0, 3)):
    """Both splits in the published format; the value of pixel (y, x) of image i is i + 10 y + x, modulo 256."""
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    pixels = np.arange(images)[:, None, None] + 10 * np.arange(28)[:, None] + np.arange(28)
    for split in ("train", "t10k"):
        header = struct.pack(">4i", 0x803, images, 28, 28)
        (folder / f"{split}-images-idx3-ubyte").write_bytes(header + pixels.astype(np.uint8).tobytes())
        header = struct.pack(">2i", 0x801, len(labels))
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(header + bytes(labels))
    return folder


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("split", ["train", "test"])
def test_mnist(datasets, split):
    write_mnist(datasets)
    records = DatasetCatalog.get(f"mnist_{split}")
    assert [record["label"] for record in records] == [7, 0, 3]
    assert [record["file_name"] for record in records] == [f"mnist_{split}[{i}]" for i in range(3)]
    image = records[2]["image"]
    assert (image.shape, image.dtype) == ((28, 28, 3), np.uint8)
    assert image[3, 4].tolist() == [36, 36, 36]
    assert class_names(f"mnist_{split}") == list("0123456789")


def test_missing_mnist(cfg, datasets):
    cfg.DATASETS.TRAIN = ("mnist_train",)
    folder = write_mnist(datasets)
    check_files(cfg)
    (folder / "t10k-labels-idx1-ubyte").unlink()
    told = f"^{folder}/t10k-labels-idx1-ubyte: file not found, but 'mnist_train' lies there; download train-images"
    with pytest.raises(InputError, match=told):
        check_files(cfg)


def test_mnist_that_is_damaged(datasets):
    folder = write_mnist(datasets, labels=(7, 0))
    with pytest.raises(InputError, match=f"^{folder}: 3 images, but 2 labels; download train-images-idx3-ubyte.gz, "):
        DatasetCatalog.get("mnist_train")
    path = folder / "t10k-images-idx3-ubyte"
    for content in (path.read_bytes()[:100], b"", b"not of this format"):
        path.write_bytes(content)
        with pytest.raises(InputError, match=f"^{folder}: a file is damaged: "):
            DatasetCatalog.get("mnist_test")


def test_digits():
    train, test = (DatasetCatalog.get(f"digits_{split}") for split in ("train", "test"))
    assert (len(train), len(test)) == (1442, 355)
    for records, least in ((train, 140), (test, 34)):
        assert min(np.bincount([record["label"] for record in records])) >= least
        assert records[0]["file_name"].startswith("digits_t")
    image = np.stack([record["image"] for record in train])
    assert (image.shape, image.dtype, image.min(), image.max()) == ((1442, 8, 8, 3), np.uint8, 0, 255)
    assert (image == image[..., :1]).all()
    assert len({record["image"].tobytes() for record in train + test}) == 1797
    assert class_names("digits_test") == list("0123456789")


def test_digits_without_scikit_learn(cfg, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    cfg.DATASETS.TRAIN = ("digits_train",)
    with pytest.raises(InputError, match=r"^data set 'digits_train': scikit-learn is not installed; run pip install"):
        check_files(cfg)


def test_a_part_of_cifar10_as_folders(archives, monkeypatch):
    """Two images of each class, the same for the same seed, with the pixels of the archive."""
    script = load_script("datasets/prepare_cifar10.py")

    def prepare(name, *options):
        monkeypatch.setattr(
            "sys.argv", ["x", "--output", str(archives / name), "--train", "2", "--test", "1", *options]
        )
        script.main()
        return sorted(path.relative_to(archives / name) for path in (archives / name).rglob("*.png"))

    paths = prepare("one")
    assert Counter(path.parts[:2] for path in paths) == {
        **{("train", name): 2 for name in "abcd"},
        **{("test", name): 1 for name in "abcd"},
    }
    assert prepare("two") == paths
    assert prepare("three", "--seed", "1") != paths
    for path in paths:
        record = DatasetCatalog.get(f"cifar10_{path.parts[0]}")[int(path.stem)]
        assert "abcd"[record["label"]] == path.parts[1]
        assert np.array_equal(cv2.imread(str(archives / "one" / path))[:, :, ::-1], record["image"])
    with pytest.raises(InputError, match=r"one exists already; delete it or choose another folder"):
        prepare("one")
    with pytest.raises(InputError, match=r"^--train, --test: got 9; each class has 5 images"):
        prepare("four", "--train", "9")
