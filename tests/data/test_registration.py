import logging
import re

import pytest
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from kd_det.data import check_files, check_num_classes, count_training_images, register_datasets
from kd_det.data.image_folder import ImageFolder
from kd_det.errors import InputError

COCO = {"JSON": "a.json", "IMAGE_ROOT": "images"}
VOC = {"ROOT": "voc", "SPLIT": "train", "CLASSES": ["cat", "dog"]}
FOLDER = {"ROOT": "images"}
SPLITS = ("train", "test")


def define(cfg, **entries):
    for name, entry in entries.items():
        keys = set(entry) if isinstance(entry, dict) else set()
        kind = "IMAGE_FOLDER" if keys == {"ROOT"} else "VOC_FORMAT" if "ROOT" in keys else "COCO_FORMAT"
        cfg.DATASETS[kind][name] = CfgNode(entry) if isinstance(entry, dict) else entry
    return cfg


def define_shapes(cfg, root):
    coco = {
        f"coco_{s}": {"JSON": str(root / f"coco/instances_{s}.json"), "IMAGE_ROOT": str(root / "JPEGImages")}
        for s in SPLITS
    }
    return define(cfg, **coco)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            "a.json",
            "DATASETS.COCO_FORMAT.x: 'a.json' found; a mapping with the keys JSON, IMAGE_ROOT, FLIP_PAIRS is needed.",
        ),
        ({"IMAGE_ROOT": "images"}, "DATASETS.COCO_FORMAT.x.JSON: missing; text is needed."),
        (COCO | {"JSON": ""}, "DATASETS.COCO_FORMAT.x.JSON: '' found; text is needed."),
        (COCO | {"ROOT_": "y"}, "DATASETS.COCO_FORMAT.x.ROOT_: unknown key; allowed are JSON, IMAGE_ROOT, FLIP_PAIRS."),
        (COCO | {"FLIP_PAIRS": ["a", "b"]}, "DATASETS.COCO_FORMAT.x.FLIP_PAIRS: ['a', 'b'] found; a list of pairs of"),
        (
            COCO | {"FLIP_PAIRS": [["a", "b", "c"]]},
            "DATASETS.COCO_FORMAT.x.FLIP_PAIRS: [['a', 'b', 'c']] found; a",
        ),
        (COCO | {"SCORES": "loss"}, "DATASETS.COCO_FORMAT.x.SCORES: 'loss' is not one of weight, ignore."),
        (
            COCO | {"SCORE": "weight"},
            "unknown key; allowed are JSON, IMAGE_ROOT, FLIP_PAIRS. A file with scores may have",
        ),
        (VOC | {"SPLIT": 7}, "DATASETS.VOC_FORMAT.x.SPLIT: 7 found; text is needed."),
        (VOC | {"CLASSES": "cat"}, "DATASETS.VOC_FORMAT.x.CLASSES: 'cat' found; a list is needed."),
        (VOC | {"CLASSES": []}, "DATASETS.VOC_FORMAT.x.CLASSES: [] found; a list of different names is needed."),
        (VOC | {"CLASSES": ["a", "a"]}, "DATASETS.VOC_FORMAT.x.CLASSES: ['a', 'a'] found; a list of different"),
        (VOC | {"CLASSES": ["cat", False]}, "DATASETS.VOC_FORMAT.x.CLASSES: ['cat', False] found; a list of different"),
        (VOC | {"YEAR": 2010}, "DATASETS.VOC_FORMAT.x.YEAR: 2010 found; 2007 (11-point AP) or 2012"),
        ({"ROOT": ""}, "DATASETS.IMAGE_FOLDER.x.ROOT: '' found; text is needed."),
        ({"ROOT": 3}, "DATASETS.IMAGE_FOLDER.x.ROOT: 3 found; text is needed."),
    ],
)
def test_wrong_entry(cfg, entry, message):
    with pytest.raises(InputError, match=re.escape(message)):
        register_datasets(define(cfg, x=entry))


def test_entries_of_a_yaml_file(cfg, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(
        "VERSION: 2\nDATASETS:\n  COCO_FORMAT:\n    a: {JSON: a.json, IMAGE_ROOT: /images}\n"
        "  VOC_FORMAT:\n    b: {ROOT: voc, SPLIT: train, CLASSES: [cat, dog], YEAR: 2007}\n"
        "  IMAGE_FOLDER:\n    c: {ROOT: images}\n"
    )
    cfg.merge_from_file(str(file))
    register_datasets(cfg)
    a, b = MetadataCatalog.get("a"), MetadataCatalog.get("b")
    assert (a.json_file, a.image_root, a.evaluator_type) == (str(tmp_path / "a.json"), "/images", "coco")
    assert (b.dirname, b.split, b.year, b.evaluator_type) == (str(tmp_path / "voc"), "train", 2007, "pascal_voc")
    assert b.thing_classes == ["cat", "dog"]
    assert DatasetCatalog["c"] == ImageFolder("c", "images")
    assert MetadataCatalog.get("c").evaluator_type == "classification"


def test_registering_again(cfg):
    register_datasets(define(cfg, x=COCO))
    register_datasets(cfg)
    with pytest.raises(InputError, match=r"DATASETS.VOC_FORMAT.x: defined differently before, as .*a.json with"):
        register_datasets(define(cfg, x=VOC))


def test_registering_an_image_folder_again(cfg):
    register_datasets(define(cfg, x=FOLDER))
    register_datasets(cfg)
    cfg.DATASETS.IMAGE_FOLDER.x.ROOT = "others"
    with pytest.raises(
        InputError, match=r"DATASETS.IMAGE_FOLDER.x: defined differently before, as the image folder .*"
    ):
        register_datasets(cfg)


@pytest.mark.parametrize("name", ["cifar10_test", "imagenet_val"])
def test_name_of_a_builtin_image_data_set(cfg, name):
    with pytest.raises(InputError, match=f"DATASETS.IMAGE_FOLDER.{name}: the name is taken"):
        register_datasets(define(cfg, **{name: FOLDER}))


def test_name_of_a_builtin_data_set(cfg):
    with pytest.raises(InputError, match=r"DATASETS.COCO_FORMAT.coco_2017_val: the name is taken"):
        register_datasets(define(cfg, coco_2017_val=COCO))


def test_unknown_data_set(cfg):
    register_datasets(define(cfg, mine_train=COCO))
    cfg.DATASETS.TEST = ("mine_tset",)
    with pytest.raises(
        InputError, match=r"DATASETS.TEST: unknown data set 'mine_tset'; .* defines mine_train. Define more"
    ):
        check_files(cfg)


def test_missing_files_of_a_builtin_data_set(cfg, tmp_path, monkeypatch):
    monkeypatch.setitem(MetadataCatalog.get("voc_2007_train").__dict__, "dirname", str(tmp_path / "VOC2007"))
    cfg.DATASETS.TRAIN = ("voc_2007_train",)
    with pytest.raises(InputError, match=f"{tmp_path}/VOC2007: not found, but DATASETS.TRAIN names 'voc_2007_train'"):
        check_files(cfg)
    check_files(cfg, train=False)
    (tmp_path / "VOC2007").mkdir()
    check_files(cfg)


def test_number_of_classes(cfg, shapes_root, caplog):
    register_datasets(define_shapes(cfg, shapes_root))
    cfg.DATASETS.TRAIN = ("coco_train",)
    cfg.MODEL.META_ARCHITECTURE = "TeacherStudent"
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 5
    message = r"^MODEL.ROI_HEADS.NUM_CLASSES: 5 found, but data set 'coco_train' has 6 classes \(disc, .*, star\); set"
    with pytest.raises(InputError, match=message):
        check_num_classes(cfg)
    check_num_classes(cfg, train=False)
    cfg.KD.STUDENT_ARCHITECTURE = "RetinaNet"
    cfg.MODEL.RETINANET.NUM_CLASSES = 6
    with caplog.at_level(logging.WARNING):
        check_num_classes(cfg)
        assert not caplog.records
        cfg.MODEL.RETINANET.NUM_CLASSES = 7
        check_num_classes(cfg)
        assert "MODEL.RETINANET.NUM_CLASSES is 7, but data set 'coco_train' has 6 classes" in caplog.text
    cfg.MODEL.META_ARCHITECTURE = "SomebodysDetector"
    check_num_classes(cfg)


def test_order_of_classes(cfg):
    register_datasets(define(cfg, a=VOC, b=VOC | {"CLASSES": ["dog", "cat"]}, c=VOC | {"CLASSES": ["cat"]}))
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("a",), ("c",)
    check_num_classes(cfg)
    cfg.DATASETS.TEST = ("b",)
    with pytest.raises(
        InputError, match=r"'b' has 2 classes \(dog, cat\), but 'a' has cat, dog: a class must have the same"
    ):
        check_num_classes(cfg)


def make_folders(root, *names):
    for name in names:
        (root / name).mkdir(parents=True)
    return {"ROOT": str(root)}


def test_classes_of_image_folders(cfg, tmp_path, caplog):
    a, b = make_folders(tmp_path / "a", "bird", "cat", "dog"), make_folders(tmp_path / "b", "bird", "dog")
    register_datasets(define(cfg, a=a, b=b))
    cfg.DATASETS.TRAIN = ("a",)
    cfg.MODEL.META_ARCHITECTURE, cfg.KD.STUDENT_ARCHITECTURE = "TeacherStudent", "ImageClassifier"
    cfg.MODEL.CLASSIFIER.NUM_CLASSES = 2
    message = r"^MODEL.CLASSIFIER.NUM_CLASSES: 2 found, but data set 'a' has 3 classes \(bird, cat, dog\); set"
    with pytest.raises(InputError, match=message):
        check_num_classes(cfg)
    cfg.MODEL.CLASSIFIER.NUM_CLASSES = 4
    with caplog.at_level(logging.WARNING):
        check_num_classes(cfg)
    assert "MODEL.CLASSIFIER.NUM_CLASSES is 4, but data set 'a' has 3 classes" in caplog.text
    cfg.DATASETS.TEST = ("b",)
    with pytest.raises(InputError, match=r"'b' has 2 classes \(bird, dog\), but 'a' has bird, cat, dog: a class must"):
        check_num_classes(cfg)


@pytest.mark.parametrize(
    ("architecture", "name", "message"),
    [
        ("ImageClassifier", "voc_2007_test", "'pascal_voc', .* ImageClassifier; classification is needed"),
        ("RetinaNet", "digits_test", "'classification', .* RetinaNet; a data set for detection is needed"),
    ],
)
def test_data_set_for_another_task(cfg, architecture, name, message):
    cfg.MODEL.META_ARCHITECTURE = architecture
    cfg.DATASETS.TEST = (name,)
    with pytest.raises(InputError, match=f"^DATASETS.TEST: the evaluator_type of '{name}' is {message}"):
        check_num_classes(cfg)


def test_number_of_training_images(cfg, shapes_root):
    with pytest.raises(InputError, match=r"^DATASETS.TRAIN: no data set is named"):
        count_training_images(cfg)
    register_datasets(define_shapes(cfg, shapes_root))
    cfg.DATASETS.TRAIN = ("coco_train", "coco_test")
    assert count_training_images(cfg) == 20
    DatasetCatalog.register("half", lambda: [x | {"annotations": []} for x in DatasetCatalog.get("coco_test")[:4]])
    cfg.DATASETS.TRAIN = ("coco_train", "half")
    assert count_training_images(cfg) == 12
    cfg.DATASETS.TRAIN = ("half",)
    with pytest.raises(
        InputError, match=r"^DATASETS.TRAIN: No valid data found in half\. DATALOADER.FILTER_EMPTY_ANNOT"
    ):
        count_training_images(cfg)
    cfg.DATASETS.TRAIN = ("coco_train", "half")
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    assert count_training_images(cfg) == 16


def test_training_images_that_lack_what_is_learned(cfg):
    DatasetCatalog.register("boxes", lambda: [{"file_name": "a.jpg", "annotations": [{"category_id": 0}]}])
    cfg.DATASETS.TRAIN, cfg.MODEL.MASK_ON = ("boxes",), True
    with pytest.raises(InputError, match=r"^a\.jpg: an annotation has no segmentation, but MODEL.MASK_ON asks"):
        count_training_images(cfg)
    cfg.MODEL.MASK_ON, cfg.MODEL.KEYPOINT_ON = False, True
    with pytest.raises(
        InputError, match=r"MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE leaves out those with fewer"
    ):
        count_training_images(cfg)


def test_registration_reads_no_file(cfg):
    register_datasets(define(cfg, a=COCO, b=VOC, c=FOLDER))
    assert {"a", "b", "c"} <= set(DatasetCatalog)
