"""Folders of images per class, and what may be wrong with them."""

import re

import pytest

from kd_det.data import check_files, register_datasets
from kd_det.data.image_folder import ImageFolder
from kd_det.errors import InputError


@pytest.fixture
def root(tmp_path):
    """Two classes with three images and a text file; images are found by their names and not opened."""
    for name in ("dog/b.png", "dog/more/a.JPEG", "cat/z.jpg", "dog/notes.txt"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).touch()
    return tmp_path / "data"


def test_dicts(root):
    dataset = ImageFolder("x", str(root))
    assert dataset.classes == ["cat", "dog"]
    found = [(record["file_name"], record["label"]) for record in dataset()]
    assert found == [(f"{root}/cat/z.jpg", 0), (f"{root}/dog/b.png", 1), (f"{root}/dog/more/a.JPEG", 1)]


def test_relative_root_is_resolved_when_used(root, monkeypatch):
    dataset = ImageFolder("x", "data")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(root.parent))
    dataset.check_files()
    assert len(dataset()) == 3


def test_relative_root_lies_in_datasets_where_no_folder_is_named(cfg, root, monkeypatch, tmp_path):
    (tmp_path / "datasets").mkdir()
    root.rename(tmp_path / "datasets" / "mine")
    monkeypatch.delenv("DETECTRON2_DATASETS")
    monkeypatch.chdir(tmp_path)
    cfg.DATASETS.IMAGE_FOLDER["mine"] = {"ROOT": "mine"}
    cfg.DATASETS.TRAIN = ("mine",)
    register_datasets(cfg)
    check_files(cfg)


def test_missing_folder(cfg, tmp_path):
    cfg.DATASETS.IMAGE_FOLDER["mine"] = {"ROOT": "nowhere"}
    cfg.DATASETS.TRAIN = ("mine",)
    register_datasets(cfg)
    with pytest.raises(
        InputError, match=f"^{tmp_path}/nowhere: folder not found; it is the ROOT of the data set 'mine'"
    ):
        check_files(cfg)


def test_missing_imagenet(cfg, tmp_path):
    cfg.DATASETS.TEST = ("imagenet_val",)
    message = f"{tmp_path}/imagenet/val: folder not found; .* 'imagenet_val'. DETECTRON2_DATASETS is '{tmp_path}'"
    with pytest.raises(InputError, match=message):
        check_files(cfg)
    (tmp_path / "imagenet/val").mkdir(parents=True)
    check_files(cfg)


def test_no_folder_of_a_class(tmp_path):
    (tmp_path / "a.png").touch()
    with pytest.raises(InputError, match=rf"^{re.escape(str(tmp_path))}: it has no folders; one folder of images per"):
        ImageFolder("x", str(tmp_path))()


def test_hidden_folders_and_files(root):
    for name in (".ipynb_checkpoints/a.png", ".git/a.png", "dog/.ipynb_checkpoints/b.png", "dog/._b.png"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).touch()
    test_dicts(root)


def test_nothing_but_hidden_folders(tmp_path):
    (tmp_path / ".git").mkdir()
    with pytest.raises(InputError, match="it has no folders; one folder of images per class is needed"):
        ImageFolder("x", str(tmp_path))()


def test_class_without_images(root, cfg):
    """It is known before the training, of test sets, too."""
    (root / "cat/z.jpg").rename(root / "cat/.z.jpg")
    message = rf"^{re.escape(str(root))}: Found no valid file for the classes cat\. Each folder in it is a class, with "
    with pytest.raises(InputError, match=message):
        ImageFolder("x", str(root))()
    cfg.DATASETS.IMAGE_FOLDER["mine"] = {"ROOT": str(root)}
    cfg.DATASETS.TEST = ("mine",)
    register_datasets(cfg)
    with pytest.raises(InputError, match=message):
        check_files(cfg)
