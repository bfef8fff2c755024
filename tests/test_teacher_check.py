"""Tests the check of the teacher before training: its images, how they are read, and its messages."""

import json
import shutil

import cv2
import pytest
import torch
from children import Task, end, final_state, same, two_ranks
from classification.models import classifier_cfg
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances
from helpers import WIDE, distilled_cfg, save_teacher, tiny_cfg, train_net, with_data, write_yaml
from torch import nn

from kd_det import InputError
from kd_det.class_partition import ClassPartition
from kd_det.data import class_names, register_datasets
from kd_det.data.shapes import CLASSES
from kd_det.data.shapes_folder import write_shapes
from kd_det.engine import teacher_check
from kd_det.engine.teacher_check import (
    SUBSET,
    check_class_order,
    check_teacher,
    have_same_classes,
    least_accuracy,
    least_pixel_accuracy,
    shared_records,
    subset,
)

pytestmark = pytest.mark.usefixtures("in_process")
SIX = {"MODEL.ROI_HEADS.NUM_CLASSES": len(CLASSES)}


def named(options):
    return [part for pair in options.items() for part in pair]


class Oracle(nn.Module):
    """Knows the ground truth of a data set, and which images it has seen; `shift` is added to the classes."""

    def __init__(self, dataset, shift):
        super().__init__()
        self.records = {record["file_name"]: record for record in DatasetCatalog.get(dataset)}
        self.classes = len(class_names(dataset))
        self.shift = shift
        self.seen = []

    def forward(self, inputs):
        self.seen += inputs
        return [self.classify(x) if "label" in x else self.detect(x) for x in inputs]

    def classify(self, x):
        answer = torch.tensor((x["label"] + self.shift) % self.classes)
        return {"scores": nn.functional.one_hot(answer, self.classes).float()}

    def detect(self, x):
        things = self.records[x["file_name"]]["annotations"]
        found = Instances((x["height"], x["width"]))
        boxes = [BoxMode.convert(t["bbox"], t["bbox_mode"], BoxMode.XYXY_ABS) for t in things]
        found.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32))
        found.scores = torch.ones(len(things))
        found.pred_classes = torch.tensor([(t["category_id"] + self.shift) % self.classes for t in things])
        found.pred_masks = torch.zeros(len(things), x["height"], x["width"], dtype=torch.bool)
        return {"instances": found}


@pytest.fixture
def check_model(monkeypatch, caplog):
    """Checks a model in the place of a config's teacher; returns the messages."""
    caplog.set_level("INFO", "kd_det.engine.teacher_check")
    built = teacher_check.build_teacher

    def run(cfg, model):
        def build_teacher(cfg):
            teacher = built(cfg)
            teacher.model = model
            return teacher

        monkeypatch.setattr(teacher_check, "build_teacher", build_teacher)
        check_teacher(cfg)
        return caplog.messages

    return run


@pytest.fixture
def check(check_model):
    """Checks a teacher that knows everything; returns what it has seen and the messages."""

    def run(cfg, shift=0):
        register_datasets(cfg)
        oracle = Oracle(cfg.DATASETS.TEST[0], shift)
        return oracle.seen, check_model(cfg, oracle)

    return run


@pytest.fixture
def detector(teacher, coco_folder, tmp_path):
    """Makes the config of a run on four images in COCO's format, in VOC's, or without masks."""

    def make(kind="coco", count=2):
        cfg = with_data(distilled_cfg(teacher, ["HintHead"], {"KD.TEACHER.SANITY_CHECK": count}), coco_folder, tmp_path)
        if kind == "voc":
            write_shapes(tmp_path / "shapes", train=2, test=4)
            entry = {"ROOT": str(tmp_path / "shapes"), "SPLIT": "test", "CLASSES": list(CLASSES)}
            cfg.DATASETS.VOC_FORMAT["sanity_voc"] = CfgNode(entry)
            cfg.DATASETS.TEST = ("sanity_voc",)
            cfg.merge_from_list(named(save_teacher(tmp_path / "six", tiny_cfg(options=SIX))))
        return cfg

    return make


@pytest.fixture
def classifier(tmp_path):
    """Makes the config of a run on digits."""

    def make(count):
        size = {"MODEL.CLASSIFIER.NUM_CLASSES": 10, "INPUT.CLASSIFICATION.SIZE": 8, "SOLVER.MAX_ITER": 2}
        options = save_teacher(tmp_path / "teacher", classifier_cfg(options=size))
        options |= {"MODEL.META_ARCHITECTURE": "TeacherStudent", "KD.STUDENT_ARCHITECTURE": "ImageClassifier"}
        options |= {"KD.HEADS": ["HintHead"], "KD.TEACHER.SANITY_CHECK": count, "SEED": 3}
        cfg = classifier_cfg(options=options | size)
        cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("digits_train",), ("digits_test",)
        cfg.OUTPUT_DIR = str(tmp_path)
        return cfg

    return make


# ---- What is found ----
@pytest.mark.parametrize("kind", ["coco", "voc"])
def test_perfect_detector_passes(detector, check, kind):
    """All is found in two of four images, and nothing counts that is in the others."""
    cfg = detector(kind)
    seen, messages = check(cfg)
    assert len(seen) == 2
    assert messages == [
        f"Checking the teacher on 2 images of {cfg.DATASETS.TEST[0]}.",
        "The teacher's box AP on these images: 100.00",
    ]
    assert SUBSET not in DatasetCatalog
    assert SUBSET not in MetadataCatalog


def test_reordered_classes_cause_a_warning(detector, check):
    _, messages = check(detector(), shift=1)
    assert messages[1] == "The teacher's box AP on these images: 0.00"
    assert "its box AP is 0.00, below 1.00. Likely causes: KD.TEACHER.WEIGHTS" in messages[2]
    assert messages[2].endswith("its classes are in another order.")


@pytest.mark.parametrize(("shift", "accuracy", "warnings"), [(0, "100.00", 0), (1, "0.00", 1)])
def test_accuracy_of_a_classifier(classifier, check, shift, accuracy, warnings):
    seen, messages = check(classifier(40), shift)
    assert len({x["file_name"] for x in seen}) == 40
    assert messages[1] == f"The teacher's top-1 accuracy on these images: {accuracy}"
    assert len(messages) == 2 + warnings


def test_more_images_than_available(detector, check):
    assert len(check(detector(count=99))[0]) == 4


def test_images_are_read_by_the_teachers_config(detector, check, tmp_path):
    cfg = detector()
    own = tiny_cfg(options={"INPUT.FORMAT": "RGB", "INPUT.MIN_SIZE_TEST": 64})
    cfg.merge_from_list(named(save_teacher(tmp_path / "rgb", own)))
    cfg.INPUT.MIN_SIZE_TEST = 32
    for x in check(cfg)[0]:
        assert torch.equal(x["image"], torch.from_numpy(cv2.imread(x["file_name"])).flip(2).permute(2, 0, 1))


def test_least_accuracy_is_above_chance():
    """Of ten classes and 100 images a guess has 10 percent and a deviation of sqrt(0.1 * 0.9 / 100) = 3 percent."""
    assert least_accuracy(10, 100) == pytest.approx(16)


# ---- In a run ----
def test_untrained_teacher_causes_a_warning_and_changes_nothing(classifier, tmp_path):
    """It is told, and the student learns what it learns without the check."""
    config = write_yaml(tmp_path / "config.yaml", classifier(50))
    for name, count in (("with", 50), ("without", 0)):
        train_net("--config-file", config, "OUTPUT_DIR", tmp_path / name, "KD.TEACHER.SANITY_CHECK", count)
    logs = [(tmp_path / name / "log.txt").read_text() for name in ("with", "without")]
    told = ["the teacher has learned next to nothing about digits_test: its top-1 accuracy is" in log for log in logs]
    assert told == [True, False]
    assert same(final_state(tmp_path / "with"), final_state(tmp_path / "without"))


def test_two_ranks_and_one_image(classifier, tmp_path):
    """One of them has nothing to do, and goes on."""
    task = Task(write_yaml(tmp_path / "config.yaml", classifier(1)), tmp_path)
    assert end(*[task.start("two", prepare=(rank,)) for rank in two_ranks()]) == [0, 0]
    logs = [(tmp_path / "two" / name).read_text() for name in ("log.txt", "log.txt.rank1")]
    assert ["The teacher's top-1 accuracy" in log for log in logs] == [True, False]


def test_nothing_is_checked_without_a_teacher(detector):
    cfg = detector()
    cfg.KD.HEADS, cfg.KD.TEACHER.CONFIG_FILE = [], ""
    check_teacher(cfg)


# ---- Mistakes ----
def test_negative_number_is_refused(detector):
    with pytest.raises(InputError, match=r"^KD.TEACHER.SANITY_CHECK: must be 0 \(no check\) or .*, got -1\.$"):
        check_teacher(detector(count=-1))


def test_missing_test_set_is_refused(detector):
    cfg = detector()
    cfg.DATASETS.TEST = ()
    with pytest.raises(InputError, match=r"^KD.TEACHER.SANITY_CHECK: got 2, but DATASETS.TEST names no data set\.$"):
        check_teacher(cfg)


def test_teacher_with_another_number_of_classes_is_refused(detector, tmp_path):
    cfg = detector()
    cfg.merge_from_list(named(save_teacher(tmp_path / "six", tiny_cfg(options=SIX))))
    register_datasets(cfg)
    with pytest.raises(InputError, match=r"the teacher knows 6 classes and '.*' has 3, so it cannot be evaluated"):
        check_teacher(cfg)


# ---- The order of classes ----
def with_classes(folder, names, name, kind="COCO_FORMAT"):
    """A data set in a config, of the images of a folder, whose classes have these names."""
    if kind == "VOC_FORMAT":
        return CfgNode({name: {"ROOT": "/no", "SPLIT": "train", "CLASSES": names}})
    data = json.loads((folder / "instances.json").read_text())
    for category, class_name in zip(data["categories"], names, strict=True):
        category["name"] = class_name
    (folder / f"{name}.json").write_text(json.dumps(data))
    return CfgNode({name: {"JSON": str(folder / f"{name}.json"), "IMAGE_ROOT": str(folder / "images")}})


@pytest.fixture
def compare(coco_folder, tmp_path, caplog):
    """Checks the classes of a teacher whose config names a data set; returns the warnings."""
    folder = shutil.copytree(coco_folder, tmp_path / "data")

    def compare(names, *, signals=("roi_logits",), kind="COCO_FORMAT", damage=False, name="theirs"):
        cfg = tiny_cfg()
        cfg.DATASETS.TRAIN, cfg.DATASETS[kind] = (name,), with_classes(folder, names, name, kind)
        if damage:
            (folder / f"{name}.json").write_text("{")
        teacher = save_teacher(tmp_path / "teacher", cfg)
        own = with_data(distilled_cfg(teacher, []), coco_folder, tmp_path, name="ours")
        register_datasets(own)
        head = nn.Identity()
        head.signals = signals
        check_class_order(own, {"AHead": head})
        return [x.getMessage() for x in caplog.records if x.levelname == "WARNING"]

    return compare


@pytest.mark.parametrize("name", ["theirs", "ours"])
@pytest.mark.parametrize("kind", ["COCO_FORMAT", "VOC_FORMAT"])
def test_same_class_names_in_another_order_are_refused(compare, kind, name):
    told = r"list the same classes in another order than the student's, 'bar' for 'square', but AHead compares them"
    with pytest.raises(InputError, match=rf"^KD\.TEACHER\.CONFIG_FILE: the data sets of \S+teacher.yaml {told}"):
        compare(["bar", "triangle", "square"], kind=kind, name=name)


def test_other_class_names_cause_a_warning(compare):
    (warning,) = compare(["square", "Triangle", "bar"])
    assert "name other classes than the student's, 'Triangle' for 'triangle', but AHead compares" in warning


@pytest.mark.parametrize(
    "options",
    [{"signals": ("p2", "roi_features", "rpn_logits")}, {"damage": True}],
    ids=["features alone", "files that cannot be read"],
)
def test_names_are_not_compared_without_predictions_or_files(compare, options):
    assert compare(["bar", "triangle", "square"], **options) == []


def test_equal_class_names_pass(compare):
    assert compare(["square", "triangle", "bar"]) == []


def test_run_with_reordered_classes_is_refused(teacher, coco_folder, tmp_path):
    folder = shutil.copytree(coco_folder, tmp_path / "data")
    cfg = tiny_cfg(options=WIDE)
    cfg.DATASETS.TRAIN = ("theirs",)
    cfg.DATASETS.COCO_FORMAT = with_classes(folder, ["bar", "triangle", "square"], "theirs")
    options = teacher | {"KD.TEACHER.CONFIG_FILE": write_yaml(tmp_path / "teacher.yaml", cfg)}
    cfg = with_data(distilled_cfg(options, ["SoftTargetHead"]), coco_folder, tmp_path / "output")
    with pytest.raises(SystemExit, match=r"^error: KD\.TEACHER\.CONFIG_FILE: .* in another order"):
        train_net("--config-file", write_yaml(tmp_path / "config.yaml", cfg))


@pytest.fixture
def pairs(tmp_path):
    """Registers two data sets, "a" and "b", with other names of pixels' classes and of keypoints; checks a head."""

    def make(kind, names, signal, family):
        for name, values in names.items():
            DatasetCatalog.register(name, list)
            MetadataCatalog.get(name).set(**{kind: values})
        cfg = tiny_cfg(family)
        cfg.DATASETS.TRAIN = ("b",)
        own = distilled_cfg(save_teacher(tmp_path / "teacher", cfg), [], family=family)
        own.DATASETS.TRAIN = ("a",)
        head = nn.Identity()
        head.signals = (signal,)
        return own, {"AHead": head}

    yield make
    for name in {"a", "b"}.intersection(DatasetCatalog):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.mark.parametrize(
    ("kind", "signal", "family", "named"),
    [
        ("stuff_classes", "sem_seg_logits", "semantic", "classes"),
        ("keypoint_names", "keypoint_logits", "keypoint", "keypoints"),
    ],
)
def test_names_of_pixels_and_keypoints_in_another_order(pairs, kind, signal, family, named):
    cfg, heads = pairs(kind, {"a": ["x", "y"], "b": ["y", "x"]}, signal, family)
    with pytest.raises(InputError, match=f"list the same {named} in another order than the student's, 'y' for 'x', "):
        check_class_order(cfg, heads)
    heads["AHead"].signals = ("p2", "roi_logits")  # Of objects' classes no names are known.
    check_class_order(cfg, heads)


def test_keypoints_with_other_names_cause_a_warning(pairs, caplog):
    check_class_order(*pairs("keypoint_names", {"a": ["x", "y"], "b": ["x", "z"]}, "keypoint_logits", "keypoint"))
    assert "name other keypoints than the student's, 'z' for 'y', but AHead compares them one by one" in caplog.text


@pytest.mark.parametrize(("theirs", "same"), [(["x", "y"], True), (["y", "x"], False), ([], False)])
def test_inherited_segmentation_needs_the_same_classes_of_pixels(pairs, theirs, same):
    cfg, _ = pairs("stuff_classes", {"a": ["x", "y"], "b": theirs}, "sem_seg_logits", "semantic")
    assert have_same_classes(cfg) == same


def test_detector_is_checked_on_the_objects_of_a_panoptic_data_set(detector, check):
    cfg = detector()
    register_datasets(cfg)
    metadata = MetadataCatalog.get(cfg.DATASETS.TEST[0])
    values = metadata.as_dict() | {"evaluator_type": "coco_panoptic_seg"}
    MetadataCatalog.pop(metadata.name)
    MetadataCatalog.get(values.pop("name")).set(**values)
    assert check(cfg)[1][1] == "The teacher's box AP on these images: 100.00"


def test_data_set_that_does_not_fit_the_teacher_is_refused(detector, tmp_path):
    cfg = detector()
    cfg.merge_from_list(named(save_teacher(tmp_path / "semantic", tiny_cfg("semantic"))))
    register_datasets(cfg)
    with pytest.raises(
        InputError, match=r"evaluator_type of '.*' is 'coco', and the teacher, SemanticSegmentor, .*; set it to 0\.$"
    ):
        check_teacher(cfg)


def test_least_accuracy_of_pixels():
    """With four classes in the images, 25 percent is chance, and a tenth of the other 75 is asked for beyond it."""
    accuracies = {"mACC": 50.0, "ACC-a": 1.0, "ACC-b": 0.0, "ACC-c": 9.0, "ACC-d": 9.0, "ACC-e": float("nan")}
    assert least_pixel_accuracy(accuracies) == pytest.approx(32.5)


# ---- A teacher of other classes ----
class Renumbered(nn.Module):
    """Predicts as an oracle does, but has the indices of other classes; what it does not know it takes for `wrong`."""

    def __init__(self, oracle, names, known, wrong):
        super().__init__()
        self.oracle = oracle
        self.table = torch.tensor([known.index(name) if name in known else known.index(wrong) for name in names])
        self.known = known

    def forward(self, inputs):
        outputs = self.oracle(inputs)
        for x in outputs:
            if "scores" in x:
                x["scores"] = nn.functional.one_hot(self.table[x["scores"].argmax()], len(self.known)).float()
            else:
                x["instances"].pred_classes = self.table[x["instances"].pred_classes]
        return outputs


@pytest.mark.parametrize("kind", ["coco", "voc"])
def test_detector_of_other_classes_is_evaluated_on_those_it_shares(detector, check_model, kind, tmp_path):
    """It does not know the first class, whose objects it takes for something that the data set does not have."""
    cfg = detector(kind, count=4)
    register_datasets(cfg)
    names = class_names(cfg.DATASETS.TEST[0])
    known = [names[-1], "another", *names[1:-1], "one more"]
    teacher = tiny_cfg(options={"MODEL.ROI_HEADS.NUM_CLASSES": len(known)})
    cfg.merge_from_list(named(save_teacher(tmp_path / "other", teacher) | {"KD.TEACHER.CLASSES": known}))
    model = Renumbered(Oracle(cfg.DATASETS.TEST[0], 0), names, known, "another")
    assert check_model(cfg, model)[1] == "The teacher's box AP on these images: 100.00"


def test_classifier_of_other_classes_is_evaluated_on_those_it_shares(classifier, check_model, tmp_path):
    """It knows the digits from 9 to 5, and 40 images of these are chosen."""
    cfg, known = classifier(40), list("98765")
    teacher = classifier_cfg(options={"MODEL.CLASSIFIER.NUM_CLASSES": 5, "INPUT.CLASSIFICATION.SIZE": 8})
    cfg.merge_from_list(named(save_teacher(tmp_path / "five", teacher) | {"KD.TEACHER.CLASSES": known}))
    register_datasets(cfg)
    oracle = Oracle("digits_test", 0)
    messages = check_model(cfg, Renumbered(oracle, list("0123456789"), known, "5"))
    assert messages[1] == "The teacher's top-1 accuracy on these images: 100.00"
    assert {x["label"] for x in oracle.seen} == {5, 6, 7, 8, 9}
    assert len(oracle.seen) == 40


def test_shared_records():
    classes = ClassPartition(("a", "b"), ("b", "c"))
    first = {"annotations": [{"category_id": 0}, {"category_id": 1}]}
    kept = shared_records([first, {"annotations": [{"category_id": 0}]}, {"annotations": []}], classes)
    assert kept == [{"annotations": [{"category_id": 1}]}]
    assert shared_records([{"label": 0}, {"label": 1}], classes) == [{"label": 1}]


def test_teacher_that_shares_no_class_is_refused(detector, tmp_path):
    cfg = detector()
    register_datasets(cfg)
    teacher = tiny_cfg(options={"MODEL.ROI_HEADS.NUM_CLASSES": 1})
    cfg.merge_from_list(named(save_teacher(tmp_path / "one", teacher) | {"KD.TEACHER.CLASSES": ["another"]}))
    with pytest.raises(InputError, match=r"the teacher knows 1 classes and '.*' has 3, so it cannot be evaluated"):
        check_teacher(cfg)


def test_images_without_a_shared_class_are_refused(detector):
    cfg = detector()
    register_datasets(cfg)
    dataset = cfg.DATASETS.TEST[0]
    classes = ClassPartition((*class_names(dataset), "rare"), ("rare",))
    with pytest.raises(InputError, match="has no image of the classes that student and teacher share; set it to 0"):
        next(subset.__wrapped__(dataset, 2, cfg.OUTPUT_DIR, "coco", classes))
