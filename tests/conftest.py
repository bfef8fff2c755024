import logging

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from helpers import WIDE, save_teacher, tiny_cfg, tiny_inputs, write_coco_folder

from kd_det import add_kd_config


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, help="how often test_soak.py kills runs in all (8), and print what it did")
    parser.addoption(
        "--write-gpu-counts", action="store_true", help="write the table of tests/heads/test_gpu_counts.py"
    )
    parser.addoption("--kill-seed", default="0", help="when and how (%(default)s)")


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """Options that name the config and the weights of a Mask R-CNN, wider than the students."""
    return save_teacher(tmp_path_factory.mktemp("teacher"), tiny_cfg(options=WIDE))


@pytest.fixture(scope="session")
def coco_folder(tmp_path_factory):
    """A COCO-format data set of four images."""
    return write_coco_folder(tmp_path_factory.mktemp("coco") / "data")


@pytest.fixture
def inputs():
    """A batch of two images of different sizes, two objects each."""
    return tiny_inputs()


@pytest.fixture
def in_process():
    """For tests that run a tool in this process: what it registers and how it logs is forgotten afterwards."""
    known = set(DatasetCatalog)
    loggers = [
        logging.getLogger(name) for name in ("", "detectron2", "fvcore", "kd_det", "detectron2.engine.train_loop")
    ]
    before = [(x, x.level, x.propagate, x.handlers[:], x.filters[:]) for x in loggers]
    yield
    for name in set(DatasetCatalog) - known:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    for logger, level, propagate, handlers, filters in before:
        logger.setLevel(level)
        logger.propagate, logger.handlers[:], logger.filters[:] = propagate, handlers, filters


@pytest.fixture
def cfg(tmp_path, monkeypatch):
    """A config whose data sets lie in `tmp_path`; what the test registers is forgotten afterwards."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    before = set(DatasetCatalog)
    cfg = get_cfg()
    add_kd_config(cfg)
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()
    yield cfg
    for name in set(DatasetCatalog) - before:
        DatasetCatalog.remove(name)
        MetadataCatalog.pop(name, None)
