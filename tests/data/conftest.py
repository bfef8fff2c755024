import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog

from kd_det.config import add_kd_config
from kd_det.data.shapes_folder import write_shapes


@pytest.fixture(scope="session")
def shapes_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "shapes"
    write_shapes(root, train=12, test=8, size=128, seed=3)
    return root


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
        MetadataCatalog.remove(name)
