"""A tap in one file of a user's, for a one-stage detector that kd_det does not know: the example of the docs."""

import json

import pytest
import torch
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from helpers import ROOT, WIDE, attached, save_teacher, tiny_cfg, tiny_inputs, train_net, with_data, write_yaml

from kd_det import TAP_REGISTRY
from kd_det.engine import import_plugin
from kd_det.taps import build_tap

PLUGIN = str(ROOT / "docs" / "examples" / "point_detector.py")
OPTIONS = {"MODEL.META_ARCHITECTURE": "PointDetector", "MODEL.MASK_ON": False}


@pytest.fixture(scope="module", autouse=True)
def plugin():
    import_plugin(PLUGIN)
    yield
    META_ARCH_REGISTRY._obj_map.pop("PointDetector")
    TAP_REGISTRY._obj_map.pop("PointDetectorTap")


def test_its_signals_are_recorded_and_computed_alike():
    model = build_model(tiny_cfg(options=OPTIONS)).train()
    tap, names = build_tap(model), {"p2", "dense_logits"}
    with tap.record(names) as recorded:
        losses = model(tiny_inputs())
    computed = tap.compute(tiny_inputs(), names, {})
    assert type(tap).__name__ == "PointDetectorTap"
    assert losses.keys() == {"loss_classes", "loss_sides"}
    assert recorded["dense_logits"].shape == (2, 16 * 24 + 8 * 12 + 4 * 6 + 2 * 3 + 1 * 2, 3)
    for name in names:
        torch.testing.assert_close(computed[name], recorded[name], rtol=0, atol=0)
    assert not attached(model)


def test_any_head_distils_it(coco_folder, tmp_path, in_process):
    """Heads get the levels and the predictions that it has, though their defaults are those of an R-CNN."""
    cfg = with_data(tiny_cfg(options=OPTIONS), coco_folder, tmp_path / "output")
    teacher = save_teacher(tmp_path / "teacher", tiny_cfg(options=OPTIONS | WIDE))
    heads = "ReviewKDHead,AttentionTransferHead,HintHead,SoftTargetHead"
    train_net(
        *("--config-file", write_yaml(tmp_path / "plain.yaml", cfg), "--kd-heads", heads),
        *("--teacher", teacher["KD.TEACHER.CONFIG_FILE"], "--teacher-weights", teacher["KD.TEACHER.WEIGHTS"]),
    )
    metrics = json.loads((tmp_path / "output" / "metrics.json").read_text().splitlines()[0])
    losses = {"review", "attention_transfer", "hint", "soft_target_dense"}
    assert all(metrics[f"loss_kd_{name}"] > 0 for name in losses)
    saved = torch.load(tmp_path / "output" / "model_final.pth", weights_only=True)
    levels = {name.split(".")[2] for name in saved["kd_heads"] if name.startswith("ReviewKDHead.fusions")}
    assert levels == {"p2", "p3", "p4", "p5", "p6"}
