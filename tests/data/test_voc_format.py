import shutil

import cv2
import numpy as np
import pytest
from detectron2.data.datasets import load_voc_instances

from kd_det.data.annotation_files import write_voc
from kd_det.data.voc_format import VocFormat
from kd_det.errors import InputError

CLASSES = ("cat", "dog")


@pytest.fixture
def dataset(tmp_path):
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "ImageSets/Main/train.txt").write_text("a\nb\n")
    for name in "ab":
        cv2.imwrite(str(tmp_path / f"JPEGImages/{name}.jpg"), np.zeros((10, 20, 3), np.uint8))
        image = {"file_name": f"{name}.jpg", "width": 20, "height": 10}
        write_voc(tmp_path / f"Annotations/{name}.xml", image, [("dog", [0, 0, 20, 10])])
    return VocFormat("mine", str(tmp_path), "train", CLASSES, 2012)


def test_loads_what_detectron2_loads(dataset):
    records = dataset()
    assert records == load_voc_instances(dataset.root, "train", CLASSES)
    assert records[1]["annotations"][0] == {"category_id": 1, "bbox": [0, 0, 20, 10], "bbox_mode": 0}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("</annotation>", "", "not an XML file: no element found"),
        ("dog", "dgo", "class 'dgo' found; the config allows cat, dog"),
        ("<name>dog</name>", "", "<object> lacks <name>, which Detectron2 reads"),
        ("<pose>Unspecified</pose>", "", "<object> lacks <pose>"),
        ("<difficult>0", "<difficult>no", "<difficult> is 'no'; Detectron2 reads whole numbers only"),
        ("<width>20</width>", "", "<annotation> lacks <size/width>"),
        ("<xmin>1", "<xmin>1.5", "<bndbox/xmin> is '1.5'; Detectron2 reads whole numbers only"),
        ("<xmin>1", "<xmin>21", r"the box \[21, 1, 20, 10\] \(xmin, .*\) of a dog is empty .* which is 20 x 10"),
        ("<xmin>1", "<xmin>-1", r"the box \[-1, 1, 20, 10\] .* leaves the image"),
        ("<xmax>20", "<xmax>22", r"the box \[1, 1, 22, 10\] .* leaves the image"),
        ("<ymax>10", "<ymax>12", r"the box \[1, 1, 20, 12\] .* leaves the image"),
    ],
)
def test_wrong_xml(dataset, tmp_path, old, new, message):
    xml = tmp_path / "Annotations/b.xml"
    text = xml.read_text()
    assert old in text
    xml.write_text(text.replace(old, new))
    with pytest.raises(InputError, match=f"{xml}: {message}"):
        dataset()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "lists 0 images; Detectron2 needs two or more"),
        ("a\n", "lists 1 images; Detectron2 needs two or more"),
        ("a 1\nb -1\n", "line 1 is 'a 1'; one name of an image is needed"),
    ],
)
def test_wrong_split(dataset, tmp_path, text, message):
    split = tmp_path / "ImageSets/Main/train.txt"
    split.write_text(text)
    with pytest.raises(InputError, match=f"{split}: {message}"):
        dataset()


@pytest.mark.parametrize("path", ["Annotations/b.xml", "JPEGImages/b.jpg"])
def test_missing_file_of_an_image(dataset, tmp_path, path):
    (tmp_path / path).unlink()
    with pytest.raises(InputError, match=f"{path}: file not found, but .*train.txt lists b"):
        dataset()


def test_missing_split_and_folders(dataset, tmp_path):
    (tmp_path / "ImageSets/Main/train.txt").unlink()
    with pytest.raises(InputError, match=r"train.txt: file not found; DATASETS.VOC_FORMAT.mine.SPLIT names it"):
        dataset.check_files()
    shutil.rmtree(tmp_path / "JPEGImages")
    with pytest.raises(InputError, match=f"JPEGImages: folder not found; DATASETS.VOC_FORMAT.mine.ROOT is {tmp_path}"):
        dataset.check_files()
