import json

import cv2
import numpy as np
import pytest
from detectron2.data import MetadataCatalog
from detectron2.data.datasets import load_coco_json

from kd_det.data.coco_format import CocoFormat
from kd_det.errors import InputError


@pytest.fixture
def data():
    return {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 20, "height": 10} for i in (1, 2)],
        "annotations": [{"id": 7, "image_id": 1, "category_id": 3, "bbox": [0, 0, 20, 10], "iscrowd": 0}],
        "categories": [{"id": 5, "name": "dog"}, {"id": 3, "name": "cat"}],
    }


@pytest.fixture
def dataset(tmp_path):
    for i in (1, 2):
        cv2.imwrite(str(tmp_path / f"{i}.png"), np.zeros((10, 20, 3), np.uint8))
    yield CocoFormat("mine", str(tmp_path / "a.json"), str(tmp_path))
    MetadataCatalog.pop("mine", None)


def load(dataset, data):
    with open(dataset.json_file, "w") as file:
        json.dump(data, file)
    return dataset()


def test_loads_what_detectron2_loads(dataset, data):
    records = load(dataset, data)
    assert records == load_coco_json(dataset.json_file, dataset.image_root, "mine")
    assert [len(record["annotations"]) for record in records] == [1, 0]
    assert dataset.classes == MetadataCatalog.get("mine").thing_classes == ["cat", "dog"]
    assert records[0]["annotations"][0]["category_id"] == 0


@pytest.mark.parametrize("box", [[-1, 0, 22, 10], [19.5, 9.5, 1.5, 1.5]])
def test_tolerance_of_one_pixel(dataset, data, box):
    data["annotations"][0]["bbox"] = box
    assert load(dataset, data)[0]["annotations"][0]["bbox"] == box


@pytest.mark.parametrize(
    "box",
    [
        [0, 0, 0, 5],
        [0, 0, 5, 0],
        [5, 5, -2, 2],
        [-1.5, 0, 5, 5],
        [17, 0, 5, 5],
        [0, 7, 5, 5],
        [0, 0, float("nan"), 1],
        [],
        "x",
    ],
)
def test_wrong_box(dataset, data, box):
    data["annotations"][0]["bbox"] = box
    with pytest.raises(InputError, match=r"a.json: 1 boxes are empty .* of annotation 7 in 1.png, which is 20 x 10\."):
        load(dataset, data)


def remove(*path):
    def change(data):
        *parents, last = path
        for key in parents:
            data = data[key]
        del data[last]

    return change


def assign(kind, i, field, value):
    return lambda data: data[kind][i].update({field: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove("annotations"), "lacks annotations; a COCO file has the lists images, annotations, categories"),
        (lambda data: data.clear(), "lacks images, annotations, categories;"),
        (lambda data: data["images"].clear(), "the list images is empty"),
        (lambda data: data["categories"].clear(), "the list categories is empty"),
        (remove("images", 1, "width"), r"images\[1\] lacks width; it needs id, file_name, width, height"),
        (remove("annotations", 0, "bbox"), r"annotations\[0\] lacks bbox"),
        (assign("images", 1, "width", "64"), r"images\[1\] has width '64', which is not a number"),
        (assign("images", 0, "id", [1]), r"images\[0\] has id \[1\], which is not a number"),
        (assign("images", 0, "file_name", 7), r"images\[0\] has file_name 7, which is not a name"),
        (assign("annotations", 0, "category_id", None), r"annotations\[0\] has category_id None, which is not a"),
        (lambda data: data["images"][1].update(id=1), "1 ids of images are used twice, the first is 1"),
        (
            lambda data: data["images"][1].update(file_name="gone.png"),
            "1 of 2 image files not found, the first is .*/gone.png",
        ),
        (
            lambda data: data["annotations"][0].update(category_id=4),
            "annotation 7 has category_id 4; categories has 5, 3",
        ),
        (lambda data: data["annotations"][0].update(ignore=1), '"ignore" in COCO json file is not supported'),
    ],
)
def test_wrong_file(dataset, data, change, message):
    change(data)
    with pytest.raises(InputError, match=f"{dataset.json_file}: {message}") as error:
        load(dataset, data)
    assert "\n" not in str(error.value)


def test_missing_or_unreadable_files(dataset, tmp_path):
    with pytest.raises(InputError, match=r"a.json: file not found; DATASETS.COCO_FORMAT.mine.JSON names it"):
        dataset()
    (tmp_path / "a.json").write_text('{"images": [')
    with pytest.raises(InputError, match=r"a.json: not a JSON file: Expecting value: line 1 column 13"):
        dataset()
    (tmp_path / "a.json").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(InputError, match=r"a.json: not a JSON file: "):
        dataset()
    with pytest.raises(InputError, match=r"nowhere: folder not found; DATASETS.COCO_FORMAT.x.IMAGE_ROOT names it"):
        CocoFormat("x", str(tmp_path / "a.json"), str(tmp_path / "nowhere"))()
