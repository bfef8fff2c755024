"""What a training or its evaluation would meet late is told when the run is set up."""

import json
import logging

import pytest
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from helpers import CLASSES, parse, tiny_cfg, with_data, write_coco_folder, write_yaml

from kd_det.data import DetectionMapper, check_annotations, register_datasets
from kd_det.data.datasets import load_training_images
from kd_det.data.keypoints import mirrored_pairs
from kd_det.engine import setup
from kd_det.engine.evaluation import check_evaluation
from kd_det.errors import InputError

from .coco_mutations import forget, write

pytestmark = pytest.mark.usefixtures("in_process", "no_log")
KEYPOINTS = {
    "MODEL.MASK_ON": False,
    "MODEL.KEYPOINT_ON": True,
    "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS": 3,
    "TEST.KEYPOINT_OKS_SIGMAS": [0.1, 0.1, 0.1],
}


@pytest.fixture
def no_log(monkeypatch):
    """Nothing is logged into the output folder, which takes most of the time of setting a run up."""
    for name in ("default_setup", "start_logging"):
        monkeypatch.setitem(setup.__globals__, name, lambda *_, **__: None)


@pytest.fixture
def folder(tmp_path):
    return write_coco_folder(tmp_path / "data")


@pytest.fixture
def set_up(folder, tmp_path):
    """Sets a run up on the data set as a function changes it, or as it is; gives its config."""
    names = []

    def set_up(change=lambda data: None, options=None, *, key="", **entry):
        data = json.loads((folder / "instances.json").read_text())
        change(data)
        write(folder / "instances.json", data)
        names.append(f"checked{len(names)}")
        cfg = with_data(tiny_cfg(options=options), folder, tmp_path / "output", names[-1])
        cfg.DATASETS.COCO_FORMAT[names[-1]] |= CfgNode(entry)
        if key:  # The other one is a data set without faults.
            whole = write_coco_folder(tmp_path / f"whole{len(names)}")
            names.append(f"whole{len(names)}")
            cfg.DATASETS.COCO_FORMAT[names[-1]] = CfgNode(
                {"JSON": str(whole / "instances.json"), "IMAGE_ROOT": str(whole / "images")}
            )
            cfg.DATASETS["TEST" if key == "TRAIN" else "TRAIN"] = (names[-1],)
        return setup(parse("--config-file", write_yaml(tmp_path / "config.yaml", cfg)))

    yield set_up
    for name in names:
        forget(name)


def set_mask(mask):
    return lambda data: data["annotations"][3].update(segmentation=mask)


def crowds(data):
    for annotation in data["annotations"]:
        annotation["iscrowd"] = 1


# ---- Masks ----
@pytest.mark.parametrize("key", ["TRAIN", "TEST"])
@pytest.mark.parametrize("mask", [None, []])
def test_masks_that_are_missing(set_up, key, mask):
    with pytest.raises(
        InputError, match=r"instances.json: 1 of 8 objects have no segmentation, the first is annotations\[3\], but"
    ):
        set_up(set_mask(mask), key=key)
    set_up(options={"MODEL.MASK_ON": False}, key=key)


def test_rle_among_polygons(set_up):
    change = set_mask({"size": [64, 96], "counts": [10, 20, 6114]})
    with pytest.raises(
        InputError,
        match=r"^INPUT.MASK_FORMAT: 'polygon' found, but 1 of 8 objects of .*annotations\[3\]; set INPUT",
    ):
        set_up(change)
    cfg = set_up(change, {"INPUT.MASK_FORMAT": "bitmask"})
    instances = [DetectionMapper(cfg, is_train=True)(record)["instances"] for record in load_training_images(cfg)]
    assert sum(map(len, instances)) == 8


def test_rle_in_a_test_set(set_up):
    set_up(set_mask({"size": [64, 96], "counts": [10, 20, 6114]}), key="TEST")


@pytest.mark.parametrize(("masks", "expected"), [(True, [1, 2, 2]), (False, [2, 2, 2, 2])])
def test_polygons_without_area(set_up, masks, expected, caplog):
    """They are no masks; their boxes are trained on unless masks are, too. An image without other objects is empty."""

    def change(data):
        for i in (0, 2, 3):
            data["annotations"][i]["segmentation"] = [[4, 6, 28, 30]]

    cfg = set_up(change, {"MODEL.MASK_ON": masks})
    assert [len(record["annotations"]) for record in load_training_images(cfg)] == expected
    assert ("3 objects without a polygon of three points are not trained on" in caplog.text) == masks


# ---- Objects and classes ----
def test_crowds_alone(set_up, caplog):
    with pytest.raises(
        InputError, match=r"^DATASETS.TRAIN: 'checked0' has no objects: all 8 annotations have iscrowd 1 or unknown"
    ):
        set_up(crowds)
    with caplog.at_level(logging.WARNING):
        set_up(crowds, key="TEST")
    assert "DATASETS.TEST: 'checked1' has no objects: all 8 annotations have iscrowd 1" in caplog.text
    assert "its AP will be nan" in caplog.text


def test_two_classes_of_one_name(set_up):
    set_up(
        lambda data: data["categories"][1].update(name="square"),
        {"TEST.BEST_METRIC": "bbox/AP-square (class 2)"},
    )


def test_fewer_classes_than_the_model(set_up, caplog):
    set_up(options={"MODEL.ROI_HEADS.NUM_CLASSES": 80})
    assert "MODEL.ROI_HEADS.NUM_CLASSES is 80, but data set 'checked0' has 3 classes" in caplog.text


# ---- The evaluation ----
@pytest.mark.parametrize("kind", ["lvis", "coco_panoptic_seg", "sem_seg", "cityscapes_instance", None])
def test_a_data_set_that_cannot_be_evaluated(cfg, set_up, tmp_path, kind):
    cfg = set_up()
    cfg.defrost()
    name = f"theirs_{kind}"
    DatasetCatalog.register(name, list)
    if kind:
        MetadataCatalog.get(name).evaluator_type = kind
    cfg.DATASETS.TEST = (name,)
    with pytest.raises(
        InputError,
        match=f"^DATASETS.TEST: {name} cannot be evaluated: its evaluator_type is {kind!r}; allowed are",
    ):
        setup(parse("--config-file", write_yaml(tmp_path / "config.yaml", cfg)))
    forget(name)


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "has no images"),
        (
            [{"file_name": "a.png", "annotations": [{"category_id": 2}]}],
            "has an object of category_id 2 in a.png; its 2 c",
        ),
    ],
)
def test_a_data_set_of_a_plugin_that_cannot_be_loaded(cfg, records, message):
    DatasetCatalog.register("theirs", lambda: records)
    MetadataCatalog.get("theirs").thing_classes = ["cat", "dog"]
    cfg.DATASETS.TEST = ("theirs",)
    try:
        with pytest.raises(InputError, match=f"^DATASETS.TEST: 'theirs' {message}"):
            check_annotations(cfg)
    finally:
        forget("theirs")


def test_voc_needs_classes(cfg):
    cfg.DATASETS.VOC_FORMAT["x"] = CfgNode({"ROOT": "x", "SPLIT": "test", "CLASSES": ["cat"]})
    cfg.DATASETS.TEST, cfg.MODEL.META_ARCHITECTURE = ("x",), "ProposalNetwork"
    register_datasets(cfg)
    with pytest.raises(InputError, match=r"^DATASETS.TEST: x cannot be evaluated: ProposalNetwork predicts no classes"):
        check_evaluation(cfg)


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        (["bbox"], r"each must be \[task, metric, value, tolerance\], got \['bbox'\]"),
        (["bbox", "AP", "high", 1], "each must be"),
        (["bbox", "mAP", 40, 1], "got 'bbox/mAP'; the evaluation gives bbox/AP, "),
    ],
)
def test_results_that_nobody_can_expect(set_up, expected, message):
    with pytest.raises(InputError, match=f"^TEST.EXPECTED_RESULTS: {message}"):
        set_up(options={"TEST.EXPECTED_RESULTS": [expected]})


def test_expected_results(set_up):
    assert set_up(options={"TEST.EXPECTED_RESULTS": [["bbox", "AP50", 40.0, 1.5]]}).TEST.EXPECTED_RESULTS


def test_a_test_class_without_images(cfg, tmp_path):
    for path in ("train/cat/1.png", "train/dog/1.png", "test/cat/1.png"):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).touch()
    (tmp_path / "test/dog").mkdir()
    for split in ("train", "test"):
        cfg.DATASETS.IMAGE_FOLDER[split] = CfgNode({"ROOT": str(tmp_path / split)})
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("train",), ("test",)
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.CLASSIFIER.NUM_CLASSES = "ImageClassifier", 2
    with pytest.raises(InputError, match=r"test: Found no valid file for the classes dog"):
        setup(parse("--config-file", write_yaml(tmp_path / "config.yaml", cfg)))


@pytest.mark.parametrize(
    ("metric", "options"),
    [
        ("bbox/AP", {}),
        ("bbox/APl", {}),
        ("segm/AP75", {}),
        ("bbox/AP-triangle", {}),
        ("ema/segm/AP", {"SOLVER.EMA_DECAY": 0.9}),
        ("keypoints/AP", KEYPOINTS),
        ("bbox/AP", {"MODEL.META_ARCHITECTURE": "RetinaNet", "MODEL.RETINANET.NUM_CLASSES": 3}),
        ("box_proposals/ARs@1000", {"MODEL.META_ARCHITECTURE": "ProposalNetwork"}),
    ],
)
def test_best_metric(set_up, metric, options):
    set_up(name_keypoints if options is KEYPOINTS else lambda data: None, options | {"TEST.BEST_METRIC": metric})


@pytest.mark.parametrize(
    ("metric", "options"),
    [
        ("bbox/mAP", {}),
        ("AP", {}),
        ("bbox/AP-circle", {}),
        ("segm/AP", {"MODEL.MASK_ON": False}),
        ("segm/AP", {"MODEL.META_ARCHITECTURE": "RetinaNet", "MODEL.RETINANET.NUM_CLASSES": 3}),
        ("keypoints/AP", {}),
        ("ema/bbox/AP", {}),
        ("checked0/bbox/AP", {}),
        ("classification/top1", {}),
        ("peer_2/bbox/AP", {}),
    ],
)
def test_a_best_metric_that_nobody_measures(set_up, metric, options):
    message = rf"^TEST.BEST_METRIC: got '{metric}'; the evaluation gives bbox/AP, bbox/AP50, .*AP-square"
    with pytest.raises(InputError, match=message):
        set_up(options=options | {"TEST.BEST_METRIC": metric})


def test_best_metric_of_two_test_sets(set_up, tmp_path):
    cfg = set_up(key="TRAIN")
    cfg.defrost()
    cfg.DATASETS.TEST = (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)
    cfg.TEST.BEST_METRIC = "checked0/bbox/AP"
    setup(parse("--config-file", write_yaml(tmp_path / "config.yaml", cfg)))
    cfg.TEST.BEST_METRIC = "bbox/AP"
    with pytest.raises(InputError, match=r"got 'bbox/AP'; the evaluation gives checked0/bbox/AP, .* \(36 in all\)\.$"):
        setup(parse("--config-file", write_yaml(tmp_path / "config.yaml", cfg)))


# ---- Keypoints ----
def name_keypoints(data, names=("nose", "left_eye", "right_eye")):
    for category in data["categories"]:
        category["keypoints"] = list(names)
    for annotation in data["annotations"][1:]:  # The first object has none.
        annotation["keypoints"] = [10, 10, 2, 12.5, 12, 1, 0, 0, 0]


def test_keypoints(set_up):
    cfg = set_up(name_keypoints, KEYPOINTS)
    (name,) = cfg.DATASETS.TRAIN
    metadata = MetadataCatalog.get(name)
    assert metadata.keypoint_names == ["nose", "left_eye", "right_eye"]
    assert metadata.keypoint_flip_map == [("left_eye", "right_eye")]
    mapper = DetectionMapper(cfg, is_train=True)
    assert mapper.keypoint_hflip_indices == [0, 2, 1]
    visible = [
        (mapper(record)["instances"].gt_keypoints.tensor[:, :, 2] > 0).sum() for record in load_training_images(cfg)
    ]
    assert visible == [2, 4, 4, 4]


def test_named_flip_pairs(set_up):
    cfg = set_up(lambda data: name_keypoints(data, ("a", "b", "c")), KEYPOINTS, FLIP_PAIRS=[["a", "c"]])
    assert DetectionMapper(cfg, is_train=True).keypoint_hflip_indices == [2, 1, 0]
    with pytest.raises(InputError, match=r"^DATASETS.COCO_FORMAT.checked1.FLIP_PAIRS: 'd' is not a keypoint of "):
        set_up(options=KEYPOINTS, FLIP_PAIRS=[["a", "d"]])


def test_the_training_data_of_an_evaluation_need_not_be_there(set_up):
    cfg = set_up(name_keypoints, KEYPOINTS)
    cfg.defrost()
    cfg.DATASETS.TRAIN = ("elsewhere",)
    assert not DetectionMapper(cfg, is_train=False).use_keypoint


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (
            lambda data: None,
            {},
            "^DATASETS.TRAIN: data set 'checked0' names no keypoints, which MODEL.KEYPOINT",
        ),
        (
            lambda data: name_keypoints(data) or data["categories"][0].update(keypoints=["a", "b", "c"]),
            {},
            r"instances.json: its categories have different keypoints \(a, b, c; nose, left_eye, right_eye\)",
        ),
        (
            name_keypoints,
            {"MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS": 17},
            "^MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS: 17 found, but data set 'checked0' has 3 keypoints",
        ),
        (
            name_keypoints,
            {"TEST.KEYPOINT_OKS_SIGMAS": []},
            "^TEST.KEYPOINT_OKS_SIGMAS: 0 values found; .* 3 keypoints",
        ),
        (
            lambda data: name_keypoints(data) or data["annotations"][2].update(keypoints=[1, 2, 2]),
            {},
            "annotation 3 has 3 numbers as keypoints; its category 'square' has 3 keypoints of three numbers each",
        ),
    ],
)
def test_wrong_keypoints(set_up, change, options, message):
    with pytest.raises(InputError, match=message):
        set_up(change, KEYPOINTS | options)


def test_other_keypoints_in_the_test_set(set_up):
    with pytest.raises(InputError, match=r"^DATASETS.TEST: data set 'whole1' names no keypoints"):
        set_up(name_keypoints, KEYPOINTS, key="TRAIN")


def test_keypoints_that_keep_their_names(set_up, caplog):
    set_up(lambda data: name_keypoints(data, CLASSES), KEYPOINTS)
    assert "'checked0' has no FLIP_PAIRS; its keypoints keep their names in mirrored images" in caplog.text


@pytest.mark.parametrize(
    ("names", "pairs"),
    [
        (["nose", "left_eye", "right_eye"], [("left_eye", "right_eye")]),
        (["Left-Hip", "Right-Hip"], [("Left-Hip", "Right-Hip")]),
        (["eye.R", "eye.L", "R"], [("eye.R", "eye.L")]),
        (["l_ear", "r_ear", "ear"], [("l_ear", "r_ear")]),
        (["leftKnee", "rightKnee"], [("leftKnee", "rightKnee")]),
        (["LEFT EYE", "RIGHT EYE"], [("LEFT EYE", "RIGHT EYE")]),
        (["bright", "bleft", "copyright"], []),
    ],
)
def test_mirrored_pairs(names, pairs):
    assert list(mirrored_pairs(names)) == pairs


def test_warnings_are_in_the_log_file(set_up, monkeypatch, tmp_path):
    monkeypatch.undo()
    set_up(lambda data: data["annotations"][0].update(area="x"))
    log = (tmp_path / "output" / "log.txt").read_text()
    assert log.count("instances.json: area of 1 of the annotations (first: annotations[0]) is no possible area") == 1
