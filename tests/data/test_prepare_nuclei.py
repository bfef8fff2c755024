import importlib.util
import json
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from kd_det.data.coco_format import CocoFormat

SCRIPT = Path(__file__).parents[2] / "datasets" / "prepare_nuclei.py"


@pytest.fixture
def run(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("prepare_nuclei", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def call(*options):
        monkeypatch.setattr(
            sys, "argv", ["prepare_nuclei.py", str(tmp_path / "in"), "--output", str(tmp_path / "out"), *options]
        )
        script.run_tool(script.main)

    return call


@pytest.fixture
def source(tmp_path):
    """Four dark grey images, a bright one, and a large one; two nuclei and an empty mask in each."""
    for name, grey, side in [*((f"dark{i}", 10, 24) for i in range(4)), ("bright", 200, 24), ("large", 10, 50)]:
        folder = tmp_path / "in" / name
        (folder / "images").mkdir(parents=True)
        (folder / "masks").mkdir()
        cv2.imwrite(str(folder / "images" / f"{name}.png"), np.full((16, side, 4), grey, np.uint8))
        for i, columns in enumerate([slice(2, 6), slice(9, 11), slice(0, 0)]):
            mask = np.zeros((16, side), np.uint8)
            mask[3:8, columns] = 255
            cv2.imwrite(str(folder / "masks" / f"{i}.png"), mask)
    return tmp_path / "in"


def read(tmp_path, split):
    return json.loads((tmp_path / f"out/annotations/instances_{split}.json").read_text())


def test_converts_and_splits(run, source, tmp_path):
    run("--test-share", "0.5")
    train, test = read(tmp_path, "train"), read(tmp_path, "test")
    names = [{image["file_name"] for image in part["images"]} for part in (train, test)]
    assert [len(part) for part in names] == [3, 3]
    assert names[0] | names[1] == {path.name for path in source.glob("*/images/*.png")}
    boxes = [a["bbox"] for a in test["annotations"]]
    assert boxes == [[2, 3, 4, 5], [9, 3, 2, 5]] * 3
    dataset = CocoFormat("nuclei", str(tmp_path / "out/annotations/instances_train.json"), str(tmp_path / "out/images"))
    assert dataset.classes == ["nucleus"]
    run("--test-share", "0.5")
    assert read(tmp_path, "train") == train


def test_filters(run, source, tmp_path, capsys):
    run("--fluorescence", "--max-side", "24", "--test-share", "0.25")
    names = {image["file_name"] for split in ("train", "test") for image in read(tmp_path, split)["images"]}
    assert names == {f"dark{i}.png" for i in range(4)}
    assert "3 images with 6 nuclei to train, 1 images with 2 nuclei to test" in capsys.readouterr().out


def test_errors(run, source):
    with pytest.raises(SystemExit, match=r"error: --test-share: 1.0 found; a number between 0 and 1"):
        run("--test-share", "1")
    with pytest.raises(SystemExit, match=r"error: .*/in: 0 images fit, too few"):
        run("--max-side", "5")
    broken = source / "dark0/masks/1.png"
    broken.write_bytes(b"")
    with pytest.raises(SystemExit, match=f"error: {broken}: not an image that can be read"):
        run()
    cv2.imwrite(str(broken), np.zeros((5, 5), np.uint8))
    with pytest.raises(SystemExit, match=f"error: {broken}: 5 x 5, its image 24 x 16 pixels"):
        run()


def test_wrong_folder(run):
    with pytest.raises(SystemExit, match=r"error: .*/in: no .*/images/.*png found"):
        run()
