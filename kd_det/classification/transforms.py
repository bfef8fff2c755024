"""Transforms images before they enter a classifier: augmentation in training, resizing in tests."""

from detectron2.config import CfgNode
from torchvision.transforms import v2

from kd_det.errors import InputError

AUGMENTATIONS = ("padded_crop", "resized_crop", "none")
FLIPS = {"horizontal": 0.5, "none": 0.0}


def build_transform(cfg: CfgNode, is_train: bool) -> v2.Transform:
    """Builds the transform that INPUT.CLASSIFICATION describes, from uint8 images (3, H, W) to (3, SIZE, SIZE).

    With "padded_crop", "none" and in tests with RESIZE_TEST 0, an image of another size is first resized to SIZE; its
    aspect ratio is not kept.

    Raises:
        InputError: If a key has a value that is not allowed.
    """
    node, flip = cfg.INPUT.CLASSIFICATION, cfg.INPUT.RANDOM_FLIP
    key = "INPUT.CLASSIFICATION"
    if node.AUGMENTATION not in AUGMENTATIONS:
        raise InputError(f"{key}.AUGMENTATION: got {node.AUGMENTATION!r}; allowed are {', '.join(AUGMENTATIONS)}.")
    if flip not in FLIPS:
        raise InputError(f"INPUT.RANDOM_FLIP: got {flip!r}; of image classifiers allowed are {', '.join(FLIPS)}.")
    if node.SIZE < 1:
        raise InputError(f"{key}.SIZE: must be at least 1, got {node.SIZE}.")
    if node.PADDING < 0:
        raise InputError(f"{key}.PADDING: must be at least 0, got {node.PADDING}.")
    if node.RESIZE_TEST != 0 and node.RESIZE_TEST < node.SIZE:
        raise InputError(f"{key}.RESIZE_TEST: must be 0, or {key}.SIZE ({node.SIZE}) or more, got {node.RESIZE_TEST}.")

    square = v2.Resize((node.SIZE, node.SIZE))
    if not is_train:
        if node.RESIZE_TEST == 0:
            return square
        return v2.Compose([v2.Resize(node.RESIZE_TEST), v2.CenterCrop(node.SIZE)])
    if node.AUGMENTATION == "none":
        return square
    if node.AUGMENTATION == "resized_crop":
        crops = [v2.RandomResizedCrop(node.SIZE)]
    else:
        crops = [square, v2.RandomCrop(node.SIZE, padding=node.PADDING)]
    return v2.Compose([*crops, v2.RandomHorizontalFlip(FLIPS[flip])])
