"""Detectors of other frameworks teach by an adapter in one file: the examples of the docs."""

import pytest
import torch
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from helpers import ROOT, build, distilled_cfg, save_teacher, step, tiny_cfg, tiny_inputs
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from kd_det import TAP_REGISTRY
from kd_det.engine import import_plugin
from kd_det.taps import build_tap

PLUGIN = ROOT / "docs" / "examples" / "torchvision_detector.py"


def create_small(*, num_classes, **_):
    return FasterRCNN(resnet_fpn_backbone(backbone_name="resnet18", weights=None), num_classes=num_classes)


@pytest.fixture
def cfg(monkeypatch):
    """The config of a small torchvision detector with random weights."""
    import_plugin(str(PLUGIN))
    architecture = META_ARCH_REGISTRY.get("TorchvisionDetector")
    monkeypatch.setitem(architecture.__init__.__globals__, "CREATE", create_small)
    yield tiny_cfg(options={"MODEL.META_ARCHITECTURE": "TorchvisionDetector", "INPUT.FORMAT": "RGB"})
    META_ARCH_REGISTRY._obj_map.pop("TorchvisionDetector")
    TAP_REGISTRY._obj_map.pop("TorchvisionDetectorTap")


def test_a_torchvision_detector_teaches(cfg, tmp_path):
    student = build(distilled_cfg(save_teacher(tmp_path, cfg), ["PearsonHead", "SoftTargetHead"]))
    losses = step(student, tiny_inputs())
    assert student.teacher.flip_channels
    assert losses["loss_kd_pearson"] > 0
    assert losses["loss_kd_soft_target_roi"] > 0


def test_its_logits_are_those_that_torchvision_computes(cfg):
    """Boxes are given to torchvision's own RoI heads, whose background comes first."""
    model = build_model(cfg).eval()
    tap, boxes = build_tap(model), torch.tensor([[0, 8.0, 8, 40, 32], [1, 0.0, 0, 64, 48]])
    with torch.no_grad():
        logits = tap.compute(tiny_inputs(), {"roi_logits"}, {"roi_boxes": boxes})["roi_logits"]
        images = [(x["image"] / 255) for x in tiny_inputs()]
        normalised = [model.net.transform.normalize(x) for x in images]
        batch = torch.zeros(2, 3, 64, 96)
        for i, x in enumerate(normalised):
            batch[i, :, : x.shape[1], : x.shape[2]] = x
        pooled = model.net.roi_heads.box_roi_pool(
            model.net.backbone(batch), [boxes[:1, 1:], boxes[1:, 1:]], [(64, 96)] * 2
        )
        expected = model.net.roi_heads.box_predictor(model.net.roi_heads.box_head(pooled))[0]
    torch.testing.assert_close(logits, expected[:, [1, 2, 3, 0]], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_it_detects_in_the_pixels_of_the_original_image(cfg):
    model = build_model(cfg).eval()
    with torch.no_grad():
        found = model(tiny_inputs())[1]["instances"]
    assert found.image_size == (tiny_inputs()[1]["height"], tiny_inputs()[1]["width"])
    assert set(found.pred_classes.tolist()) <= {0, 1, 2}
