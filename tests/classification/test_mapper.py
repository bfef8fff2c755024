"""What enters an image classifier: sizes, channel order, random numbers, and files that cannot be read."""

import re

import cv2
import numpy as np
import pytest
import torch

from kd_det.classification.image_mapper import ClassificationMapper
from kd_det.errors import InputError


@pytest.fixture
def record():
    """20 x 30 pixels: red is the row, green the column, blue 200."""
    image = np.empty((20, 30, 3), np.uint8)
    image[..., 0], image[..., 1], image[..., 2] = np.arange(20)[:, None], np.arange(30), 200
    return {"image": image, "label": np.int64(3), "file_name": "x[0]"}


def mapper(cfg, is_train=True, **keys):
    cfg.INPUT.FORMAT = keys.pop("FORMAT", "RGB")
    cfg.INPUT.RANDOM_FLIP = keys.pop("FLIP", "horizontal")
    for key, value in keys.items():
        cfg.INPUT.CLASSIFICATION[key] = value
    return ClassificationMapper(cfg, is_train)


@pytest.mark.parametrize("augmentation", ["padded_crop", "resized_crop", "none"])
@pytest.mark.parametrize("is_train", [True, False])
@pytest.mark.parametrize("size", [8, 32])
def test_shapes(cfg, record, augmentation, is_train, size):
    found = mapper(cfg, is_train, AUGMENTATION=augmentation, SIZE=size)(record)
    assert found.keys() == {"image", "label", "file_name"}
    image = found["image"]
    assert (image.shape, image.dtype) == ((3, size, size), torch.uint8)
    assert image.is_contiguous()
    assert (type(found["label"]), found["label"], found["file_name"]) == (int, 3, "x[0]")


@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
@pytest.mark.parametrize("in_file", [True, False])
def test_order_of_channels(cfg, record, tmp_path, image_format, in_file):
    record["image"] = record["image"][:, :20]
    if in_file:
        record["file_name"] = str(tmp_path / "a.png")
        cv2.imwrite(record["file_name"], record.pop("image")[..., ::-1])
    image = mapper(cfg, AUGMENTATION="none", SIZE=20, FORMAT=image_format)(record)["image"]
    if image_format == "BGR":
        image = image.flip(0)
    assert image[:, 7, 11].tolist() == [7, 11, 200]


def test_crops_and_flips(cfg, record):
    """Of a square image of that size: one of 9 x 9 places, zeros outside, and the mirror image of half of them."""
    record["image"] = record["image"][:, :20] + 1
    padded = np.pad(record["image"], ((4, 4), (4, 4), (0, 0)))
    places = {padded[y : y + 20, x : x + 20].tobytes(): False for y in range(9) for x in range(9)}
    places |= {padded[y : y + 20, x : x + 20][:, ::-1].tobytes(): True for y in range(9) for x in range(9)}
    torch.manual_seed(0)
    augment = mapper(cfg, SIZE=20)
    found = [augment(record)["image"].permute(1, 2, 0).numpy().tobytes() for _ in range(400)]
    assert set(found) <= places.keys()
    assert len(set(found)) > 120
    assert 0.4 < np.mean([places[image] for image in found]) < 0.6
    augment = mapper(cfg, SIZE=20, FLIP="none")
    assert not any(places[augment(record)["image"].permute(1, 2, 0).numpy().tobytes()] for _ in range(50))


@pytest.mark.parametrize("augmentation", ["padded_crop", "resized_crop"])
def test_same_seed_same_images(cfg, record, augmentation):
    augment = mapper(cfg, AUGMENTATION=augmentation)

    def images(seed):
        torch.manual_seed(seed)
        return torch.stack([augment(record)["image"] for _ in range(8)])

    assert torch.equal(images(0), images(0))
    assert not torch.equal(images(0), images(1))


def test_tests_are_not_random(cfg, record):
    test = mapper(cfg, is_train=False, SIZE=16)
    assert torch.equal(test(record)["image"], test(record)["image"])


def test_centre_of_a_test_image(cfg, record):
    """The short side has 20 pixels and stays as it is; columns 7 to 22 of 30 are the centre."""
    image = mapper(cfg, is_train=False, SIZE=16, RESIZE_TEST=20)(record)["image"]
    assert image[1, 0].tolist() == list(range(7, 23))
    assert image[0, :, 0].tolist() == list(range(2, 18))
    image = mapper(cfg, is_train=False, SIZE=16, RESIZE_TEST=40)(record)["image"]
    assert image[1, 0, [0, -1]].tolist() == pytest.approx([11, 18], abs=1)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"AUGMENTATION": "cutout"}, "INPUT.CLASSIFICATION.AUGMENTATION: got 'cutout'; allowed are padded_crop, "),
        ({"FLIP": "vertical"}, "INPUT.RANDOM_FLIP: got 'vertical'; of image classifiers allowed are horizontal, none."),
        ({"FORMAT": "L"}, "INPUT.FORMAT: got 'L'; of image classifiers allowed are RGB, BGR."),
        ({"SIZE": 0}, "INPUT.CLASSIFICATION.SIZE: must be at least 1, got 0."),
        ({"PADDING": -1}, "INPUT.CLASSIFICATION.PADDING: must be at least 0, got -1."),
        ({"RESIZE_TEST": 31}, "INPUT.CLASSIFICATION.RESIZE_TEST: must be 0, or INPUT.CLASSIFICATION.SIZE (32) or more"),
    ],
)
def test_values_that_cannot_be(cfg, keys, message):
    with pytest.raises(InputError, match=re.escape(message)):
        mapper(cfg, **keys)


@pytest.mark.parametrize("content", [b"", b"no image", None])
def test_unreadable_image(cfg, tmp_path, content):
    file = tmp_path / "a.png"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match=f"^{re.escape(str(file))}: not an image that can be read: "):
        mapper(cfg)({"file_name": str(file), "label": 0})
