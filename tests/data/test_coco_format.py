import dataclasses
import json
import math
import os

import cv2
import numpy as np
import pycocotools.mask as mask_util
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
        [0, 0, 1e-300, 5],
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
        (remove("annotations"), r"has images, but no annotations \(like the image_info files of COCO's test images\)"),
        (remove("images"), "lacks images; a COCO file has the lists images, annotations, categories"),
        (lambda data: data.clear(), "lacks images, categories, annotations;"),
        (lambda data: data["images"].clear(), "the list images is empty"),
        (lambda data: data["categories"].clear(), "the list categories is empty"),
        (remove("images", 1, "width"), r"images\[1\] lacks width; it needs id, file_name, width, height"),
        (remove("annotations", 0, "bbox"), r"annotations\[0\] lacks bbox"),
        (assign("images", 1, "width", "64"), r"images\[1\] has width '64', which is not a whole number above 0"),
        (assign("images", 1, "width", 20.5), r"images\[1\] has width 20.5, which is not a whole number above 0"),
        (assign("images", 1, "height", -1), r"images\[1\] has height -1, which is not a whole number above 0"),
        (assign("images", 0, "id", [1]), r"images\[0\] has id \[1\], which is not a whole number"),
        (assign("images", 0, "id", 2**70), r"images\[0\] has id 11805.*, which is not a whole number of 64 bits"),
        (assign("images", 0, "id", "one"), "ids of images are numbers and text, such as 2 and 'one'; use one kind"),
        (assign("categories", 0, "id", "five"), "ids of categories are numbers and text, such as 3 and 'five'; use"),
        (
            assign("images", 0, "file_name", "\ud800.png"),
            r"images\[0\] has file_name '\\ud800.png', which is not a name",
        ),
        (assign("categories", 0, "name", 5), r"categories\[0\] has name 5, which is not a name"),
        (
            assign("categories", 0, "keypoints", ["a", "a"]),
            r"categories\[0\] has keypoints .*, which is not a list of diff",
        ),
        (assign("images", 0, "file_name", 7), r"images\[0\] has file_name 7, which is not a name"),
        (assign("annotations", 0, "image_id", "1"), "annotation 7 has image_id '1', but images have ids like 1: both"),
        (lambda data: data["images"][1].update(id=1), "1 ids of images are used twice, the first is 1"),
        (
            lambda data: data["images"][1].update(file_name="gone.png"),
            "1 of 2 image files not found, the first is .*/gone.png",
        ),
        (
            lambda data: data["annotations"][0].update(category_id=4),
            "annotation 7 has category_id 4; categories has 5, 3",
        ),
    ],
)
def test_wrong_file(dataset, data, change, message):
    change(data)
    with pytest.raises(InputError, match=f"{dataset.json_file}: {message}") as error:
        load(dataset, data)
    assert "\n" not in str(error.value)


HALF = {"size": [10, 20], "counts": [150, 51]}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("category_id", None, "None, which is not a whole number of 64 bits, or text"),
        ("ignore", 1, "1, which is not 0; Detectron2 has no use for it"),
        ("iscrowd", 2, "2, which is not 0 or 1"),
        ("bbox", [], r"\[\], which is not a list of four numbers, x, y, width, height\."),
        ("bbox", "x", "'x', which is not a list of four numbers"),
        ("bbox", [0, 0, math.nan, 1], r"\[0, 0, nan, 1\], which is not a list of four numbers"),
        ("bbox", [9, 5, 4, 4, 30], ".*; five values are a rotated box, which cannot be read"),
        ("segmentation", 7, "7, which is not a list of polygons"),
        ("segmentation", [[0, 0, 9, 0, 9, math.nan]], ".* not a list of polygons"),
        ("segmentation", [[0, 0, 9, 0, 9, 1e300]], ".* not a list of polygons"),
        ("segmentation", [["a"] * 6], ".* not a list of polygons"),
        ("segmentation", {"counts": [200]}, r".*: its size must be \[height, width\]"),
        ("segmentation", {"size": [10, 20], "counts": [-math.inf]}, ".*: its counts must be a list of numbers or"),
        ("segmentation", HALF, ".* counts must be whole numbers that add up to its size, 10 x 20"),
        ("segmentation", HALF | {"counts": "1"}, ".* counts must be whole numbers that add up to its size, 10 x 20"),
        ("segmentation", HALF | {"counts": "~~~~"}, ".*: its counts must be a list of numbers or compressed text"),
        ("keypoints", [1, 2], r"\[1, 2\], which is not a list of numbers x, y, visibility"),
    ],
)
def test_wrong_annotation(dataset, data, field, value, message):
    data["annotations"][0][field] = value
    with pytest.raises(InputError, match=rf"{dataset.json_file}: annotations\[0\] has {field} {message}"):
        load(dataset, data)


def test_a_mask_of_another_size(dataset, data):
    data["annotations"][0]["segmentation"] = {"size": [20, 10], "counts": [200]}
    with pytest.raises(InputError, match=r"annotation 7 has an RLE mask of size \[20, 10\] .* 1.png is 20 x 10\."):
        load(dataset, data)


# ---- What is read although it is not written as COCO writes it ----
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-8"])
def test_encodings(dataset, data, encoding):
    data["categories"][0]["name"] = "dög"
    with open(dataset.json_file, "w", encoding=encoding) as file:
        json.dump(data, file, ensure_ascii=False)
    assert [len(record["annotations"]) for record in dataset()] == [1, 0]
    assert dataset.classes == ["cat", "dög"]


def test_whole_numbers_with_a_point(dataset, data):
    """As pandas writes them."""
    whole = load(dataset, data)
    MetadataCatalog.pop("mine")
    for items in data.values():
        for item in items:
            item |= {key: float(value) for key, value in item.items() if isinstance(value, int)}
    other = CocoFormat("mine", dataset.json_file, dataset.image_root)
    records = load(other, data)
    assert records == whole
    assert [type(record[key]) for record in records for key in ("image_id", "width", "height")] == [int] * 6


@pytest.mark.parametrize("value", ["0", None, False, 0.0, "false", ""])
def test_no_crowd(dataset, data, value):
    data["annotations"][0]["iscrowd"] = value
    assert load(dataset, data)[0]["annotations"][0]["iscrowd"] == 0


def test_a_crowd_as_text(dataset, data):
    data["annotations"][0]["iscrowd"] = "1"
    assert load(dataset, data)[0]["annotations"][0]["iscrowd"] == 1
    assert (dataset.contents.annotations, dataset.contents.objects) == (1, 0)


def test_a_flat_polygon(dataset, data):
    data["annotations"][0]["segmentation"] = [0, 0, 20, 0, 20, 10]
    assert load(dataset, data)[0]["annotations"][0]["segmentation"] == [[0, 0, 20, 0, 20, 10]]


@pytest.mark.parametrize("polygons", [[[0, 0, 20, 10]], [[]], [[1, 2, 3, 4, 5, 6, 7]]])
def test_polygons_without_area(dataset, data, polygons, caplog):
    data["annotations"][0]["segmentation"] = polygons
    annotation = load(dataset, data)[0]["annotations"][0]
    assert (annotation["bbox"], annotation["segmentation"]) == ([0, 0, 20, 10], [])
    assert (
        "segmentation of 1 of the annotations (first: annotations[0]) is a flat list, read as one polygon, or has"
        in caplog.text
    )
    assert not dataset.contents.without_mask


@pytest.mark.parametrize("nothing", [None, [], {}])
def test_no_mask(dataset, data, nothing):
    data["annotations"][0]["segmentation"] = nothing
    assert "segmentation" not in load(dataset, data)[0]["annotations"][0]
    assert dataset.contents.without_mask == [0]


@pytest.mark.parametrize("compressed", [True, False])
def test_rle(dataset, data, compressed):
    """Compressed by pycocotools itself, with runs that are differences, and long ones."""
    mask = np.random.default_rng(0).integers(0, 2, (10, 20), np.uint8)
    mask[:, 5:15] = 1
    rle = mask_util.encode(np.asfortranarray(mask))
    runs = np.diff(np.flatnonzero(np.diff(np.concatenate([[2], mask.T.ravel(), [2]])))).tolist()
    counts = rle["counts"].decode() if compressed else runs if mask[0, 0] == 0 else [0, *runs]
    data["annotations"][0]["segmentation"] = {"size": [10.0, 20.0], "counts": counts}
    found = load(dataset, data)[0]["annotations"][0]["segmentation"]
    assert np.array_equal(mask_util.decode(found), mask)
    assert dataset.contents.with_rle == [0]


def test_paths_of_windows(dataset, data, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "1.png").rename(tmp_path / "sub" / "1.png")
    data["images"][0]["file_name"] = "sub\\1.png"
    assert load(dataset, data)[0]["file_name"] == str(tmp_path / "sub" / "1.png")


def test_annotations_of_no_image(dataset, data, caplog):
    data["annotations"].append(data["annotations"][0] | {"id": 8, "image_id": 9, "bbox": [90, 90, 5, 5]})
    assert [len(record["annotations"]) for record in load(dataset, data)] == [1, 0]
    assert "a.json: 1 of the annotations belong to no image and are left out." in caplog.text
    assert (dataset.contents.annotations, dataset.contents.objects) == (2, 1)


def test_a_right_file_is_read_itself(dataset, data):
    data["annotations"][0]["area"] = 200
    load(dataset, data)
    with dataset.for_evaluation() as name:
        assert name == "mine"


def test_the_changed_copy_is_gone_afterwards(dataset, data):
    load(dataset, data)
    with dataset.for_evaluation() as name:
        metadata = MetadataCatalog.get(name)
        assert (metadata.thing_classes, metadata.json_file) == (["cat", "dog"], name)
        with open(metadata.json_file) as file:
            assert json.load(file)["annotations"][0]["area"] == 200
    assert not os.path.exists(name)
    assert name not in MetadataCatalog


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


def test_scores_as_weights(dataset, data):
    data["annotations"][0]["score"] = 0.5
    assert "score" not in load(dataset, data)[0]["annotations"][0]
    weighted = dataclasses.replace(dataset, scores="weight")
    data["annotations"].append({**data["annotations"][0], "id": 8})
    del data["annotations"][1]["score"]
    assert [annotation.get("score") for annotation in load(weighted, data)[0]["annotations"]] == [0.5, None]


@pytest.mark.parametrize("score", [1.01, -0.1, math.nan, "high", True, [0.5]])
def test_wrong_scores(dataset, data, score):
    data["annotations"][0]["score"] = score
    load(dataset, data)
    with pytest.raises(
        InputError, match=r"a.json: annotations\[0\] has score .*; a number from 0 to 1 is needed where "
    ):
        load(dataclasses.replace(dataset, scores="weight"), data)


def test_a_file_without_scores_has_no_weights(dataset, data):
    with pytest.raises(InputError, match=r"no annotation has a score, but DATASETS.COCO_FORMAT.mine.SCORES is weight"):
        load(dataclasses.replace(dataset, scores="weight"), data)
