"""Tests kd-det label: detectors with random weights label a folder of images."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pycocotools.mask as mask_util
import pytest
from classification.models import classifier_cfg
from detectron2.config import CfgNode
from helpers import CLASSES, ROOT, Cut, distilled_cfg, tiny_cfg, with_data, write_yaml

from kd_det.data.coco_file import read_coco
from kd_det.data.coco_format import CocoFormat
from kd_det.labeling.journal import Journal

pytestmark = pytest.mark.usefixtures("in_process")


@pytest.fixture
def folder(tmp_path, coco_folder):
    """Four images, one of them in a folder of its own, a damaged one, and files that are not images."""
    folder = tmp_path / "photos"
    shutil.copytree(coco_folder / "images", folder)
    (folder / "more").mkdir()
    (folder / "1.png").rename(folder / "more" / "1.PNG")
    (folder / "2.5.png").write_bytes((folder / "2.png").read_bytes()[:200])
    (folder / "notes.txt").write_text("not an image")
    (folder / ".hidden.png").write_bytes(b"")
    return folder


@pytest.fixture
def masks(tmp_path, coco_folder, save_run):
    """The run of a Mask R-CNN that was a student."""
    return save_run(tmp_path / "masks", with_data(distilled_cfg({}, []), coco_folder, tmp_path))


@pytest.fixture
def boxes(tmp_path, coco_folder, save_run):
    """The run of a RetinaNet."""
    options = {"MODEL.RETINANET.SCORE_THRESH_TEST": 0.01}
    return save_run(tmp_path / "boxes", with_data(tiny_cfg("retinanet", options), coco_folder, tmp_path))


def test_a_coco_file_and_a_report(folder, masks, run_tool, tmp_path, capsys, caplog):
    output = tmp_path / "new" / "labels.json"
    run_tool("label", "--teacher", masks, "--images", folder, "--output", output, "--threshold", 0.1, "square=0.2")
    data = json.loads(output.read_text())
    assert [image["file_name"] for image in data["images"]] == ["2.png", "3.png", "4.png", "more/1.PNG"]
    assert {(image["width"], image["height"]) for image in data["images"]} == {(96, 64)}
    assert [category["name"] for category in data["categories"]] == list(CLASSES)
    assert data["info"]["thresholds"] == {"square": 0.2, "triangle": 0.1, "bar": 0.1}
    assert data["info"]["unreadable"] == ["2.5.png"]
    assert data["annotations"]
    for item in data["annotations"]:
        assert (0.2 if item["category_id"] == 1 else 0.1) <= item["score"] <= 1
        mask = mask_util.decode(item["segmentation"])
        assert mask.shape == (64, 96)
        assert mask.sum() == item["area"] > 0
    # All fields are as the readers of training and evaluation need them.
    assert not read_coco(str(output)).changed
    records = CocoFormat("labels_of_masks", str(output), str(folder))()
    assert sum(len(record["annotations"]) for record in records) == len(data["annotations"])
    page = output.with_suffix(".html").read_text()
    assert "<h2>Labelled images</h2>" in page
    assert 'class="mask"' in page
    assert "2.5.png" in page
    printed = capsys.readouterr().out
    assert f"{len(data['annotations'])} objects in 4 images; IMAGE_ROOT is {folder}." in printed
    assert "Images that cannot be read: 2.5.png." in printed
    assert "2.5.png: not an image that can be read" in caplog.text
    assert "files that are not images by their names are left out: notes.txt" in caplog.text
    assert sorted(path.name for path in output.parent.iterdir()) == ["labels.html", "labels.json"]


def test_thresholds_from_the_test_set_and_images_that_are_left_out(folder, masks, coco_folder, run_tool, tmp_path):
    (name,) = CfgNode.load_cfg((tmp_path / "masks" / "config.yaml").read_text()).DATASETS.TEST
    output = tmp_path / "labels.json"
    images = [folder, coco_folder / "images"]
    run_tool("label", "--teacher", masks, "--images", *images, "--exclude", name, "--output", output)
    data = json.loads(output.read_text())
    assert len(data["images"]) == 4
    root = os.path.commonpath(images)
    assert data["images"][0]["file_name"] == os.path.relpath(folder / "2.png", root)
    validation = data["info"]["validation"]
    assert (validation["dataset"], validation["images"]) == (name, 4)
    assert sum(quality["objects"] for quality in validation["classes"].values()) == 8
    assert "objects there" in (tmp_path / "labels.html").read_text()


def test_interrupted_and_resumed_it_writes_the_same_file(folder, masks, run_tool, tmp_path, monkeypatch, capsys):
    def label(output, *options):
        run_tool("label", "--teacher", masks, "--images", folder, "--output", output, "--threshold", 0.1, *options)
        return output.read_bytes()

    whole = label(tmp_path / "whole.json")
    with monkeypatch.context() as patch:
        append = Journal.append

        def cut(journal, entry):
            append(journal, entry)
            if len(journal.entries) == 4:
                raise Cut

        patch.setattr(Journal, "append", cut)
        with pytest.raises(Cut):
            label(tmp_path / "cut.json")
    journal = tmp_path / "cut.json.progress"
    journal.write_bytes(journal.read_bytes()[:-5])  # The third image was not written to its end.
    assert not (tmp_path / "cut.json").exists()
    with pytest.raises(SystemExit, match="is of an interrupted run with other tta; delete it"):
        label(tmp_path / "cut.json", "--tta", 48)
    capsys.readouterr()
    assert label(tmp_path / "cut.json") == whole
    assert "2 images had been labelled before an interruption" in capsys.readouterr().out
    assert not journal.exists()
    with pytest.raises(SystemExit, match=r"whole\.json exists already"):
        label(tmp_path / "whole.json")


@pytest.mark.slow
def test_killed_and_resumed_it_writes_the_same_file(folder, masks, tmp_path):
    """The process is killed as soon as it has labelled an image."""
    for i in range(60):
        shutil.copy(folder / "2.png", folder / f"copy{i}.png")

    def start(name):
        call = [sys.executable, ROOT / "tools" / "label.py", "--teacher", masks, "--images", folder]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        output = ["--output", tmp_path / name, "--threshold", "0.1"]
        return subprocess.Popen([*map(str, call + output)], env=environment, stderr=subprocess.DEVNULL)

    journal = tmp_path / "killed.json.progress"
    process = start("killed.json")
    while process.poll() is None and (not journal.exists() or journal.read_bytes().count(b"\n") < 4):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 4 <= journal.read_bytes().count(b"\n") < 66
    for name in ("killed.json", "whole.json"):
        assert start(name).wait() == 0
    assert (tmp_path / "killed.json").read_bytes() == (tmp_path / "whole.json").read_bytes()


def test_several_teachers_and_test_time_augmentation(folder, masks, boxes, run_tool, tmp_path):
    """Fused boxes have the masks of the only teacher that predicts any; augmented images give other boxes."""

    def label(name, *options):
        output = tmp_path / f"{name}.json"
        run_tool("label", "--images", folder, "--output", output, "--threshold", 0.02, *options)
        return json.loads(output.read_text())["annotations"]

    plain = label("plain", "--teacher", masks)
    augmented = label("augmented", "--teacher", masks, "--tta", 48, 64)
    assert augmented
    assert all("segmentation" in item for item in augmented)
    assert [item["bbox"] for item in augmented] != [item["bbox"] for item in plain]
    config = f"{boxes}/config.yaml:{boxes}/model_0000001.pth"
    fused = label("fused", "--teacher", masks, "--teacher", config, "--iou", 0.5)
    assert fused
    assert all("segmentation" in item for item in fused)
    areas = {item["area"] for item in plain}
    assert areas >= {item["area"] for item in fused}


def test_labels_that_are_too_bad_are_not_written(folder, masks, run_tool, tmp_path):
    output = tmp_path / "labels" / "labels.json"
    arguments = ["--teacher", masks, "--images", folder, "--output", output, "--threshold", 0.99]
    with pytest.raises(SystemExit, match=r"--validate: the labels have an AP50 of 0\.00 on .*, which is below 50"):
        run_tool("label", *arguments, "--validate", 50)
    assert not list(output.parent.iterdir())
    run_tool("label", *arguments, "--validate", 0)
    assert output.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--images", "{empty}"], r"--images: .*empty has no images, no files at all; names of images end in"),
        (["--images", "{text}"], r"--images: .*text has no images, only other files, such as notes\.txt"),
        (["--images", "nowhere"], "--images: nowhere is not a folder"),
        (["--images", "{damaged}"], r"--images: none of the images can be read: 0\.png"),
        (["--output", "{text}/notes.txt"], r"--output: .*notes\.txt exists already"),
        (["--output", "{text}/notes.txt/x.json"], r"notes\.txt.*: (Not a directory|File exists)"),
        (["--output", "x.html"], r"--output: must not end in \.html"),
        (["--iou", "1"], r"--iou: must be above 0 and below 1, got 1\.0"),
        (["--validate", "101"], r"--validate: must be an AP50 from 0 to 100, got 101\.0"),
        (["--tta", "0"], "--tta: sizes must be above 0, got 0"),
        (["--dataset", "no_such"], "unknown data set 'no_such'"),
        (["--exclude", "no_such"], "unknown data set 'no_such'"),
        (["--teacher", "{empty}"], "empty: not the output folder of a finished run"),
        (["--teacher", "timm:resnet18"], "--teacher timm:resnet18: it gives feature maps only"),
        (["--config-file", "{text}/other.yaml"], r"it knows 3 classes \(square, .*other.yaml has 2 \(square, bar\)"),
    ],
)
def test_bad_input(options, message, masks, folder, coco_folder, run_tool, tmp_path):
    for name in ("empty", "text", "damaged"):
        (tmp_path / name).mkdir()
    (tmp_path / "damaged" / "0.png").write_bytes(b"no image")
    (tmp_path / "text" / "notes.txt").write_text("no image")
    if "--config-file" in options:
        other = json.loads((coco_folder / "instances.json").read_text())
        other["annotations"] = []
        other["categories"].pop(1)
        (tmp_path / "two").mkdir()
        (tmp_path / "two" / "instances.json").write_text(json.dumps(other))
        shutil.copytree(coco_folder / "images", tmp_path / "two" / "images")
        write_yaml(tmp_path / "text" / "other.yaml", with_data(tiny_cfg(), tmp_path / "two", tmp_path))
    given = {"--teacher": masks, "--images": folder, "--threshold": "0.1", "--output": tmp_path / "x.json"}
    option, *values = (
        text.format(**{name: tmp_path / name for name in ("empty", "text", "damaged")}) for text in options
    )
    given.pop(option, None)
    with pytest.raises(SystemExit, match=message) as caught:
        run_tool("label", *(part for pair in given.items() for part in pair), option, *values)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("x.*"))


def test_teachers_that_cannot_label(folder, masks, boxes, coco_folder, save_run, run_tool, tmp_path):
    def refusal(*arguments):
        with pytest.raises(SystemExit) as caught:
            run_tool("label", "--images", folder, "--output", tmp_path / "x.json", "--threshold", "0.1", *arguments)
        return str(caught.value)

    four = with_data(tiny_cfg(options={"MODEL.ROI_HEADS.NUM_CLASSES": 4}), coco_folder, tmp_path)
    four = save_run(tmp_path / "four", four)
    assert "it knows 4 classes (square, triangle, bar), but" in refusal("--teacher", masks, "--teacher", four)
    assert "TEST.AUG.ENABLED: must be False for RetinaNet" in refusal("--teacher", boxes, "--tta")
    options = {"DATASETS.TEST": ("digits_test",), "MODEL.CLASSIFIER.NUM_CLASSES": 10}
    classifier = save_run(tmp_path / "classifier", classifier_cfg(options=options))
    assert "its model gives scores; only detectors" in refusal("--teacher", classifier)
    unnamed = tiny_cfg()
    unnamed.DATASETS.TRAIN = unnamed.DATASETS.TEST = ()
    unnamed = save_run(tmp_path / "unnamed", unnamed)
    assert "the names of its classes are not known" in refusal("--teacher", unnamed)
    assert not list(tmp_path.glob("x.*"))
