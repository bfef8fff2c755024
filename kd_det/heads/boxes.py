"""Reads the boxes of a batch's objects, and marks the cells of feature maps that belong to them.

Boxes are x0, y0, x1, y1 in pixels of the network's input. Images are padded at the right and bottom only, so a position
divided by the stride is a position on the map. No function has a gradient.
"""

from collections.abc import Mapping, Sequence

import torch
from detectron2.layers import ShapeSpec
from torch import Tensor
from torchvision.ops import box_iou

from kd_det.errors import InputError
from kd_det.losses.numerics import cast_up
from kd_det.signals import Batch


def check_detector(head: str, student_spec: Mapping[str, ShapeSpec]) -> None:
    """Checks that the student is not an image classifier, whose images have no boxes.

    Args:
        head: Name of the head that needs them, for the message.

    Raises:
        InputError: If it is.
    """
    if "logits" in student_spec:
        raise InputError(f"KD.HEADS: {head} needs the boxes of objects, which images of a classifier do not have.")


def object_boxes(head: str, batch: Batch, like: Tensor) -> list[Tensor]:
    """Returns the boxes of each image's objects, (n, 4), from the data loader.

    Args:
        head: Name of the head that needs them, for the message.
        like: A feature map, on whose device the boxes will be, in its precision or float32.

    Raises:
        InputError: If an image comes without them; one without objects has an empty list.
    """
    return to_device(boxes_on_cpu(head, batch, like), like)


def boxes_of_levels(head: str, batch: Batch, like: Tensor, levels: int) -> list[list[Tensor]]:
    """Returns for each level of a pyramid the boxes of each image's objects that suit it; see :func:`box_levels`.

    Args:
        head: Name of the head that needs them, for the message.
        like: A feature map, on whose device the boxes will be, in its precision or float32.
        levels: Number of levels, finest first.

    Raises:
        InputError: If an image comes without them; one without objects has empty lists.
    """
    # They are still on the CPU, where an index makes nobody wait.
    images = boxes_on_cpu(head, batch, like)
    own = [box_levels(boxes, levels) for boxes in images]
    groups = [boxes[of == level] for level in range(levels) for boxes, of in zip(images, own, strict=True)]
    moved = to_device(groups, like)
    return [moved[i : i + len(images)] for i in range(0, len(moved), len(images))]


def boxes_on_cpu(head: str, batch: Batch, like: Tensor) -> list[Tensor]:
    """Returns the boxes of each image's objects as the data loader gave them, in the precision of :func:`object_boxes`.

    Raises:
        InputError: If an image comes without them.
    """
    for x in batch.inputs:
        if "instances" not in x or not x["instances"].has("gt_boxes"):
            name = x.get("file_name", "an image")
            raise InputError(f"KD.HEADS: {head} needs the boxes of objects, but {name} comes without instances.")
    return [x["instances"].gt_boxes.tensor.to(cast_up(like).dtype) for x in batch.inputs]


def to_device(boxes: list[Tensor], like: Tensor) -> list[Tensor]:
    """Moves lists of boxes to the device of a tensor, in one copy."""
    return list(torch.cat(boxes).to(like.device, non_blocking=True).split([len(x) for x in boxes]))


def finest_first(names: Sequence[str], spec: Mapping[str, ShapeSpec]) -> list[str]:
    """Sorts the names of a pyramid's maps by their strides."""
    return sorted(names, key=lambda name: spec[name].stride)


def valid_region(mask: Tensor, valid: Tensor | None) -> Tensor:
    """Leaves out the cells of a region that lie in the padding; None leaves out none."""
    return mask if valid is None else mask & valid


@torch.no_grad()
def focal_masks(boxes: Tensor, size: Sequence[int], stride: int) -> tuple[Tensor, Tensor]:
    """Weights the cells of one image by the objects there, as in FGD.

    Yang et al., 2021, https://arxiv.org/abs/2111.11837. An object takes all cells from the floor of its first to the
    ceiling of its last coordinate, both included, and weights each by 1 over their number, also if some lie outside the
    map; where objects overlap, the largest weight counts. The published code divides the boxes by the size of the image
    before padding, which shifts them in padded images; here the stride divides them.

    Args:
        boxes: (n, 4) boxes of one image.
        size: height and width of the map.
        stride: pixels per cell.

    Returns:
        (H, W) weights of the foreground, and (H, W) weights of the background: 1 over the number of cells without an
        object there, 0 elsewhere.

    Example:
        >>> focal_masks(torch.tensor([[0.0, 0.0, 4.0, 7.0]]), size=(2, 3), stride=8)
        (tensor([[0.2500, 0.2500, 0.0000],
                [0.2500, 0.2500, 0.0000]]), tensor([[0.0000, 0.0000, 0.5000],
                [0.0000, 0.0000, 0.5000]]))
    """
    cells = boxes / stride
    first, last = cells[:, :2].floor(), cells[:, 2:].ceil() + 1
    weights = 1 / (last - first).prod(dim=1)
    foreground = weights[:, None, None] * _rectangles(first, last, size)
    foreground = torch.cat((foreground.new_zeros(1, *size), foreground)).amax(dim=0)
    background = (foreground == 0).to(foreground)
    return foreground, background / background.sum().clamp(min=1)


@torch.no_grad()
def fine_grained_mask(anchors: Tensor, boxes: Tensor, size: Sequence[int], *, phi: float = 0.5) -> Tensor:
    """Marks the cells with an anchor that overlaps an object nearly as well as the best one, as in FGFI.

    Wang et al., 2019, https://arxiv.org/abs/1906.03609. An anchor counts if its IoU with an object is above phi times
    that object's best IoU on the map.

    Args:
        anchors: (H * W * A, 4) anchors of the map in the order row, column, anchor.
        boxes: (n, 4) boxes of one image.
        size: height and width of the map.
        phi: share of the best IoU that an anchor must exceed.

    Returns:
        (H, W) boolean mask.

    Example:
        >>> anchors = torch.tensor([[0.0, 0.0, 8.0, 8.0], [8.0, 0.0, 16.0, 8.0], [16.0, 0.0, 24.0, 8.0]])
        >>> fine_grained_mask(anchors, torch.tensor([[0.0, 0.0, 15.0, 8.0]]), size=(1, 3))
        tensor([[ True,  True, False]])
    """
    overlaps = box_iou(anchors, boxes)
    near = (overlaps > phi * overlaps.amax(dim=0)).any(dim=1)
    return near.view(*size, -1).any(dim=2)


@torch.no_grad()
def decoupled_masks(boxes: Tensor, sizes: Sequence[Sequence[int]], strides: Sequence[int]) -> list[Tensor]:
    """Marks the cells of each object on one level of a pyramid, as in DeFeat.

    Guo et al., 2021, https://arxiv.org/abs/2103.14475. An object takes the cells from its first coordinate to its last,
    both divided by the stride and truncated, the last cell not included; if that leaves none in either direction, it
    takes the single cell of its first corner.

    Args:
        boxes: (n, 4) boxes of one image.
        sizes: height and width of each level's map, finest first.
        strides: pixels per cell of each level.

    Returns:
        One (H, W) boolean mask per level.

    Example:
        >>> decoupled_masks(torch.tensor([[0.0, 0.0, 8.0, 3.0], [0.0, 0.0, 128.0, 128.0]]), [(1, 3), (1, 2)], [4, 8])
        [tensor([[ True, False, False]]), tensor([[True, True]])]
    """
    levels = box_levels(boxes, len(strides))
    masks = []
    for level, (size, stride) in enumerate(zip(sizes, strides, strict=True)):
        cells = (boxes / stride).trunc()
        first, last = cells[:, :2], cells[:, 2:]
        empty = (last <= first).any(dim=1, keepdim=True)
        covered = _rectangles(first, torch.where(empty, first + 1, last), size)
        masks.append((covered & (levels == level)[:, None, None]).any(dim=0))
    return masks


@torch.no_grad()
def box_levels(boxes: Tensor, count: int) -> Tensor:
    """Assigns each box to the level of a pyramid that suits its size, as in DeFeat.

    The rule is ``floor(log2(sqrt((w + 1) (h + 1)) / 56))`` from the finest level on: boxes up to 111 pixels belong to
    the finest, up to 223 to the next, and so on.

    Args:
        boxes: (n, 4) boxes.
        count: number of levels, finest first; the coarsest takes all larger boxes.

    Returns:
        (n,) index of each box's level.

    Example:
        >>> box_levels(torch.tensor([[0.0, 0.0, 50.0, 50.0], [0.0, 0.0, 120.0, 120.0], [0.0, 0.0, 900.0, 900.0]]), 3)
        tensor([0, 1, 2])
    """
    sides = boxes[:, 2:] - boxes[:, :2] + 1
    return (sides.prod(dim=1).sqrt() / 56 + 1e-6).log2().floor().long().clamp(0, count - 1)


def _rectangles(first: Tensor, last: Tensor, size: Sequence[int]) -> Tensor:
    """Marks the cells from first (n, 2), included, to last (n, 2), not included, as (n, H, W); x comes before y."""
    rows, columns = (torch.arange(length, device=first.device) for length in size)
    in_row = (rows >= first[:, 1:]) & (rows < last[:, 1:])
    in_column = (columns >= first[:, :1]) & (columns < last[:, :1])
    return in_row[:, :, None] & in_column[:, None]
