import pytest
import torch

from kd_det import Batch


@pytest.fixture
def batch():
    """Two images, the second of which is padded at its right and its lower edge."""
    return Batch.from_inputs([{"image": torch.zeros(3, 64, 128)}, {"image": torch.zeros(3, 40, 96)}])
