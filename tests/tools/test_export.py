"""Tests that stock Detectron2 and TorchScript can read what kd-det export writes, and that it writes all or nothing."""

import os
import resource
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch
import yaml
from classification.models import PAIRS, classifier_cfg
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from helpers import ROOT, STOCK_R18, build, distilled_cfg, tiny_cfg

from kd_det.errors import InputError
from kd_det.export import export_student, find_run, load_student, read_student_config
from kd_det.export.student import plain_config

READER = """
import sys, cv2, torch
sys.modules["kd_det"] = None  # Importing it fails.
from detectron2.config import get_cfg
from detectron2.engine import DefaultPredictor
cfg = get_cfg()
cfg.merge_from_file(sys.argv[1])
found = DefaultPredictor(cfg)(cv2.imread(sys.argv[2]))["instances"]
torch.save([found.pred_boxes.tensor, found.scores], sys.argv[3])
"""


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    cv2.imwrite(str(path), np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8))
    return path


def test_stock_detectron2_predicts_the_same(teacher, photo, tmp_path, save_run, run_tool):
    run = save_run(tmp_path / "run", distilled_cfg(teacher, ["HintHead"], STOCK_R18))
    run_tool("export", "--run", run, "--output", tmp_path / "out", "--image", photo)
    assert sorted(os.listdir(tmp_path / "out")) == ["student.pth", "student.ts", "student.yaml"]

    command = [sys.executable, "-c", READER, tmp_path / "out/student.yaml", photo, tmp_path / "found.pth"]
    subprocess.run(list(map(str, command)), check=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"})
    boxes, scores = torch.load(tmp_path / "found.pth")
    config, weights = find_run(run)
    image = torch.from_numpy(cv2.imread(str(photo)).transpose(2, 0, 1).copy()).float()
    with torch.no_grad():
        own = load_student(read_student_config(config), weights, "cpu")([{"image": image}])[0]["instances"]
    assert len(boxes) > 0
    assert torch.equal(boxes, own.pred_boxes.tensor)
    assert torch.equal(scores, own.scores)


@pytest.mark.parametrize(
    ("family", "options", "outputs"),
    [
        ("mask_rcnn", {}, ["pred_boxes", "pred_classes", "pred_masks", "scores", "image_size"]),
        ("mask_rcnn", {"MODEL.MASK_ON": False}, ["pred_boxes", "pred_classes", "scores", "image_size"]),
        ("retinanet", {}, ["pred_boxes", "pred_classes", "scores", "image_size"]),
    ],
    ids=["mask", "faster", "retinanet"],
)
def test_traced_equals_eager_at_every_size(family, options, outputs, tmp_path, save_run):
    run = save_run(tmp_path / "run", tiny_cfg(family, options))
    config, weights = find_run(run)
    cfg = read_student_config(config)
    sample = torch.rand(3, 64, 96, generator=torch.Generator().manual_seed(0)) * 255
    done = export_student(cfg, weights, str(tmp_path / "out"), sample=sample)
    assert done.outputs == outputs
    assert len(set(done.tried)) == 2

    traced = torch.jit.load(tmp_path / "out/student.ts")
    model = load_student(cfg, weights, "cpu")
    for size in ((64, 96), (50, 130), (128, 64)):
        image = torch.nn.functional.interpolate(sample[None], size)[0]
        with torch.no_grad():
            own = model([{"image": image}])[0]["instances"]
        found = dict(zip(outputs, traced(image), strict=True))
        assert found["image_size"].tolist() == list(size)
        assert torch.allclose(found["scores"], own.scores)
        assert torch.allclose(found["pred_boxes"], own.pred_boxes.tensor, atol=1e-3)


def test_traced_model_may_detect_nothing(tmp_path, save_run):
    """A trace made on an image with objects also runs the parts behind them on no objects."""
    sample, black = torch.rand(3, 64, 96, generator=torch.Generator().manual_seed(0)) * 255, torch.zeros(3, 64, 96)
    cfg = tiny_cfg(options={"MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0})
    config, weights = find_run(save_run(tmp_path / "run", cfg))
    model = load_student(read_student_config(config), weights, "cpu")
    with torch.no_grad():
        best = [model([{"image": image}])[0]["instances"].scores.max().item() for image in (sample, black)]
    if best[0] < best[1]:
        sample, black = black, sample
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = sum(best) / 2
    export_student(cfg, weights, str(tmp_path / "out"), sample=sample)
    boxes, *_ = torch.jit.load(tmp_path / "out/student.ts")(black)
    assert boxes.shape == (0, 4)


def test_a_backbone_of_kd_det_is_named_with_its_import(tmp_path, save_run, run_tool, capsys):
    import kd_det

    run = save_run(tmp_path / "run", tiny_cfg())
    run_tool("export", "--run", run, "--output", tmp_path / "out", "--no-torchscript")
    assert sorted(os.listdir(tmp_path / "out")) == ["student.pth", "student.yaml"]
    for text in (capsys.readouterr().out, (tmp_path / "out/student.yaml").read_text()):
        assert "build_basic_resnet_fpn_backbone" in text
        assert "kd_det.add_kd_config(cfg)" in text
    cfg = get_cfg()
    kd_det.add_kd_config(cfg)
    cfg.merge_from_file(str(tmp_path / "out/student.yaml"))
    weights = torch.load(cfg.MODEL.WEIGHTS, weights_only=True)["model"]
    build_model(cfg).load_state_dict(weights, strict=True)


CONFIGS = [
    path
    for path in sorted(ROOT.glob("configs/**/*.yaml"))
    if not path.name.startswith("Base-") and path.parent.name != "recipes"
]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_for_stock_detectron2_has_no_other_keys(path):
    """The students on Detectron2's own ResNets are for Detectron2 alone; all others name the part that is not."""
    cfg = read_student_config(str(path))
    plain, needs = plain_config(cfg, "student.pth")
    parts = {cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.BACKBONE.NAME}
    stock = {"GeneralizedRCNN", "RetinaNet", "build_resnet_backbone", "build_resnet_fpn_backbone"}
    stock |= {"build_retinanet_resnet_fpn_backbone"}
    assert set(needs) == parts - stock
    if not needs:
        get_cfg().merge_from_other_cfg(CfgNode(yaml.safe_load(plain.dump())))


@pytest.mark.parametrize("family", PAIRS)
def test_classifier_reads_back_and_traces(family, tmp_path, save_run):
    import kd_det

    config, weights = find_run(save_run(tmp_path / "run", classifier_cfg(family)))
    sample = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0)) * 255
    done = export_student(read_student_config(config), weights, str(tmp_path / "out"), sample=sample)
    assert done.files == ["backbone.pth", "student.pth", "student.ts", "student.yaml"]
    assert "ImageClassifier" in done.needs
    assert (done.outputs, done.tried) == (["scores"], [(32, 32)])

    cfg = get_cfg()
    kd_det.add_kd_config(cfg)
    cfg.merge_from_file(str(tmp_path / "out/student.yaml"))
    assert cfg.INPUT.CLASSIFICATION.SIZE == 32
    model = build_model(cfg).eval()
    model.load_state_dict(torch.load(cfg.MODEL.WEIGHTS, weights_only=True)["model"], strict=True)
    image = sample.flip(1)
    with torch.no_grad():
        own = model([{"image": image}])[0]["scores"]
    (scores,) = torch.jit.load(tmp_path / "out/student.ts")(image)
    assert torch.allclose(scores, own, rtol=1e-5)


def test_stock_detector_starts_from_a_classifiers_backbone(tmp_path, save_run, run_tool):
    run = save_run(tmp_path / "run", classifier_cfg("detectron2"))
    run_tool("export", "--run", run, "--output", tmp_path / "out", "--no-torchscript")
    weights = torch.load(tmp_path / "out/backbone.pth", weights_only=True)["model"]
    for norm in ("FrozenBN", "BN"):
        detector = build(tiny_cfg(options=STOCK_R18 | {"MODEL.MASK_ON": False, "MODEL.RESNETS.NORM": norm}), seed=3)
        offered = {f"backbone.bottom_up.{key}": value for key, value in weights.items()}
        own = {key for key in detector.state_dict() if "bottom_up" in key and not key.endswith("num_batches_tracked")}
        assert own == offered.keys()
        DetectionCheckpointer(detector).load(str(tmp_path / "out/backbone.pth"))
        loaded = detector.state_dict()
        assert all(torch.equal(loaded[key], value) for key, value in offered.items())


def test_classifier_is_traced_on_a_sample(photo, tmp_path, save_run, run_tool, capsys):
    """By default the first test image; a file of any size is made what the classifier takes."""
    options = {"MODEL.CLASSIFIER.NUM_CLASSES": 10, "INPUT.CLASSIFICATION.SIZE": 8, "DATASETS.TEST": ("digits_test",)}
    run = save_run(tmp_path / "run", classifier_cfg(options=options))
    for arguments in ([], ["--image", photo]):
        output = tmp_path / f"out{len(arguments)}"
        run_tool("export", "--run", run, "--output", output, *arguments)
        assert "student.ts returns (scores); equal to the eager model on images of 8 x 8" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [({"MODEL.ROI_HEADS.SCORE_THRESH_TEST": 1.0}, "detects nothing"), ({"MODEL.FPN.OUT_CHANNELS": 24}, "does not fit")],
)
def test_a_failure_leaves_nothing(options, message, tmp_path, save_run):
    _, weights = find_run(save_run(tmp_path / "run", tiny_cfg()))
    (tmp_path / "made").mkdir()
    with pytest.raises(InputError, match=message):
        export_student(
            tiny_cfg(options=options), weights, str(tmp_path / "made/out"), sample=torch.rand(3, 64, 96) * 255
        )
    assert os.listdir(tmp_path / "made") == []


def test_a_full_disk_is_reported(tmp_path, save_run):
    """As one on which only so many bytes have room; student.ts is larger than student.pth."""
    _, weights = find_run(save_run(tmp_path / "run", tiny_cfg()))
    export_student(tiny_cfg(), weights, str(tmp_path / "whole"))
    size = (tmp_path / "whole/student.pth").stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit, sample in ((size - 1, None), (size, torch.rand(3, 64, 96) * 255)):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            with pytest.raises(OSError, match="File too large") as error:
                export_student(tiny_cfg(), weights, str(tmp_path / "made/out"), sample=sample)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert error.value.filename == str(tmp_path / "made/out")
        assert os.listdir(tmp_path / "made") == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run", "nowhere"], "nowhere/config.yaml does not exist"),
        (["--config-file", "a.yaml"], "either --run, or --config-file and --weights"),
        (["--run", "{run}", "--image", "none.png"], "no file none.png"),
        (["--run", "{run}", "--size", "0", "8"], "--size: both must be above 0, got 0 and 8"),
        (["--run", "{run}"], "--image: none is given"),
        (["--run", "{run}", "--output", "{run}", "--no-torchscript"], "exists already"),
    ],
)
def test_mistakes_end_in_one_line(arguments, message, tmp_path, save_run, run_tool):
    run = save_run(tmp_path / "run", tiny_cfg())
    arguments = [argument.format(run=run) for argument in arguments]
    with pytest.raises(SystemExit, match=message):
        run_tool("export", "--output", tmp_path / "out", *arguments)


def test_a_run_without_averaged_weights_is_refused(teacher, tmp_path, save_run, run_tool):
    run = save_run(tmp_path / "run", distilled_cfg(teacher, ["HintHead"]))
    with pytest.raises(SystemExit, match=r"^error: --ema: .*/model_0000001.pth has no averaged weights; SOLVER.EMA"):
        run_tool("export", "--run", run, "--ema", "--output", tmp_path / "out", "--no-torchscript")
    assert not (tmp_path / "out").exists()
