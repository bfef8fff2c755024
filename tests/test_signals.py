"""The batch, and which cells of a map see a part of the image."""

import pytest
import torch

from kd_det import Batch


def valid_cells(size, stride, cells):
    return Batch([], [size], mask_padding=True).valid_mask(torch.zeros(1, 3, *cells), stride)


def test_sizes_are_those_before_padding():
    batch = Batch.from_inputs([{"image": torch.zeros(3, 40, 60)}, {"image": torch.zeros(3, 64, 32)}])
    assert batch.image_sizes == [(40, 60), (64, 32)]
    assert not batch.mask_padding


def test_no_mask_where_padding_is_not_masked():
    assert Batch([], [(8, 8)]).valid_mask(torch.zeros(1, 3, 4, 4), 4) is None


@pytest.mark.parametrize(
    ("size", "rows", "columns"),
    [((16, 16), 4, 4), ((8, 12), 2, 3), ((9, 12), 3, 3), ((8, 13), 2, 4), ((1, 1), 1, 1)],
)
def test_cells_that_see_a_pixel_of_the_image(size, rows, columns):
    """A map of 4 x 4 cells at stride 4."""
    expected = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    expected[:, :, :rows, :columns] = True
    assert torch.equal(valid_cells(size, 4, (4, 4)), expected)


def test_each_image_has_its_own_mask():
    batch = Batch([], [(16, 16), (8, 4)], mask_padding=True)
    mask = batch.valid_mask(torch.zeros(2, 5, 4, 4), 4)
    assert mask.shape == (2, 1, 4, 4)
    assert mask.sum(dim=(1, 2, 3)).tolist() == [4 * 4, 2 * 1]


@pytest.mark.parametrize("stride", [4, 8, 16, 32, 64])
def test_every_level_of_a_small_image_has_a_cell(stride):
    assert valid_cells((33, 33), stride, (128 // stride, 128 // stride)).any()
