"""tools/compare.py: table, JSON and picture of several runs on a tiny data set."""

import json

import cv2
import pytest
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from helpers import tiny_cfg, with_data

from kd_det.comparison import choose_images, make_table, summarise, without_nan
from kd_det.data.shapes import CLASSES
from kd_det.data.shapes_folder import write_shapes
from kd_det.pictures import CELL

pytestmark = pytest.mark.usefixtures("in_process")


def test_masks_boxes_and_seeds(coco_folder, tmp_path, save_run, run_tool, capsys):
    masks = with_data(tiny_cfg(), coco_folder, tmp_path)
    boxes = with_data(tiny_cfg("retinanet"), coco_folder, tmp_path)
    one = save_run(tmp_path / "masks", masks)
    two = [save_run(tmp_path / f"boxes{seed}", boxes, seed=seed) for seed in (0, 1)]
    runs = [f"masks={one}", f"boxes={two[0]}", f"boxes={two[1]}/config.yaml:{two[1]}/model_0000001.pth"]
    output = tmp_path / "comparison"
    run_tool(
        "compare", *(x for run in runs for x in ("--run", run)), "--output", output, "--images", 2, "--threshold", 0
    )

    text = (output / "comparison.md").read_text()
    assert text in capsys.readouterr().out + "\n"
    rows = {row.split("|")[1].strip(): row for row in text.splitlines() if row.startswith("|")}
    assert {"bbox AP", "bbox AP75", "bbox AP-triangle", "segm AP50", "parameters (M)", "GFLOPs", "ms per image"} <= set(
        rows
    )
    assert "boxes (2 runs)" in rows[""]
    assert rows["segm AP"].split("|")[3].strip() == "-"
    assert "±" in rows["bbox AP"]

    results = json.loads((output / "comparison.json").read_text())
    assert [run["name"] for run in results["runs"]] == ["masks", "boxes", "boxes"]
    assert results["runs"][1]["metrics"]["ms per image"] > 0
    assert results["summary"]["masks"]["GFLOPs"]["mean"] > 0
    height, width, _ = cv2.imread(str(output / "comparison.png")).shape
    assert width == 3 * CELL
    assert height > 2 * CELL * 64 / 96 * 0.9


def test_voc_has_both_metrics(tmp_path, save_run, run_tool):
    write_shapes(tmp_path / "shapes", train=2, test=3, size=64)
    cfg = tiny_cfg(options={"MODEL.ROI_HEADS.NUM_CLASSES": 6})
    entry = {"ROOT": str(tmp_path / "shapes"), "SPLIT": "test", "CLASSES": list(CLASSES)}
    cfg.DATASETS.VOC_FORMAT["tiny_voc"] = CfgNode(entry)
    cfg.DATASETS.TEST = ("tiny_voc",)
    run = save_run(tmp_path / "run", cfg)
    run_tool("compare", "--run", f"a={run}", "--output", tmp_path / "out", "--images", 1)
    assert "json_file" not in MetadataCatalog.get("tiny_voc").as_dict()  # The converted copy is gone.
    results = json.loads((tmp_path / "out/comparison.json").read_text())
    metrics = results["runs"][0]["metrics"]
    assert {"bbox AP", "bbox AP-star", "voc AP", "voc AP50"} <= set(metrics)
    assert not any(name.startswith("segm") for name in metrics)  # The model has masks, the data set has none.
    assert "PASCAL VOC AP" in results["table"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run", "nameless"], "NAME=FOLDER"),
        (["--run", "a=nowhere"], "neither an output folder nor CONFIG:WEIGHTS"),
        (["--run", "a={run}", "--dataset", "unheard_of"], "unknown data set 'unheard_of'"),
        (["--run", "a={run}", "--images", "0"], "--images"),
    ],
)
def test_mistakes_end_in_one_line(arguments, message, coco_folder, tmp_path, save_run, run_tool):
    run = save_run(tmp_path / "run", with_data(tiny_cfg(), coco_folder, tmp_path))
    with pytest.raises(SystemExit, match=message):
        run_tool("compare", *(argument.format(run=run) for argument in arguments), "--output", tmp_path / "out")


class Named:
    def __init__(self, name):
        self.name = name


def test_mean_and_deviation_over_seeds():
    summary = summarise([Named("a"), Named("b"), Named("a")], [{"bbox AP": x} for x in (10.0, 50.0, 14.0)])
    assert summary["a"]["bbox AP"] == {"mean": 12.0, "std": pytest.approx(8**0.5)}  # (4 + 4) / (2 - 1)
    assert summary["b"]["bbox AP"] == {"mean": 50.0, "std": 0.0}
    runs = [{"name": name} for name in "aba"]
    table = make_table({"summary": summary, "runs": runs, "dataset": "d", "dataset_images": 1, "device": "x"})
    assert "12.00 ± 2.83" in table
    assert "| 50.00" in table


def test_a_seed_without_a_metric_is_no_crash():
    summary = summarise([Named("a"), Named("a")], [{"bbox AP": 1.0, "bbox AP-x": 1.0}, {"bbox AP": 0.0}])
    assert without_nan(summary["a"]["bbox AP-x"]) == {"mean": None, "std": None}


def test_chosen_images_are_spread_and_have_objects():
    dicts = [{"annotations": [1] * (i % 2), "i": i} for i in range(12)]
    assert [x["i"] for x in choose_images(dicts, 3)] == [1, 5, 9]
    assert len(choose_images(dicts, 99)) == 6


def test_json_has_no_nan():
    assert without_nan({"a": [float("nan"), 1.0]}) == {"a": [None, 1.0]}
