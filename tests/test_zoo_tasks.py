"""Distils the model zoo's configs for keypoints, panoptic and semantic segmentation, on tiny data by tiny models."""

import json
import logging
import sys

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.modeling import build_model
from detectron2.structures import Boxes, BoxMode, Instances
from helpers import attached, build, parse, step, train_net

from kd_det import InputError, add_kd_config
from kd_det.analysis.compare_detectors import evaluate
from kd_det.config import merge_file
from kd_det.config_files import find_config
from kd_det.data import check_annotations, check_num_classes
from kd_det.data.sem_seg_evaluator import SegmentationEvaluator
from kd_det.engine import setup
from kd_det.engine.evaluation import METRICS, build_evaluator, check_evaluation, metric_names
from kd_det.engine.loaders import build_train_loader
from kd_det.engine.run_config import make_config

KEYPOINT = "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml"
PANOPTIC = "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml"
SEMANTIC = "Misc/semantic_R_50_FPN_1x.yaml"
SMALL = {
    "MODEL.WEIGHTS": "",
    "MODEL.DEVICE": "cpu",
    "MODEL.RESNETS.WIDTH_PER_GROUP": 4,
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 8,
    "MODEL.FPN.OUT_CHANNELS": 16,
    "MODEL.ROI_HEADS.NUM_CLASSES": 1,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 24,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 8,
    "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS": 2,
    "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS": [8],
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 3,
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 32,
    "TEST.KEYPOINT_OKS_SIGMAS": [0.1, 0.1],
}
DATA = "people_on_lawns"
KINDS = {KEYPOINT: "coco", PANOPTIC: "coco_panoptic_seg", SEMANTIC: "sem_seg"}
pytestmark = pytest.mark.usefixtures("in_process")


def flat(options):
    return [part for pair in options.items() for part in pair]


@pytest.fixture
def people(tmp_path):
    """Registers two images of an object with a mask and two keypoints, on a ground of two classes.

    Returns a function that gives the data set the evaluator of a config, and the options of a run on it.
    """
    box, segments = [8, 8, 40, 40], np.ones((64, 96), np.uint8)
    segments[8:48, 8:48], segments[:, 72:], segments[56:] = 0, 2, 255
    cv2.imwrite(str(tmp_path / "segments.png"), segments)
    annotation = {"bbox": box, "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0, "iscrowd": 0}
    annotation |= {"segmentation": [[8, 8, 48, 8, 48, 48, 8, 48]], "keypoints": [20, 20, 2, 30, 30, 2]}
    record = {"sem_seg_file_name": str(tmp_path / "segments.png"), "height": 64, "width": 96}
    records = [record | {"image_id": i, "file_name": str(tmp_path / f"{i}.png")} for i in (1, 2)]
    for x in records:
        cv2.imwrite(x["file_name"], np.random.default_rng(0).integers(0, 255, (64, 96, 3), np.uint8))

    def load():
        # A data set for semantic segmentation alone has no objects.
        objects = MetadataCatalog.get(DATA).evaluator_type != "sem_seg"
        return [x | ({"annotations": [annotation]} if objects else {}) for x in records]

    DatasetCatalog.register(DATA, load)
    MetadataCatalog.get(DATA).set(
        thing_classes=["person"],
        stuff_classes=["things", "lawn", "blue-sky"],
        keypoint_names=["head", "foot"],
        keypoint_flip_map=[],
        ignore_label=255,
        thing_dataset_id_to_contiguous_id={1: 0},
        stuff_dataset_id_to_contiguous_id={0: 0, 2: 1, 3: 2},
    )

    def of(config, **changes):
        MetadataCatalog.get(DATA).evaluator_type = KINDS[config]
        options = SMALL | {"DATALOADER.NUM_WORKERS": 0, "SEED": 1}
        options |= {"DATASETS.TRAIN": f"('{DATA}',)", "DATASETS.TEST": f"('{DATA}',)", "TEST.AUG.ENABLED": False}
        options |= {"SOLVER.MAX_ITER": 1, "SOLVER.IMS_PER_BATCH": 2, "INPUT.MIN_SIZE_TRAIN": "(64,)"}
        options |= {"INPUT.MIN_SIZE_TEST": 64, "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0}
        options |= {"KD.TEACHER.OPTS": [*flat(SMALL), "INPUT.MIN_SIZE_TEST", 64]}
        return options | {"OUTPUT_DIR": tmp_path / "output"} | changes

    return of


@pytest.fixture
def twin(tmp_path):
    """Writes the weights of a student's twin, its teacher, and returns the arguments that name it."""

    def make(config):
        cfg = get_cfg()
        merge_file(cfg, find_config(config))
        cfg.merge_from_list(flat(SMALL))
        torch.save(build_model(cfg).state_dict(), tmp_path / "twin.pth")
        return ["--teacher", config, "--teacher-weights", tmp_path / "twin.pth"]

    return make


@pytest.mark.parametrize(
    ("config", "sources", "levels"),
    [
        (KEYPOINT, ["roi"], ["p2", "p3", "p4", "p5", "p6"]),
        (PANOPTIC, ["roi"], ["p2", "p3", "p4", "p5", "p6"]),
        (SEMANTIC, ["sem_seg"], ["p2", "p3", "p4", "p5"]),
    ],
)
def test_heads_compare_what_the_models_have(config, sources, levels):
    arguments = ["--teacher", "t.yaml", "--kd-heads", "ReviewKDHead,FactorTransferHead,SoftTargetHead"]
    cfg = make_config(parse("--config-file", config, *arguments))
    assert sources == cfg.KD.SOFT_TARGET.SOURCES
    assert levels == cfg.KD.REVIEW.IN_FEATURES
    assert (["roi_features"] if "roi" in sources else levels) == cfg.KD.FACTOR_TRANSFER.IN_FEATURES


@pytest.mark.parametrize(
    ("config", "sources", "own"),
    [
        (KEYPOINT, ["roi", "keypoint"], "loss_keypoint"),
        (PANOPTIC, ["roi", "mask", "sem_seg"], "loss_sem_seg"),
        (SEMANTIC, ["sem_seg"], "loss_sem_seg"),
    ],
)
def test_zoo_configs_take_a_step(people, twin, config, sources, own):
    """The twin of the student, with other weights, is the teacher."""
    options = people(config, **{"KD.SOFT_TARGET.SOURCES": sources})
    heads = ["--kd-heads", "HintHead,SoftTargetHead"]
    cfg = setup(parse("--config-file", config, *twin(config), *heads, *flat(options)))
    model = build(cfg)
    losses = step(model, next(iter(build_train_loader(cfg))))
    assert losses[own] > 0
    assert losses["loss_kd_hint"] > 0
    assert all(losses[f"loss_kd_soft_target_{source}"] > 0 for source in sources)
    sum(losses.values()).backward()
    assert [name for name, p in model.student.named_parameters() if p.requires_grad and p.grad is None] == []
    assert attached(model) == {}


@pytest.mark.parametrize(
    ("config", "tasks"),
    [(PANOPTIC, {"bbox", "segm", "sem_seg"}), (SEMANTIC, {"sem_seg"})],
)
def test_zoo_configs_are_evaluated(people, twin, tmp_path, config, tasks):
    """The best metric, the check of the teacher and the pictures work, and each announced metric is there."""
    options = people(config, **{"TEST.BEST_METRIC": "sem_seg/mIoU", "KD.TEACHER.SANITY_CHECK": 2})
    options |= {"KD.HINT.WEIGHT": 1e-9, "KD.HINT.IN_FEATURES": ["p5"], "VIS_PERIOD": int(config == SEMANTIC)}
    arguments = ["--config-file", config, *twin(config), "--kd-heads", "HintHead", *flat(options)]
    train_net(*arguments)
    results = json.loads((tmp_path / "output" / "metrics.json").read_text().splitlines()[-1])
    found = {name for name in results if name.partition("/")[0] in METRICS}
    assert {name.partition("/")[0] for name in found} == tasks
    assert found == set(metric_names(make_config(parse(*arguments))))
    log = (tmp_path / "output" / "log.txt").read_text()
    assert "sem_seg, classes: things " in log
    assert "The teacher's mean accuracy of pixels on these images" in log
    assert ("The teacher's box AP on these images" in log) == ("bbox" in tasks)
    assert ("the panoptic quality (PQ) on people_on_lawns is left out" in log) == (config == PANOPTIC)
    assert (tmp_path / "output" / "model_best.pth").is_file()


# ---- Evaluators ----
PQ_COMPUTE = """
import json, os

def pq_compute(gt_json, predictions, gt_folder, pred_folder):
    found = json.load(open(predictions))["annotations"]
    assert all(os.path.isfile(os.path.join(pred_folder, x["file_name"])) for x in found)
    assert os.path.isdir(gt_folder)
    hits = json.load(open(gt_json))["segments"] == [[s["category_id"] for s in x["segments_info"]] for x in found]
    return {part: {"pq": hits, "sq": 1.0, "rq": 0.5, "n": 3} for part in ("All", "Things", "Stuff")}
"""


@pytest.fixture
def panoptic_api(tmp_path, monkeypatch):
    """Makes a package with the two functions that Detectron2 uses, and a ground truth of segments."""
    package = tmp_path / "packages" / "panopticapi"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "utils.py").write_text("def id2rgb(ids):\n    return ids.astype('uint8')\n")
    (package / "evaluation.py").write_text(PQ_COMPUTE)
    monkeypatch.syspath_prepend(package.parent)
    (tmp_path / "panoptic.json").write_text('{"segments": [[1, 2, 3], [1, 2, 3]]}')
    paths = {"panoptic_json": str(tmp_path / "panoptic.json"), "panoptic_root": str(tmp_path)}
    MetadataCatalog.get(DATA).set(**paths)
    yield paths
    for name in [name for name in sys.modules if name.partition(".")[0] == "panopticapi"]:
        del sys.modules[name]


def config_of(people, config, **options):
    cfg = get_cfg()
    add_kd_config(cfg)
    merge_file(cfg, find_config(config))
    people(config)
    cfg.merge_from_list(flat(SMALL | {"DATASETS.TEST": (DATA,)} | options))
    return cfg


def perfect(record):
    """What a model gives that knows all."""
    labels = torch.from_numpy(cv2.imread(record["sem_seg_file_name"], cv2.IMREAD_GRAYSCALE)).long()
    labels[labels == 255] = 1
    found = Instances((64, 96), pred_boxes=Boxes(torch.tensor([[8.0, 8.0, 48.0, 48.0]])), scores=torch.ones(1))
    found.pred_classes, found.pred_masks = torch.zeros(1, dtype=torch.int64), (labels == 0)[None]
    segments = [{"id": 0, "isthing": True, "category_id": 0}]
    segments += [{"id": i, "isthing": False, "category_id": i} for i in (1, 2)]
    return {
        "instances": found,
        "sem_seg": torch.nn.functional.one_hot(labels, 3).permute(2, 0, 1).float(),
        "panoptic_seg": (labels, segments),
    }


def test_panoptic_quality(people, panoptic_api, tmp_path):
    cfg = config_of(people, PANOPTIC, **{"OUTPUT_DIR": str(tmp_path), "TEST.BEST_METRIC": "panoptic_seg/PQ"})
    check_evaluation(cfg)
    evaluator = build_evaluator(cfg, DATA)
    evaluator.reset()
    records = DatasetCatalog.get(DATA)
    evaluator.process(records, [perfect(record) for record in records])
    results = evaluator.evaluate()
    values = {"bbox/AP": 100, "segm/AP": 100, "sem_seg/mIoU": 100, "panoptic_seg/PQ": 100, "panoptic_seg/RQ_st": 50}
    found = flatten_results_dict(results)
    assert {name: found[name] for name in values} == pytest.approx(values)
    assert set(found) == set(metric_names(cfg))


def test_no_panoptic_segments_without_their_combination(people, panoptic_api):
    cfg = config_of(people, PANOPTIC, **{"MODEL.PANOPTIC_FPN.COMBINE.ENABLED": False})
    assert {name.partition("/")[0] for name in metric_names(cfg)} == {"bbox", "segm", "sem_seg"}


def test_missing_panoptic_files(people, panoptic_api, tmp_path):
    (tmp_path / "panoptic.json").unlink()
    with pytest.raises(InputError, match=r"panoptic.json: not found, but the evaluation of 'people_on_lawns' in DATA"):
        check_evaluation(config_of(people, PANOPTIC))


def test_panoptic_quality_without_the_package(people, caplog):
    """The rest is evaluated; who wants to choose by it is told before the training."""
    with caplog.at_level(logging.WARNING):
        check_evaluation(config_of(people, PANOPTIC))
    assert "since the package panopticapi is not installed (pip install git+https" in caplog.text
    with pytest.raises(InputError, match=r"^TEST.BEST_METRIC: .* panoptic_seg needs the package panopticapi\.$"):
        check_evaluation(config_of(people, PANOPTIC, **{"TEST.BEST_METRIC": "panoptic_seg/PQ"}))


@pytest.mark.parametrize(
    ("config", "kind", "allowed"),
    [
        (SEMANTIC, "coco", "sem_seg, coco_panoptic_seg"),
        (KEYPOINT, "sem_seg", "coco, pascal_voc, classification"),
        (PANOPTIC, "lvis", "coco, pascal_voc, classification, sem_seg, coco_panoptic_seg"),
    ],
)
def test_data_sets_that_do_not_fit_the_model(people, config, kind, allowed):
    cfg = config_of(people, config)
    MetadataCatalog.pop(DATA)
    MetadataCatalog.get(DATA).evaluator_type = kind
    with pytest.raises(InputError, match=f"its evaluator_type is '{kind}'; allowed are {allowed}.$"):
        check_evaluation(cfg)


@pytest.mark.parametrize(("config", "tasks"), [(PANOPTIC, {"sem_seg"}), (SEMANTIC, {"sem_seg"})])
def test_models_on_data_of_the_other_kind(people, config, tasks):
    """A panoptic model on labels of pixels alone, and a semantic one on panoptic data, give what both have."""
    cfg = config_of(people, config)
    MetadataCatalog.pop(DATA)
    kind = {PANOPTIC: "sem_seg", SEMANTIC: "coco_panoptic_seg"}[config]
    MetadataCatalog.get(DATA).set(evaluator_type=kind, stuff_classes=["a", "b", "c"], ignore_label=255)
    check_evaluation(cfg)
    assert {name.partition("/")[0] for name in metric_names(cfg)} == tasks
    assert isinstance(build_evaluator(cfg, DATA), SegmentationEvaluator)


def test_incomplete_metadata(people):
    cfg = config_of(people, SEMANTIC)
    MetadataCatalog.pop(DATA)
    MetadataCatalog.get(DATA).set(evaluator_type="sem_seg", stuff_classes=["a", "b", "c"])
    with pytest.raises(InputError, match=r"its metadata has no ignore_label, which sem_seg needs\.$"):
        check_evaluation(cfg)


@pytest.mark.parametrize("config", [PANOPTIC, SEMANTIC])
def test_another_number_of_classes_of_pixels(people, config):
    cfg = config_of(people, config, **{"MODEL.SEM_SEG_HEAD.NUM_CLASSES": 54})
    with pytest.raises(
        InputError, match=r"^MODEL.SEM_SEG_HEAD.NUM_CLASSES: 54 found, .* has 3 classes of pixels .*; set .* to 3\.$"
    ):
        check_num_classes(cfg, train=False)


def test_labels_that_are_no_classes(people, tmp_path):
    cfg = config_of(people, SEMANTIC, OUTPUT_DIR=str(tmp_path))
    evaluator = build_evaluator(cfg, DATA)
    evaluator.reset()
    records = DatasetCatalog.get(DATA)
    outputs = [perfect(record) for record in records]
    cv2.imwrite(records[0]["sem_seg_file_name"], np.full((64, 96), 7, np.uint8))
    with pytest.raises(InputError, match=r"segments.png: has the labels 7; allowed are 0 to 2, and 255 for"):
        evaluator.process(records, outputs)


def test_images_without_labels(people):
    cfg = config_of(people, SEMANTIC)
    DatasetCatalog.pop(DATA)
    DatasetCatalog.register(DATA, lambda: [{"file_name": "a.png"}])
    with pytest.raises(InputError, match=r"^DATASETS.TEST: a.png in 'people_on_lawns' has no sem_seg_file_name"):
        check_annotations(cfg)


class PerfectRun:
    """Stands for a run in a comparison whose model knows all."""

    name = "perfect"

    def __init__(self, cfg):
        self.cfg = cfg

    def evaluate(self, dataset, evaluator):
        records = DatasetCatalog.get(dataset)
        evaluator.reset()
        evaluator.process(records, [perfect(record) for record in records])
        return evaluator.evaluate()


def test_panoptic_models_are_compared_by_all_that_they_predict(people):
    """A Mask R-CNN, which has no classes of pixels, is compared with them by its boxes and masks."""
    panoptic, detector = config_of(people, PANOPTIC), config_of(people, PANOPTIC)
    detector.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    records = DatasetCatalog.get(DATA)
    measured = evaluate([PerfectRun(panoptic), PerfectRun(detector)], DATA, records)
    assert [x.get("sem_seg mIoU") for x in measured] == [100, None]
    assert [(x["bbox AP"], x["segm AP"], x["F1"]) for x in measured] == [pytest.approx((100, 100, 100))] * 2
