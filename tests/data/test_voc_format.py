"""Folders in the layout of Pascal VOC, as people and tools write them, and what may be wrong with them."""

import re
import shutil

import cv2
import numpy as np
import pytest
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_voc_instances, register_pascal_voc
from PIL import Image

from kd_det.data import check_files, check_num_classes, register_datasets
from kd_det.data.annotation_files import write_voc
from kd_det.data.voc_format import VocFormat, voc_dataset
from kd_det.errors import InputError

CLASSES = ("cat", "dog")
DOG = {"category_id": 1, "bbox": [0, 0, 20, 10], "bbox_mode": 0}


@pytest.fixture
def dataset(tmp_path):
    """Two images of 20 x 10 pixels, each with a dog that fills it."""
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "ImageSets/Main/train.txt").write_text("a\nb\n")
    for name in "ab":
        cv2.imwrite(str(tmp_path / f"JPEGImages/{name}.jpg"), np.zeros((10, 20, 3), np.uint8))
        image = {"file_name": f"{name}.jpg", "width": 20, "height": 10}
        write_voc(tmp_path / f"Annotations/{name}.xml", image, [("dog", [0, 0, 20, 10])])
    return VocFormat("mine", str(tmp_path), "train", CLASSES, 2012)


@pytest.fixture
def xml(tmp_path, dataset):
    """The annotation of the second image."""
    return tmp_path / "Annotations/b.xml"


@pytest.fixture
def split(tmp_path, dataset):
    return tmp_path / "ImageSets/Main/train.txt"


def replace(path, old, new):
    text = path.read_text()
    assert re.search(old, text, re.DOTALL)
    path.write_text(re.sub(old, new, text, flags=re.DOTALL))


def test_loads_what_detectron2_loads(dataset):
    records = dataset()
    assert records == load_voc_instances(dataset.root, "train", CLASSES)
    assert records[1]["annotations"] == [DOG]


def test_whoever_changes_the_dicts_changes_those_of_nobody_else(dataset):
    dataset()[0]["annotations"].clear()
    assert dataset()[0]["annotations"] == [DOG]


# ---- Annotations ----
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("<pose>.*?</difficult>", ""),
        ("<truncated>0", "<truncated>0.0597"),
        ("<truncated>0", "<truncated>Unspecified"),
        ("<difficult>0", "<difficult>"),
        ("<size>.*</size>", ""),
        ("<size>.*</size>", "<size/>"),
        ("<height>10</height>", ""),
        ("<width>20", "<width>0"),
        ("<width>20", "<width>20.0"),
        ("<name>dog", "<name>\n dog "),
        ("<xmin>1<", "<xmin> 1.0 <"),
        ("<filename>.*</filename>", ""),
        ("<difficult>0", "<difficult>False"),
        ("<annotation>", '<annotation xmlns="http://example.org/voc">'),
    ],
)
def test_only_names_and_boxes_are_needed(dataset, xml, old, new):
    expected = dataset()
    replace(xml, old, new)
    assert VocFormat("again", dataset.root, "train", CLASSES, 2012)() == expected


def test_fractional_boxes(dataset, xml):
    replace(xml, "<xmin>1<", "<xmin>5.70000076293945<")
    assert dataset()[1]["annotations"][0]["bbox"] == [4.70000076293945, 0, 20, 10]


def test_the_size_of_an_image_that_its_viewers_turn(dataset, xml, tmp_path):
    replace(xml, "<size>.*</size>", "")
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (10, 20)).save(tmp_path / "JPEGImages/b.jpg", exif=exif)
    assert (dataset()[1]["width"], dataset()[1]["height"]) == (20, 10)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig", "iso-8859-1"])
def test_declared_encodings(dataset, xml, encoding):
    declared = "utf-8" if encoding == "utf-8-sig" else encoding
    xml.write_bytes(f'<?xml version="1.0" encoding="{declared}"?>\n<!-- é -->{xml.read_text()}'.encode(encoding))
    assert dataset()[1]["annotations"] == [DOG]


def test_difficult_objects_are_trained_on(dataset, xml):
    replace(xml, "<difficult>0", "<difficult>1")
    assert dataset()[1]["annotations"] == [DOG]
    assert [[thing.difficult for thing in image.objects] for image in dataset.images] == [[False], [True]]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("</annotation>", "", "not an XML file that can be read: no element found"),
        ("^", '<?xml version="1.0" encoding="gbk"?>', "not an XML file that can be read: multi-byte encodings are not"),
        ("^", '<?xml version="1.0" encoding="utf-9"?>', "not an XML file that can be read: unknown encoding"),
        ("dog", "dgo", "class 'dgo' found; the config allows cat, dog"),
        ("<name>dog</name>", "", "<object> lacks <name>; each object needs name and bndbox"),
        ("<name>dog", "<name> ", "<object> lacks <name>"),
        ("<bndbox>.*</bndbox>", "", "<object> lacks <bndbox/xmin>"),
        ("<difficult>0", "<difficult>no", "<difficult> is 'no'; a number is needed"),
        ("<width>20", "<width>wide", "<size/width> is 'wide'; a number is needed"),
        ("<width>20", "<width>-1", "<size/width> is -1; a number of pixels is needed"),
        ("<width>20", "<width>20.5", "<size/width> is 20.5; a number of pixels is needed"),
        ("<xmin>1<", "<xmin>1,5<", "<bndbox/xmin> is '1,5'; a number is needed"),
        ("<xmin>1<", "<xmin>nan<", "<bndbox/xmin> is 'nan'; a number is needed"),
        ("<xmin>1<", "<xmin>21.5<", r"the box \[21.5, 1, 20, 10\] \(xmin, .*\) of a dog is empty .* which is 20 x 10"),
        ("<xmin>1<", "<xmin>-1<", r"the box \[-1, 1, 20, 10\] .* leaves the image"),
        ("<xmax>20", "<xmax>22", r"the box \[1, 1, 22, 10\] .* leaves the image"),
        ("<ymax>10", "<ymax>12", r"the box \[1, 1, 20, 12\] .* leaves the image"),
        (
            "(<object>.*</object>)",
            r"<objects>\1</objects>",
            "an <object> lies inside another tag; .* below <annotation>",
        ),
        ("</object>", "<object><name>cat</name></object></object>", "an <object> lies inside another tag"),
        (".+", "<html><body>404</body></html>", "not an annotation of Pascal VOC: <html> found"),
    ],
)
def test_wrong_xml(dataset, xml, old, new, message):
    replace(xml, old, new)
    with pytest.raises(InputError, match=f"^{xml}: {message}") as error:
        dataset()
    assert "\n" not in str(error.value)


def test_annotations_of_the_test_set_are_read_before_the_training(cfg, dataset, xml):
    replace(xml, "dog", "dgo")
    entry = {"ROOT": dataset.root, "SPLIT": "train", "CLASSES": list(CLASSES)}
    cfg.DATASETS.VOC_FORMAT["mine"] = CfgNode(entry)
    cfg.DATASETS.TEST = ("mine",)
    register_datasets(cfg)
    with pytest.raises(InputError, match=f"^{xml}: class 'dgo' found"):
        check_files(cfg)


# ---- Splits ----
@pytest.mark.parametrize(
    "text",
    [b"a\nb\n\n", b"\r\na\r\nb", b"\xef\xbb\xbfa\nb\n", "a\r\nb\r\n".encode("utf-16"), b" a \n\tb"],
    ids=["blank lines", "Windows", "byte order mark", "UTF-16", "padded"],
)
def test_splits_as_editors_write_them(dataset, split, text):
    split.write_bytes(text)
    assert [record["image_id"] for record in dataset()] == ["a", "b"]


def test_one_image(dataset, split):
    split.write_text("b\n")
    assert [record["image_id"] for record in dataset()] == ["b"]


def test_names_with_blanks(dataset, split, tmp_path):
    split.write_text("IMG 1\n")
    (tmp_path / "Annotations/b.xml").rename(tmp_path / "Annotations/IMG 1.xml")
    (tmp_path / "JPEGImages/b.jpg").rename(tmp_path / "JPEGImages/IMG 1.jpg")
    assert [(record["image_id"], record["annotations"]) for record in dataset()] == [("IMG 1", [DOG])]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "lists no image; one name a line is needed"),
        (b"\n \n", "lists no image"),
        (b"a\nb\na\n", r"1 name\(s\) listed twice, the first is 'a'"),
        (b"\xff\n", "not a text file in UTF-8"),
    ],
)
def test_wrong_split(dataset, split, text, message):
    split.write_bytes(text)
    with pytest.raises(InputError, match=f"^{split}: {message}"):
        dataset()


def test_split_that_lists_files(dataset, split, tmp_path):
    split.write_text("a.jpg\n")
    message = (
        f"{tmp_path}/Annotations/a.jpg.xml: file not found, but .*train.txt lists 'a.jpg'; each line is a name with"
    )
    with pytest.raises(InputError, match=message):
        dataset()


# ---- Images ----
@pytest.mark.parametrize("file", ["b.png", "b.JPG", "b.jpeg", "b.BMP", "b.tif", "b.webp", "b.gif"])
def test_any_suffix(dataset, tmp_path, file):
    (tmp_path / "JPEGImages/b.jpg").unlink()
    Image.new("RGB", (20, 10)).save(tmp_path / "JPEGImages" / file)
    (tmp_path / "JPEGImages/b.txt").touch()
    assert [record["file_name"] for record in dataset()] == [f"{tmp_path}/JPEGImages/{x}" for x in ("a.jpg", file)]


@pytest.mark.parametrize("stated", ["photo.png", r"C:\pictures\photo.png", "some/where/photo.png"])
def test_an_image_that_only_the_annotation_names(dataset, xml, tmp_path, stated):
    (tmp_path / "JPEGImages/b.jpg").rename(tmp_path / "JPEGImages/photo.png")
    replace(xml, "<filename>b.jpg", f"<filename>{stated}".replace("\\", r"\\"))
    assert dataset()[1]["file_name"] == f"{tmp_path}/JPEGImages/photo.png"


def test_images_of_one_name(dataset, xml, tmp_path):
    for suffix in ("png", "bmp"):
        shutil.copy(tmp_path / "JPEGImages/b.jpg", tmp_path / f"JPEGImages/b.{suffix}")
    assert dataset()[1]["file_name"].endswith("b.jpg")
    (tmp_path / "JPEGImages/b.jpg").unlink()
    again = VocFormat("again", dataset.root, "train", CLASSES, 2012)
    with pytest.raises(InputError, match=r"JPEGImages/b: 2 images have this name: .*b.bmp, .*b.png; keep one of them"):
        again()
    replace(xml, "<filename>b.jpg", "<filename>b.png")
    assert again()[1]["file_name"].endswith("b.png")


@pytest.mark.parametrize("path", ["Annotations/b.xml", "JPEGImages/b.jpg"])
def test_missing_file_of_an_image(dataset, tmp_path, path):
    (tmp_path / path).unlink()
    with pytest.raises(InputError, match=f"{path}: file not found, .*but .*train.txt lists 'b'"):
        dataset()


def test_link_to_an_image_that_is_gone(dataset, tmp_path):
    (tmp_path / "JPEGImages/b.jpg").unlink()
    (tmp_path / "JPEGImages/b.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(InputError, match=r"b\.jpg: file not found"):
        dataset()


def test_missing_split_and_folders(dataset, tmp_path):
    (tmp_path / "ImageSets/Main/train.txt").unlink()
    with pytest.raises(InputError, match=r"train.txt: file not found; DATASETS.VOC_FORMAT.mine.SPLIT names it"):
        dataset.check_files()
    shutil.rmtree(tmp_path / "JPEGImages")
    with pytest.raises(InputError, match=f"JPEGImages: folder not found; DATASETS.VOC_FORMAT.mine.ROOT is {tmp_path}"):
        dataset.check_files()


# ---- Data sets that Detectron2 registers ----
def check_stock(cfg, root):
    """As before a training: a test set that Detectron2 itself would read behind it."""
    register_pascal_voc("stock", root, "train", 2012, class_names=CLASSES)
    MetadataCatalog.get("stock").evaluator_type = "pascal_voc"
    cfg.DATASETS.TEST = ("stock",)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
    check_files(cfg)
    check_num_classes(cfg)


def test_stock_data_set_without_its_test_images(cfg, dataset, split):
    split.unlink()
    with pytest.raises(InputError, match=f"^{split}: file not found; the split of the data set 'stock' names it"):
        check_stock(cfg, dataset.root)


def test_stock_data_set_with_a_wrong_annotation(cfg, dataset, xml):
    replace(xml, "<xmin>1<", "<xmin>5.7<")
    replace(xml, "dog", "dgo")
    with pytest.raises(InputError, match=f"^{xml}: class 'dgo' found"):
        check_stock(cfg, dataset.root)
    replace(xml, "dgo", "dog")
    assert voc_dataset("stock")() == DatasetCatalog.get("stock")


def test_data_set_of_a_plugin_that_does_not_say_where_it_is(cfg):
    DatasetCatalog.register("own", list)
    with pytest.raises(InputError, match=r"^data set 'own': its metadata lacks dirname, split, thing_classes, year; "):
        voc_dataset("own")
