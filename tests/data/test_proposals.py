"""Proposal files of Detectron2's format are trained on and evaluated with as Detectron2 does, and run no code."""

import pickle

import numpy as np
import pytest
from detectron2.data import get_detection_dataset_dicts
from detectron2.structures import BoxMode
from helpers import distilled_cfg, tiny_cfg, train_net, with_data, write_yaml

from kd_det import InputError
from kd_det.data import register_datasets
from kd_det.data.loader import build_detection_training_loader
from kd_det.data.proposals import read_proposals
from kd_det.engine.loaders import build_test_loader

KEY = "DATASETS.PROPOSAL_FILES_TRAIN"
pytestmark = pytest.mark.usefixtures("in_process")


def proposals(**changes):
    rng = np.random.default_rng(0)
    corners = [rng.uniform(0, 30, (6, 2)) for _ in range(4)]
    boxes = [np.hstack([x, x + 20]).astype(np.float32) for x in corners]
    return {
        "ids": [1, 2, 3, 4],
        "boxes": boxes,
        "objectness_logits": [rng.normal(size=6).astype(np.float32) for _ in range(4)],
        "bbox_mode": BoxMode.XYXY_ABS,
    } | changes


def write(path, content, protocol=2):
    path.write_bytes(pickle.dumps(content, protocol))
    return str(path)


def loading(cfg, folder, output, file):
    """A config whose model takes its boxes from a file."""
    cfg = with_data(cfg, folder, output)
    cfg.MODEL.LOAD_PROPOSALS, cfg.MODEL.PROPOSAL_GENERATOR.NAME = True, "PrecomputedProposals"
    cfg.DATASETS.PROPOSAL_FILES_TRAIN = cfg.DATASETS.PROPOSAL_FILES_TEST = (file,)
    return cfg


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_both_loaders_have_what_detectron2_reads(coco_folder, tmp_path, protocol):
    file = write(tmp_path / "a.pkl", proposals(), protocol)
    cfg = loading(tiny_cfg(), coco_folder, tmp_path, file)
    register_datasets(cfg)
    expected = get_detection_dataset_dicts(cfg.DATASETS.TEST, filter_empty=False, proposal_files=[file])
    test = build_test_loader(cfg, cfg.DATASETS.TEST[0])
    for records in (build_detection_training_loader(cfg).dataset.records, test.dataset._dataset):
        for own, stock in zip(records, expected, strict=True):
            assert np.array_equal(own["proposal_boxes"], stock["proposal_boxes"])
            assert np.array_equal(own["proposal_objectness_logits"], stock["proposal_objectness_logits"])
            assert own["proposal_bbox_mode"] == stock["proposal_bbox_mode"]
    assert len(next(iter(test))[0]["proposals"]) == 6


def test_a_student_is_distilled_with_proposals(teacher, coco_folder, tmp_path):
    """Detectron2's predecessor had other names, and no mode."""
    data = proposals()
    old = {"indexes": data["ids"], "boxes": data["boxes"], "scores": data["objectness_logits"]}
    options = {"SOLVER.MAX_ITER": 1, "KD.SOFT_TARGET.SOURCES": ["roi"]}
    cfg = distilled_cfg(teacher, ["HintHead", "SoftTargetHead"], options)
    cfg = loading(cfg, coco_folder, tmp_path / "output", write(tmp_path / "a.pkl", old))
    train_net("--config-file", write_yaml(tmp_path / "config.yaml", cfg))
    assert (tmp_path / "output" / "model_final.pth").is_file()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": [1, 2, 3, 9]}, "there are no proposals for the image with id '4'"),
        ({"ids": [1, 2]}, "not a file of proposals, a pickle of ids, boxes and objectness_logits: ValueError"),
        ({"boxes": [np.zeros((2, 5))] * 4}, "not a file of proposals"),
        ({"objectness_logits": [np.zeros(2)] * 4}, "not a file of proposals"),
        ({"bbox_mode": "x"}, "not a file of proposals"),
        ({"boxes": 3}, "not a file of proposals"),
        ({"boxes": [np.array([None] * 4)] * 4}, "which are no numbers"),
    ],
)
def test_files_that_cannot_be(coco_folder, tmp_path, changes, message):
    cfg = loading(tiny_cfg(), coco_folder, tmp_path, write(tmp_path / "a.pkl", proposals(**changes)))
    register_datasets(cfg)
    with pytest.raises(InputError, match=f"^{KEY}: {tmp_path}/a.pkl: .*{message}") as error:
        build_detection_training_loader(cfg)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("files", [(), ("a.pkl", "b.pkl")])
def test_as_many_files_as_data_sets(coco_folder, tmp_path, files):
    cfg = loading(tiny_cfg(), coco_folder, tmp_path, "")
    cfg.DATASETS.PROPOSAL_FILES_TRAIN = files
    with pytest.raises(InputError, match=rf"^{KEY}: {len(files)} files for the 1 data sets of DATASETS.TRAIN\.$"):
        build_detection_training_loader(cfg)


@pytest.mark.parametrize("content", [b"", b"text", b"\x80\x02]q\x00."])
def test_files_of_something_else(tmp_path, content):
    (tmp_path / "a.pkl").write_bytes(content)
    with pytest.raises(InputError, match=f"^{KEY}: {tmp_path}/a.pkl: not a file of proposals"):
        read_proposals(str(tmp_path / "a.pkl"), KEY)
