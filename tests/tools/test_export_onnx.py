"""Tests that student.onnx gives the eager model's results in ONNX Runtime, and that its mistakes are reported."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from classification.models import classifier_cfg
from helpers import CLASSES, ROOT, build, tiny_cfg, with_data
from torch import nn

from kd_det.errors import InputError
from kd_det.export import export_student, find_run, load_student, onnx_file, read_student_config, student
from kd_det.export.onnx_file import compare, describe, locate_keypoints

DETECTED = {"boxes", "classes", "scores"}


def noise(height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed)) * 255


@pytest.fixture(scope="module")
def exported(tmp_path_factory, coco_folder, save_run):
    """The config of a tiny Mask R-CNN, the model, and the folder of its export."""
    folder = tmp_path_factory.mktemp("onnx")
    cfg = with_data(tiny_cfg(), coco_folder, folder)
    config, weights = find_run(save_run(folder / "run", cfg))
    cfg = read_student_config(config)
    done = export_student(cfg, weights, str(folder / "out"), sample=noise(64, 96), onnx=True)
    assert done.files == ["student.onnx", "student.pth", "student.ts", "student.yaml"]
    assert done.onnx_outputs == ["boxes", "classes", "scores", "masks"]
    assert len(set(done.onnx_tried)) == 3
    return cfg, load_student(cfg, weights, "cpu"), folder / "out"


def read(path) -> tuple[onnxruntime.InferenceSession, dict[str, str]]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session, session.get_modelmeta().custom_metadata_map


def check(session, model, image: torch.Tensor) -> int:
    """Compares a file with the stock model, whose boxes are those of the input; returns the number of detections."""
    names = [output.name for output in session.get_outputs()]
    found = dict(zip(names, session.run(None, {"image": image.numpy()}), strict=True))
    with torch.no_grad():
        own = model([{"image": image}])[0]["instances"]
    assert len(found["scores"]) == len(own)
    assert found["classes"].tolist() == own.pred_classes.tolist()
    assert np.allclose(found["boxes"], own.pred_boxes.tensor, rtol=0, atol=1e-3)
    assert np.allclose(found["scores"], own.scores, rtol=0, atol=1e-4)
    return len(own)


def test_masks_equal_eager_at_every_size(exported):
    _, model, folder = exported
    session, _ = read(folder / "student.onnx")
    (image,) = session.get_inputs()
    assert (image.name, image.type, image.shape) == ("image", "tensor(float)", [3, "height", "width"])
    for seed, size in enumerate(((64, 96), (50, 130), (128, 64), (33, 35))):
        sample = noise(*size, seed)
        assert check(session, model, sample) > 0
        masks = session.run(["masks"], {"image": sample.numpy()})[0]
        with torch.no_grad():
            own = model.inference([{"image": sample}], do_postprocess=False)[0].pred_masks
        assert np.allclose(masks, own, rtol=0, atol=1e-3)


def test_metadata_says_what_a_program_needs_to_know(exported):
    cfg, _, folder = exported
    _, metadata = read(folder / "student.onnx")
    assert json.loads(metadata["classes"]) == list(CLASSES)
    assert metadata["channel_order"] == "BGR"
    assert json.loads(metadata["pixel_mean"]) == cfg.MODEL.PIXEL_MEAN
    assert json.loads(metadata["pixel_std"]) == cfg.MODEL.PIXEL_STD
    assert (metadata["min_size"], metadata["max_size"]) == ("64", "96")
    file = onnx.load(folder / "student.onnx")
    assert int(metadata["opset"]) == file.opset_import[0].version == 18
    assert file.producer_name == "kd_det"


def test_classes_without_names_are_numbers():
    assert json.loads(describe(tiny_cfg())["classes"]) == ["0", "1", "2"]


def test_classifiers_take_other_sizes_where_the_network_does(tmp_path, save_run, run_tool, capsys):
    run = save_run(tmp_path / "run", classifier_cfg())
    run_tool("export", "--run", run, "--size", 32, 32, "--output", tmp_path / "out", "--no-torchscript", "--onnx")
    out = capsys.readouterr().out
    assert "backbone.pth, student.onnx, student.pth, student.yaml" in out
    assert "student.onnx returns (scores); equal to the eager model on images of 32 x 32 and 25 x 36 and " in out
    assert "student.ts returns" not in out
    session, metadata = read(tmp_path / "out/student.onnx")
    assert (metadata["size"], metadata["resize"]) == ("32", "0")
    config, weights = find_run(run)
    model, image = load_student(read_student_config(config), weights, "cpu"), noise(48, 40, seed=3)
    with torch.no_grad():
        own = model([{"image": image}])[0]["scores"]
    assert np.allclose(session.run(None, {"image": image.numpy()})[0], own, rtol=0, atol=1e-4)


class FixedSize(nn.Module):
    """A network that computes the positions of its patches when it is traced, as many vision transformers do."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 8, stride=8)

    def forward(self, images):
        maps = self.conv(images)
        return {"map": maps + torch.arange(float(maps.shape[3]))}


def test_a_classifier_of_a_fixed_size_is_exported_for_it(tmp_path):
    cfg = classifier_cfg()
    model = build(cfg).eval()
    model.backbone, model.linear = FixedSize(), nn.Linear(4, 3)
    _, tried = onnx_file.export_onnx(model, cfg, noise(32, 32), str(tmp_path / "student.onnx"))
    assert tried == [(32, 32)]
    session, _ = read(tmp_path / "student.onnx")
    assert session.get_inputs()[0].shape == [3, 32, 32]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["cascade", "retinanet", "keypoint"])
def test_families_equal_eager_with_nms_in_play(family, tmp_path, save_run):
    """Many boxes of random weights overlap, and most of them are suppressed."""
    options = {
        "TEST.DETECTIONS_PER_IMAGE": 50,
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.01,
        "MODEL.RETINANET.SCORE_THRESH_TEST": 0.01,
        "MODEL.RPN.PRE_NMS_TOPK_TEST": 200,
        "MODEL.RPN.POST_NMS_TOPK_TEST": 100,
    }
    cfg = tiny_cfg(family, options)
    config, weights = find_run(save_run(tmp_path / "run", cfg))
    cfg = read_student_config(config)
    sample = noise(64, 96)
    done = export_student(cfg, weights, str(tmp_path / "out"), sample=sample, torchscript=False, onnx=True)
    extra = {"cascade": {"masks"}, "keypoint": {"keypoints"}}.get(family, set())
    assert set(done.onnx_outputs) == DETECTED | extra
    session, _ = read(tmp_path / "out/student.onnx")
    model = load_student(cfg, weights, "cpu")
    counts = [check(session, model, noise(*size, seed)) for seed, size in enumerate(((64, 96), (50, 130), (128, 64)))]
    threshold = "RETINANET" if family == "retinanet" else "ROI_HEADS"
    cfg.MODEL[threshold].NMS_THRESH_TEST = 1.0
    cfg.TEST.DETECTIONS_PER_IMAGE = 1000
    everything = load_student(cfg, weights, "cpu")
    with torch.no_grad():
        assert len(everything([{"image": sample}])[0]["instances"]) > counts[0] > 5
    if family == "keypoint":
        with torch.no_grad():
            own = model([{"image": sample}])[0]["instances"].pred_keypoints
        assert np.allclose(session.run(["keypoints"], {"image": sample.numpy()})[0], own, rtol=0, atol=1e-3)


def test_keypoints_are_those_of_detectron2():
    from detectron2.structures import heatmaps_to_keypoints

    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(6, 4, 7, 7, generator=generator)
    corners = torch.rand(6, 2, generator=generator) * 30
    rois = torch.cat((corners, corners + torch.rand(6, 2, generator=generator) * 60), dim=1)
    assert torch.allclose(locate_keypoints(maps, rois), heatmaps_to_keypoints(maps, rois), atol=1e-5)
    assert locate_keypoints(maps[:0], rois[:0]).shape == (0, 4, 4)


def test_an_image_without_detections(exported):
    """The parts behind the boxes, such as the mask head, also run on no boxes."""
    _, model, folder = exported
    session, _ = read(folder / "student.onnx")
    black = np.zeros((3, 64, 96), np.float32)
    with torch.no_grad():
        expected = len(model([{"image": torch.from_numpy(black)}])[0]["instances"])
    boxes, _, _, masks = session.run(None, {"image": black})
    assert len(boxes) == len(masks) == expected


def test_differences_are_named_with_their_size():
    eager = {"boxes": torch.zeros(2, 4), "classes": torch.tensor([0, 1]), "scores": torch.tensor([0.5, 0.4])}
    compare(eager, eager, (64, 96))
    compare(eager, eager | {"boxes": torch.full((2, 4), 9e-4)}, (64, 96))
    found = eager | {"boxes": torch.tensor([[0, 0, 0, 0.25], [0, 0, 0, 0]]), "scores": torch.tensor([0.5, 0.4003])}
    with pytest.raises(
        InputError, match=r"64 x 96 .*: boxes by up to 0.25 \(allowed: 0.001\), scores by up to 0.0003 "
    ):
        compare(eager, found, (64, 96))
    with pytest.raises(InputError, match=r"boxes \[1, 4\] instead of \[2, 4\], scores by up to nan"):
        compare(eager, eager | {"boxes": torch.zeros(1, 4), "scores": torch.full((2,), torch.nan)}, (64, 96))
    with pytest.raises(InputError, match=r"boxes by up to 0\.002"):
        compare(eager, eager | {"boxes": torch.full((2, 4), 2e-3)}, (400, 500))


def test_a_failure_leaves_nothing(tmp_path, save_run, monkeypatch):
    def fail(model, cfg, sample, path):
        Path(path).write_text("half")
        raise InputError("student.onnx: it differs.")

    _, weights = find_run(save_run(tmp_path / "run", tiny_cfg()))
    monkeypatch.setattr(student, "export_onnx", fail)
    (tmp_path / "made").mkdir()
    with pytest.raises(InputError, match="it differs"):
        export_student(
            tiny_cfg(), weights, str(tmp_path / "made/out"), sample=noise(64, 96), torchscript=False, onnx=True
        )
    assert os.listdir(tmp_path / "made") == []


def test_a_wrong_file_is_noticed(exported, tmp_path, monkeypatch):
    """An export that does nothing leaves the graph of other weights in place."""
    cfg, _, folder = exported
    shutil.copy(folder / "student.onnx", tmp_path / "student.onnx")
    monkeypatch.setattr(onnx_file, "write", lambda *_, **__: None)
    with pytest.raises(InputError, match=r"^student\.onnx: on an image of 64 x 96 .* other results .*: boxes (by|\[)"):
        onnx_file.export_onnx(build(cfg, seed=1).eval(), cfg, noise(64, 96), str(tmp_path / "student.onnx"))


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("panoptic", {}, "--onnx: MODEL.META_ARCHITECTURE PanopticFPN is not supported; GeneralizedRCNN, RetinaNet"),
        ("mask_rcnn", {"MODEL.LOAD_PROPOSALS": True}, "--onnx: MODEL.LOAD_PROPOSALS is not supported"),
    ],
)
def test_what_is_not_supported_is_named(family, options, message, tmp_path, save_run, run_tool):
    run = save_run(tmp_path / "run", tiny_cfg(family, options))
    arguments = ("--onnx", "--no-torchscript", "--size", "64", "96", "--output", tmp_path / "out")
    with pytest.raises(SystemExit, match=message):
        run_tool("export", "--run", run, *arguments)
    assert not (tmp_path / "out").exists()


PREDICTOR = ROOT / "docs" / "examples" / "onnx_predictor.py"
WITHOUT_TORCH = """
import runpy, sys
sys.modules |= dict.fromkeys(("torch", "torchvision", "detectron2", "kd_det"))  # Importing one of them fails.
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_the_predictor_needs_no_torch(exported, tmp_path):
    _, model, folder = exported
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    cv2.imwrite(str(tmp_path / "photo.png"), image)
    command = [sys.executable, "-c", WITHOUT_TORCH, PREDICTOR, folder / "student.onnx", tmp_path / "photo.png"]
    lines = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout.splitlines()
    with torch.no_grad():
        own = model([{"image": torch.from_numpy(image.transpose(2, 0, 1).copy()).float()}])[0]["instances"]
    assert len(lines) == len(own) > 0
    for line, box, label, score in zip(
        lines, own.pred_boxes.tensor.tolist(), own.pred_classes.tolist(), own.scores.tolist(), strict=True
    ):
        name, found_score, found_box = line.split(" ", 2)
        assert name == CLASSES[label]
        assert float(found_score) == pytest.approx(score, abs=1e-3)
        assert json.loads(found_box) == pytest.approx(box, abs=0.02)


def test_the_predictor_gives_boxes_in_pixels_of_the_image(exported):
    _, model, folder = exported
    predict = runpy.run_path(str(PREDICTOR))["predict"]
    image = np.random.default_rng(1).integers(0, 256, (150, 180, 3), np.uint8)
    boxes, _, scores = predict(read(folder / "student.onnx")[0], image)
    small = cv2.resize(image, (77, 64), interpolation=cv2.INTER_AREA)
    with torch.no_grad():
        own = model([{"image": torch.from_numpy(small.transpose(2, 0, 1).copy()).float()}])[0]["instances"]
    assert np.allclose(scores, own.scores, atol=1e-4)
    assert np.allclose(boxes, own.pred_boxes.tensor * 150 / 64, atol=0.01)


@pytest.mark.slow
def test_compare_takes_exported_files(exported, tmp_path, run_tool, in_process):
    """The same AP as the run's; what cannot be counted in a file is left out."""
    _, _, folder = exported
    sources = [
        folder.parent / "run",
        folder / "student.ts",
        f"{folder.parent / 'run'}/config.yaml:{folder}/student.onnx",
    ]
    runs = [part for name, x in zip("abc", sources, strict=True) for part in ("--run", f"{name}={x}")]
    run_tool("compare", *runs, "--output", tmp_path / "out", "--images", 1, "--html")
    eager, *others = [run["metrics"] for run in json.loads((tmp_path / "out/comparison.json").read_text())["runs"]]
    assert eager["segm AP"] is not None
    for metrics in others:
        assert metrics["ms per image"] > 0
        assert eager.keys() - metrics.keys() == {"parameters (M)", "GFLOPs"}
        for key in metrics.keys() - {"ms per image"}:
            assert metrics[key] == pytest.approx(eager[key], abs=1e-3), key


@pytest.mark.slow
def test_compare_takes_exported_classifiers(tmp_path, save_run, run_tool, in_process):
    options = {"MODEL.CLASSIFIER.NUM_CLASSES": 10, "INPUT.CLASSIFICATION.SIZE": 8, "DATASETS.TEST": ("digits_test",)}
    run = save_run(tmp_path / "run", classifier_cfg(options=options))
    run_tool("export", "--run", run, "--output", tmp_path / "out", "--onnx")
    files = [part for name in ("ts", "onnx") for part in ("--run", f"{name}={tmp_path}/out/student.{name}")]
    run_tool("compare", "--run", f"eager={run}", *files, "--output", tmp_path / "made", "--images", 1)
    accuracies = [run["metrics"]["top1"] for run in json.loads((tmp_path / "made/comparison.json").read_text())["runs"]]
    assert accuracies[0] == accuracies[1] == accuracies[2] > 0


@pytest.mark.parametrize(
    ("command", "file", "message"),
    [
        ("compare", "none.onnx", "a={out}/none.onnx: there is no file {out}/none.onnx"),
        ("compare", "student.onnx", "a={out}/student.onnx: {out}/student.onnx cannot be read by ONNX Runtime: "),
        ("compare", "student.ts", "a={out}/student.ts: {out}/student.ts is not TorchScript that can be read: "),
        ("similarity", "student.onnx", "a={out}/student.onnx: is an exported file; only kd-det compare takes these"),
    ],
)
def test_wrong_files_end_in_one_line(command, file, message, coco_folder, tmp_path, save_run, run_tool, in_process):
    run = save_run(tmp_path / "run", with_data(tiny_cfg(), coco_folder, tmp_path))
    out = tmp_path / "out"
    out.mkdir()
    (out / "student.yaml").write_text((tmp_path / "run/config.yaml").read_text())
    for name in ("student.onnx", "student.ts"):
        (out / name).write_text("nothing")
    more = ("--run", f"eager={run}", "--output", tmp_path / "made")
    if command == "similarity":
        more = ("--teacher", run, "--feature", "p4")
    with pytest.raises(SystemExit, match=re.escape(message.format(out=out))):
        run_tool(command, *more, "--run", f"a={out}/{file}")


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_a_missing_package_is_named_with_its_extra(package, tmp_path, save_run, run_tool, monkeypatch):
    run = save_run(tmp_path / "run", tiny_cfg())
    monkeypatch.setitem(sys.modules, package, None)
    arguments = ("--onnx", "--no-torchscript", "--size", "64", "96", "--output", tmp_path / "out")
    with pytest.raises(SystemExit, match=rf"--onnx: needs {package} \(.*\): pip install 'kd_det\[deploy\]'"):
        run_tool("export", "--run", run, *arguments)
    assert not (tmp_path / "out").exists()
