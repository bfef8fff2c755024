import pytest

from kd_det import Batch

from .signals import make_input


@pytest.fixture
def batch():
    """Two images with objects, the second of which is padded at its right and its lower edge."""
    return Batch.from_inputs([make_input(64, 128, [3, 9, 50, 33], [70, 2, 75, 60]), make_input(40, 96, [0, 0, 20, 30])])
