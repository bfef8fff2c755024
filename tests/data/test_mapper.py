import re

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetMapper, build_detection_test_loader
from detectron2.data import transforms as T
from detectron2.structures import BoxMode

from kd_det.data import DetectionMapper
from kd_det.errors import InputError

THING = {"bbox": [1, 2, 9, 8], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
MASKED = THING | {"segmentation": [[1, 2, 9, 2, 9, 8]]}


@pytest.fixture
def record(tmp_path):
    file = tmp_path / "image.jpg"
    cv2.imwrite(str(file), np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8))
    return {"file_name": str(file), "height": 40, "width": 60, "image_id": 0, "annotations": [MASKED]}


def truncate(path):
    with open(path, "r+b") as file:
        file.truncate(900)


def test_gives_what_the_stock_mapper_gives(cfg, record):
    cfg.MODEL.MASK_ON = True
    cfg.INPUT.RANDOM_FLIP = "none"
    cfg.INPUT.MIN_SIZE_TRAIN = (80,)
    own, stock = (mapper(cfg, is_train=True)(record) for mapper in (DetectionMapper, DatasetMapper))
    assert own.keys() == stock.keys()
    assert (own["image"] == stock["image"]).all()
    assert (own["instances"].gt_boxes.tensor == stock["instances"].gt_boxes.tensor).all()
    assert len(own["instances"].gt_masks) == 1


@pytest.mark.parametrize("is_train", [True, False])
@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n broken", None])
def test_unreadable_image(cfg, record, is_train, content):
    if content is None:
        truncate(record["file_name"])
    else:
        with open(record["file_name"], "wb") as file:
            file.write(content)
    with pytest.raises(InputError, match=f"^{re.escape(record['file_name'])}: not an image that can be read: "):
        DetectionMapper(cfg, is_train=is_train)(record)


def test_unreadable_image_in_a_worker(cfg, record):
    truncate(record["file_name"])
    loader = build_detection_test_loader([record], mapper=DetectionMapper(cfg, is_train=False), num_workers=1)
    with pytest.raises(InputError) as error:
        next(iter(loader))
    assert f"{record['file_name']}: not an image that can be read: " in str(error.value).splitlines()[-1]


def test_image_of_another_size(cfg, record):
    record["width"] = 61
    message = rf"{record['file_name']}, got \(60, 40\), expect \(61, 40\)"
    with pytest.raises(InputError, match=message):
        DetectionMapper(cfg, is_train=True)(record)


def test_masks_that_are_missing(cfg, record):
    cfg.MODEL.MASK_ON = True
    record["annotations"] = [MASKED, THING]
    with pytest.raises(InputError, match=r"image.jpg: an annotation has no segmentation, but MODEL.MASK_ON asks"):
        DetectionMapper(cfg, is_train=True)(record)


@pytest.mark.parametrize("annotations", [[], [THING | {"iscrowd": 1}]])
@pytest.mark.parametrize("crop", [True, False])
def test_image_without_objects(cfg, record, annotations, crop):
    cfg.MODEL.MASK_ON = True
    cfg.INPUT.CROP.ENABLED = crop
    record["annotations"] = annotations
    mapped = DetectionMapper(cfg, is_train=True)(record)
    assert len(mapped["instances"]) == 0
    assert mapped["instances"].gt_boxes.tensor.shape == (0, 4)
    assert mapped["instances"].image_size == tuple(mapped["image"].shape[1:])


def test_other_errors_stay_as_they_are(cfg, record):
    del record["annotations"][0]["bbox_mode"]
    with pytest.raises(KeyError, match="bbox_mode"):
        DetectionMapper(cfg, is_train=True)(record)


def test_scores_stay_with_their_objects(cfg, record):
    """Cropping leaves nothing of the first object."""
    cfg.INPUT.RANDOM_FLIP, cfg.INPUT.MIN_SIZE_TRAIN = "none", (40,)
    boxes = [[0, 0, 2, 2], [20, 10, 50, 30], [40, 20, 60, 40]]
    record["annotations"] = [THING | {"bbox": box, "category_id": 5 + i} for i, box in enumerate(boxes)]
    for i in (0, 2):
        record["annotations"][i]["score"] = 0.25 * (i + 1)
    record["annotations"].insert(1, THING | {"iscrowd": 1, "score": 0.5})
    mapper = DetectionMapper(cfg, is_train=True)
    instances = mapper(record)["instances"]
    assert instances.gt_classes.tolist() == [5, 6, 7]
    assert instances.gt_scores.tolist() == [0.25, 1.0, 0.75]
    crop = T.CropTransform(10, 5, 50, 35)
    mapper.augmentations = T.AugmentationList([crop])
    instances = mapper(record)["instances"]
    assert instances.gt_classes.tolist() == [6, 7]
    assert instances.gt_scores.tolist() == [1.0, 0.75]
    assert record["annotations"][0]["category_id"] == 5
