"""Tests pictures during a run: their content and colours, and that they do not change the run."""

import random
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from children import final_state, same
from classification.models import classifier_cfg
from detectron2.utils.events import EventStorage
from helpers import attached, build, distilled_cfg, save_teacher, tiny_cfg, with_data, write_yaml
from matplotlib.figure import Figure
from torch import nn

from kd_det.data import register_datasets
from kd_det.engine import visualization
from kd_det.engine.stages import stage_config, train
from kd_det.engine.visualization import attention_maps, build_visualization

pytestmark = pytest.mark.usefixtures("in_process")
RED, BLUE = (255, 0, 0), (0, 0, 255)
DIGITS = {"MODEL.CLASSIFIER.NUM_CLASSES": 10, "INPUT.CLASSIFICATION.SIZE": 8}


def hook_of(cfg):
    """The hook of a run that has just begun."""
    register_datasets(cfg)
    (hook,) = build_visualization(cfg, build(cfg))
    hook.trainer = SimpleNamespace(iter=0, storage=EventStorage())
    return hook


def pictures(hook) -> dict[str, np.ndarray]:
    """What the hook puts into the storage in an iteration: name to RGB (H, W, 3)."""
    hook.after_step()
    found = {name: image.transpose(1, 2, 0) for name, image, _ in hook.trainer.storage._vis_data}
    assert len(found) == len(hook.trainer.storage._vis_data)
    return found


def detectors(teacher, coco_folder, folder, heads=("AttentionTransferHead",), options=None):
    options = {"VIS_PERIOD": 1, "KD.ATTENTION_TRANSFER.IN_FEATURES": ["p2", "p4"]} | (options or {})
    return with_data(distilled_cfg(teacher, list(heads), options), coco_folder, folder)


def classifiers(folder, options=None, teacher_options=None):
    cfg = classifier_cfg(options=DIGITS)
    teacher = save_teacher(folder / "teacher", classifier_cfg(teacher=True, options=DIGITS | (teacher_options or {})))
    options = {"VIS_PERIOD": 1, "KD.HEADS": ["AttentionTransferHead"], "OUTPUT_DIR": str(folder)} | (options or {})
    options |= teacher | {"MODEL.META_ARCHITECTURE": "TeacherStudent", "KD.STUDENT_ARCHITECTURE": "ImageClassifier"}
    cfg.merge_from_list([part for pair in options.items() for part in pair])
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("digits_train",), ("digits_test",)
    return cfg


def mutual(coco_folder, folder, options=None):
    cfg = tiny_cfg(options={"VIS_PERIOD": 1, "KD.MUTUAL.METHOD": "ie_dml", "KD.INHERIT_EXPLORE.IN_FEATURES": ["p3"]})
    peer = write_yaml(folder / "peer.yaml", tiny_cfg("mask_rcnn", {"MODEL.FPN.OUT_CHANNELS": 24} | (options or {})))
    cfg.KD.STUDENT_ARCHITECTURE, cfg.MODEL.META_ARCHITECTURE = cfg.MODEL.META_ARCHITECTURE, "MutualStudents"
    cfg.KD.MUTUAL.PEERS = [peer]
    return with_data(cfg, coco_folder, folder)


# ---- The run ----
@pytest.mark.parametrize("kind", ["detectors", "classifiers", "mutual"])
def test_pictures_do_not_change_the_weights_of_a_run(kind, teacher, coco_folder, tmp_path, monkeypatch):
    """Bit for bit, with batch norm, box sampling and augmentation; Detectron2's own pictures are there once."""
    options = {"SOLVER.MAX_ITER": 4, "SOLVER.BASE_LR": 0.01, "SEED": 5, "DATASETS.TEST": ()}
    if kind == "detectors":
        cfg = detectors(teacher, coco_folder, tmp_path, ["AttentionTransferHead", "SoftTargetHead"])
    else:
        cfg = classifiers(tmp_path) if kind == "classifiers" else mutual(coco_folder, tmp_path)
    cfg.merge_from_list([part for pair in options.items() for part in pair])
    register_datasets(cfg)
    put, names = EventStorage.put_image, []

    def put_image(storage, name, image):
        names.append((storage.iter, name))
        put(storage, name, image)

    monkeypatch.setattr(EventStorage, "put_image", put_image)
    states = []
    for period in (0, 3):
        assert not names
        cfg.VIS_PERIOD, cfg.OUTPUT_DIR = period, str(tmp_path / f"every_{period}")
        train(cfg, resume=False)
        states.append(final_state(tmp_path / f"every_{period}"))
    assert same(*states)
    assert names.count((0, "predictions")) == names.count((3, "predictions")) == 1
    assert {i for i, _ in names} == {0, 3}
    if kind == "detectors":
        assert [i for i, name in names if "proposals" in name] == [0, 3]
    assert any((tmp_path / "every_3").glob("events.out.*"))
    assert "attention/" not in (tmp_path / "every_3/metrics.json").read_text()


def test_pictures_have_no_side_effects(teacher, coco_folder, tmp_path):
    """No hook, no gradient; each module is in the mode that it was in; random numbers and statistics are untouched."""
    hook = hook_of(detectors(teacher, coco_folder, tmp_path))
    hook.model.student.backbone.bottom_up.stem.eval()  # As one who freezes it.

    def state():
        networks = [hook.model, hook.model.teacher.model]
        return {
            "modes": [module.training for network in networks for module in network.modules()],
            "weights": [{key: value.clone() for key, value in network.state_dict().items()} for network in networks],
            "gradients": [p.grad is not None for network in networks for p in network.parameters()],
            "attached": [attached(network) for network in networks],
            "random": [random.getstate(), torch.get_rng_state(), str(np.random.get_state())],
        }

    before = state()
    assert pictures(hook)
    after = state()
    for key in before:
        assert same(before[key], after[key]), key


def test_pictures_appear_every_period(teacher, coco_folder, tmp_path):
    hook = hook_of(detectors(teacher, coco_folder, tmp_path, options={"VIS_PERIOD": 2}))
    hook.trainer.iter = 1
    assert not pictures(hook)


@pytest.mark.parametrize("options", [{"VIS_PERIOD": 0}, {"KD.HEADS": []}])
def test_no_hook_without_a_period_or_a_teacher(teacher, options):
    cfg = distilled_cfg(teacher, ["HintHead"], {"VIS_PERIOD": 1} | options)
    assert not build_visualization(cfg, build(cfg))


def test_plain_models_and_stages_have_no_pictures(teacher, tmp_path):
    assert not build_visualization(tiny_cfg(options={"VIS_PERIOD": 1}), nn.Linear(1, 1))
    assert stage_config(distilled_cfg(teacher, ["HintHead"], {"VIS_PERIOD": 1}), tmp_path).VIS_PERIOD == 0


# ---- What is on the pictures ----
@pytest.fixture
def drawn(monkeypatch):
    """What would be drawn last: the name of the function to its arguments."""
    found = {}
    for name in ("draw_attention", "draw_detections", "draw_classifications"):

        def note(*arguments, name=name):
            found[name] = arguments
            return Figure()

        monkeypatch.setattr(visualization, name, note)
    return found


def test_pictures_of_detectors(teacher, coco_folder, tmp_path, drawn):
    found = pictures(hook_of(detectors(teacher, coco_folder, tmp_path, ["AttentionTransferHead", "SoftTargetHead"])))
    assert list(found) == ["attention/p2", "attention/p4", "predictions"]
    assert all(image.dtype == np.uint8 and image.shape[2] == 3 for image in found.values())
    images, maps = drawn["draw_attention"]
    assert [image.shape for image in images] == [(64, 96, 3)] * 2
    assert list(maps) == ["student", "teacher"]
    assert [x.shape for x in maps["teacher"]] == [(64, 96)] * 2
    assert not np.allclose(maps["student"], maps["teacher"])
    records, names, predictions, _ = drawn["draw_detections"]
    assert [record["image_id"] for record in records] == [1, 3]  # of four
    assert names == ["square", "triangle", "bar"]
    assert [len(predictions[key]) for key in ("student", "teacher")] == [2, 2]


def test_pictures_of_classifiers(tmp_path, drawn):
    found = pictures(hook_of(classifiers(tmp_path)))
    assert list(found) == ["attention/res2", "attention/res3", "attention/res4", "predictions"]
    records, names, predictions = drawn["draw_classifications"]
    assert len(records) == 2
    assert names == list("0123456789")
    assert [scores.shape for scores in predictions["teacher"]] == [(10,)] * 2


def test_predictions_of_a_teacher_of_other_classes(tmp_path, drawn):
    """It knows the digits from 9 to 5, and its scores stand where the student has these."""
    cfg = classifiers(
        tmp_path,
        {"KD.HEADS": ["SoftTargetHead"], "KD.TEACHER.CLASSES": list("98765")},
        {"MODEL.CLASSIFIER.NUM_CLASSES": 5},
    )
    pictures(hook_of(cfg))
    for scores in drawn["draw_classifications"][2]["teacher"]:
        assert scores.shape == (10,)
        assert scores[:5].isneginf().all()
        assert scores[5:].sum().item() == pytest.approx(1)


def test_pictures_of_mutual_students(coco_folder, tmp_path, drawn):
    hook = hook_of(mutual(coco_folder, tmp_path, {"INPUT.FORMAT": "RGB"}))
    seen = watch(hook)
    assert list(pictures(hook)) == ["attention/p3", "predictions"]
    assert list(drawn["draw_attention"][1]) == list(drawn["draw_detections"][2]) == ["student 1", "student 2"]
    assert torch.equal(seen["student 1"], seen["student 2"].flip(0))


@pytest.mark.parametrize(
    ("head", "options", "names"),
    [
        ("SoftTargetHead", {"KD.SOFT_TARGET.SOURCES": ["roi", "mask"]}, []),
        # Features of boxes are no map of the image.
        ("FactorTransferHead", {"KD.FACTOR_TRANSFER.IN_FEATURES": ["roi_features"]}, []),
        ("OverhaulHead", {"KD.OVERHAUL.IN_FEATURES": ["res3", "res4"]}, ["attention/res3", "attention/res4"]),
    ],
)
@pytest.mark.usefixtures("drawn")
def test_maps_of_the_features_that_heads_compare(teacher, coco_folder, tmp_path, head, options, names):
    hook = hook_of(detectors(teacher, coco_folder, tmp_path, [head], options))
    assert list(pictures(hook)) == [*names, "predictions"]


def test_teacher_of_other_classes_is_left_out(coco_folder, tmp_path, drawn):
    """Its class 2 is not the data set's class 2."""
    teacher = save_teacher(tmp_path / "other", tiny_cfg(options={"MODEL.ROI_HEADS.NUM_CLASSES": 5}))
    pictures(hook_of(detectors(teacher, coco_folder, tmp_path)))
    assert list(drawn["draw_detections"][2]) == ["student"]
    assert list(drawn["draw_attention"][1]) == ["student", "teacher"]


def test_training_images_are_shown_without_a_test_set(tmp_path, drawn):
    cfg = classifiers(tmp_path)
    cfg.DATASETS.TEST = ()
    pictures(hook_of(cfg))
    assert drawn["draw_classifications"][0][0]["file_name"].startswith("digits_train")


@pytest.mark.gpu
def test_pictures_on_a_gpu(teacher, coco_folder, tmp_path):
    found = pictures(hook_of(detectors(teacher, coco_folder, tmp_path, options={"MODEL.DEVICE": "cuda"})))
    assert list(found) == ["attention/p2", "attention/p4", "predictions"]


@pytest.mark.usefixtures("drawn")
def test_pictures_of_a_teacher_whose_weights_are_halves(teacher, coco_folder, tmp_path):
    hook = hook_of(detectors(teacher, coco_folder, tmp_path, options={"KD.TEACHER.DTYPE": "bfloat16"}))
    hook.model.teacher.prepare()
    assert list(pictures(hook)) == ["attention/p2", "attention/p4", "predictions"]


# ---- Colours ----
def watch(hook) -> dict[str, torch.Tensor]:
    """The first image of each network's next batch."""
    seen = {}
    for network in hook.networks:
        network.model.register_forward_pre_hook(
            lambda _, args, title=network.title: seen.update({title: args[0][0]["image"]})
        )
    return seen


def halves(height, width):
    """An image whose left half is red and whose right half is blue, RGB."""
    image = np.zeros((height, width, 3), np.uint8)
    image[:, : width // 2], image[:, width // 2 :] = RED, BLUE
    return image


def share(picture, color):
    """Share of a picture's pixels that have a colour."""
    return (picture == np.array(color)).all(axis=2).mean()


@pytest.mark.parametrize(("own", "teachers"), [("RGB", "BGR"), ("BGR", "RGB"), ("BGR", "BGR")])
@pytest.mark.parametrize("kind", ["detectors", "classifiers"])
def test_colours_of_the_images_are_right(kind, own, teachers, coco_folder, tmp_path):
    if kind == "detectors":
        teacher = save_teacher(tmp_path / "teacher", tiny_cfg(options={"INPUT.FORMAT": teachers}))
        hook = hook_of(detectors(teacher, coco_folder, tmp_path / "run", options={"INPUT.FORMAT": own}))
        for record in hook.records:
            record["file_name"] = str(tmp_path / "halves.png")
    else:
        hook = hook_of(classifiers(tmp_path, options={"INPUT.FORMAT": own}, teacher_options={"INPUT.FORMAT": teachers}))
        hook.records[0]["image"] = hook.records[1]["image"] = halves(8, 8)
    cv2.imwrite(str(tmp_path / "halves.png"), cv2.cvtColor(halves(64, 96), cv2.COLOR_RGB2BGR))
    seen = watch(hook)
    found = pictures(hook)
    for name in ("attention/p2" if kind == "detectors" else "attention/res2", "predictions"):
        assert share(found[name], RED) > 0.05
        assert share(found[name], BLUE) > 0.05
        red, blue = ((found[name] == np.array(color)).all(axis=2).nonzero()[1].min() for color in (RED, BLUE))
        assert red < blue
    for title, order in (("student", own), ("teacher", teachers)):
        assert seen[title][:, 0, 0].tolist() == list(RED if order == "RGB" else BLUE)


# ---- Maps ----
def test_attention_map_computed_by_hand():
    """Means of squares over the channels are 1, 4 and 0, 2 in an image that fills three of four columns."""
    feature = torch.tensor([[[[1.0, 2.0], [0.0, 2.0]], [[1.0, -2.0], [0.0, 0.0]]]])
    (found,) = attention_maps(feature, 2, [(4, 3)])
    # Centres of cells lie at 0.5 and 2.5 pixels, so a pixel in between has 3 parts of one and 1 of the other.
    assert found.shape == (4, 3)
    rows = np.array([[1, 1.75, 3.25], [0.75, 1.4375, 2.8125], [0.25, 0.8125, 1.9375], [0, 0.5, 1.5]])
    np.testing.assert_allclose(found, rows / 3.25, rtol=1e-5)


def test_attention_maps_omit_the_padding():
    feature = torch.zeros(2, 1, 4, 4)
    feature[0, 0, :2, :2] = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    feature[0, 0, 3, 3] = 100.0
    small, large = attention_maps(feature, 8, [(12, 14), (30, 32)])
    assert small.shape == (12, 14)
    assert small.max() == 1
    assert large.shape == (30, 32)
    assert (large == 0).all()


def test_attention_map_of_a_network_that_drops_incomplete_cells():
    """Of 10 pixels at stride 4, two cells cover 8."""
    assert attention_maps(torch.rand(1, 3, 2, 2), 4, [(10, 10)])[0].shape == (10, 10)
