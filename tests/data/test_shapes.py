import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from detectron2.data.datasets import load_voc_instances
from pycocotools import mask as mask_util

from kd_det.data.annotation_files import coco_annotation
from kd_det.data.shapes import CLASSES, MIN_VISIBLE_PIXELS, make_scene
from kd_det.data.shapes_folder import write_shapes
from kd_det.errors import InputError

REPOSITORY = Path(__file__).parents[2]


def decode(polygons, shape):
    return mask_util.decode(mask_util.merge(mask_util.frPyObjects(polygons, *shape))).astype(bool)


def test_scene_depends_on_the_seed_alone():
    (a, things), (b, same_things), (c, _) = (make_scene(np.random.default_rng(seed), 96) for seed in (1, 1, 2))
    assert (a == b).all()
    assert all(k == m and (x == y).all() for (k, x), (m, y) in zip(things, same_things, strict=True))
    assert (a != c).any()


def test_scenes_have_all_classes_and_disjoint_masks():
    found = []
    for seed in range(30):
        image, things = make_scene(np.random.default_rng(seed), 160)
        assert image.shape == (160, 160, 3)
        assert sum(mask.astype(int) for _, mask in things).max() <= 1
        assert all(mask.sum() >= MIN_VISIBLE_PIXELS for _, mask in things)
        found += [class_index for class_index, _ in things]
    assert set(found) == set(range(len(CLASSES)))
    assert 3 < len(found) / 30 < 9


def test_annotation_of_a_mask():
    mask = np.zeros((8, 9), bool)
    mask[1:4, 2:6] = True
    mask[6, 8] = True
    annotation = coco_annotation(mask, id=1, image_id=2, category_id=3)
    assert annotation["bbox"] == [2, 1, 7, 6]
    assert annotation["area"] == 13
    assert (decode(annotation["segmentation"], mask.shape) == mask).all()
    mask[2, 3] = False  # holes are filled
    assert coco_annotation(mask, id=1, image_id=2, category_id=3) == annotation


def test_polygons_give_back_the_masks():
    for seed in range(10):
        for _, mask in make_scene(np.random.default_rng(seed), 160)[1]:
            annotation = coco_annotation(mask, id=1, image_id=1, category_id=1)
            drawn = decode(annotation["segmentation"], mask.shape)
            assert drawn[mask].all()
            ys, xs = np.nonzero(mask)
            x, y, width, height = annotation["bbox"]
            assert (x, y, x + width - 1, y + height - 1) == (xs.min(), ys.min(), xs.max(), ys.max())


def test_voc_and_coco_agree(shapes_root):
    data = json.loads((shapes_root / "coco/instances_train.json").read_text())
    for record, image in zip(load_voc_instances(str(shapes_root), "train", CLASSES), data["images"], strict=True):
        assert Path(record["file_name"]).name == image["file_name"]
        own = [a for a in data["annotations"] if a["image_id"] == image["id"]]
        boxes = [[x, y, x + width, y + height] for x, y, width, height in (a["bbox"] for a in own)]
        assert [a["bbox"] for a in record["annotations"]] == boxes
        assert [a["category_id"] + 1 for a in record["annotations"]] == [a["category_id"] for a in own]


def test_folder_is_reproducible_and_grows(tmp_path):
    for name, train in (("a", 2), ("b", 2), ("c", 3)):
        write_shapes(tmp_path / name, train=train, test=2, size=64, seed=5)
    a, b, c = ({p.relative_to(f): p.read_bytes() for p in f.rglob("*.*")} for f in (tmp_path / name for name in "abc"))
    assert a == b
    assert len(a) == 2 * 4 + 2 + 2 + 1
    pictures = [path for path in a if path.parts[0] in ("JPEGImages", "Annotations")]
    assert all(a[path] == c[path] for path in pictures)


def test_existing_folder(tmp_path):
    options = {"train": 2, "test": 2, "size": 64}
    assert write_shapes(tmp_path / "a", **options)
    assert not write_shapes(tmp_path / "a", **options)
    with pytest.raises(InputError, match=r"a: holds .*'seed': 0.*, not .*'seed': 1.*; delete .*/a or choose another"):
        write_shapes(tmp_path / "a", **options, seed=1)
    (tmp_path / "b").mkdir()
    with pytest.raises(InputError, match="b: holds something else"):
        write_shapes(tmp_path / "b", **options)
    assert {p.name for p in tmp_path.iterdir()} == {"a", "b"}


def test_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("kd_det.data.shapes_folder.write_coco", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_shapes(tmp_path / "a", train=2, test=2, size=64)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", [{"train": 1}, {"test": 0}, {"size": 63}, {"seed": -1}])
def test_parameter_out_of_range(tmp_path, option):
    ((name, value),) = option.items()
    with pytest.raises(InputError, match=f"^{name}: {value} found; "):
        write_shapes(tmp_path / "a", **option)


def test_command_line(tmp_path):
    command = [
        sys.executable,
        "-W",
        "ignore",
        "datasets/prepare_shapes.py",
        "--output",
        str(tmp_path / "a"),
        "--train",
        "1",
    ]
    done = subprocess.run(command, cwd=REPOSITORY, env={"PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1] == "error: train: 1 found; 2 or more is allowed."
