import pytest

from kd_det.data.shapes_folder import write_shapes


@pytest.fixture(scope="session")
def shapes_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "shapes"
    write_shapes(root, train=12, test=8, size=128, seed=3)
    return root
