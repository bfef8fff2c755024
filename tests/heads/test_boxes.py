"""Cells of feature maps that belong to objects."""

import pytest
import torch

from kd_det.heads.boxes import box_levels, decoupled_masks, fine_grained_mask, focal_masks


def boxes(*rows):
    return torch.tensor(rows, dtype=torch.float64).view(-1, 4)


def test_focal_masks_by_hand():
    # at stride 8: columns 0 to 2 and rows 1 to 2, so 6 cells; and columns 2 to 4 of row 2 to 3, beyond the 4 x 3 map
    foreground, background = focal_masks(boxes([3, 8, 16, 9], [17, 16, 32, 24]), (3, 4), 8)
    expected = torch.tensor([[0, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]).double() / 6  # both objects have 6 cells
    torch.testing.assert_close(foreground, expected)
    torch.testing.assert_close(background, torch.tensor([[1, 1, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0]]).double() / 5)


def test_the_smallest_object_counts_where_focal_masks_overlap():
    large, small = [0, 0, 24, 16], [9, 0, 15, 7]
    for order in ([large, small], [small, large]):
        foreground, background = focal_masks(boxes(*order), (2, 4), 8)
        assert foreground.tolist() == [[1 / 12, 1 / 4, 1 / 4, 1 / 12], [1 / 12, 1 / 4, 1 / 4, 1 / 12]]
        assert not background.any()


def test_fine_grained_mask_by_hand():
    # a row of three 8 x 8 anchors, each with a tall twin of half the width that only the second box likes
    squares, talls = ([[8 * i, 0, 8 * i + w, 8] for i in range(3)] for w in (8, 4))
    anchors = boxes(*(anchor for pair in zip(squares, talls, strict=True) for anchor in pair))
    # IoU of the first box: 1 and 1/2, which is not above 1/2 of the best; of the second 1/2 and 1
    assert fine_grained_mask(anchors, boxes([0, 0, 8, 8]), (1, 3)).tolist() == [[True, False, False]]
    assert fine_grained_mask(anchors, boxes([0, 0, 8, 8], [16, 0, 20, 8]), (3, 1)).tolist() == [[True], [False], [True]]
    # 6 of 8 columns lie in the second cell: IoU 2/14 of the first anchor, 6/10 of the second
    assert fine_grained_mask(anchors, boxes([6, 0, 14, 8]), (1, 3)).tolist() == [[False, True, False]]
    assert fine_grained_mask(anchors, boxes([6, 0, 14, 8]), (1, 3), phi=0.2).tolist() == [[True, True, False]]
    assert not fine_grained_mask(anchors, boxes([100, 100, 110, 110]), (1, 3)).any()  # no overlap: no best anchor


def test_decoupled_masks_by_hand():
    masks = decoupled_masks(boxes([5, 4, 13, 9], [30, 0, 31, 9], [0, 0, 111, 111]), [(4, 8), (2, 4)], [4, 8])
    # columns 1 to 2 of row 1; the single cell at column 7; the large box on the coarser level, beyond the map
    assert masks[0].nonzero().tolist() == [[0, 7], [1, 1], [1, 2]]
    assert masks[1].all()


@pytest.mark.parametrize(("side", "level"), [(1, 0), (110, 0), (111, 1), (222, 1), (223, 2), (447, 3), (895, 3)])
def test_levels_of_boxes(side, level):
    assert box_levels(boxes([7, 7, 7 + side, 7 + side]), 4).tolist() == [level]


def test_images_without_objects():
    none = torch.zeros(0, 4)
    foreground, background = focal_masks(none, (2, 3), 8)
    assert not foreground.any()
    torch.testing.assert_close(background, torch.full((2, 3), 1 / 6))
    assert not fine_grained_mask(torch.rand(12, 4), none, (2, 3)).any()
    assert [mask.tolist() for mask in decoupled_masks(none, [(1, 2), (1, 1)], [4, 8])] == [[[False, False]], [[False]]]
