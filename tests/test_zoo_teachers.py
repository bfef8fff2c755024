"""The strongest models of Detectron2's zoo, whose configs are Python, each teach a ResNet-18; with random weights."""

from functools import partial

import pytest
import torch
from helpers import STOCK_R18, build, distilled_cfg, step, tiny_inputs

from kd_det import build_teacher, meta_arch

STUDENT = STOCK_R18 | {
    "MODEL.ANCHOR_GENERATOR.SIZES": [[32], [64], [128], [256], [512]],
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [[0.5, 1.0, 2.0]],
    "MODEL.RPN.IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"],
    "MODEL.ROI_HEADS.NUM_CLASSES": 80,
    "KD.SOFT_TARGET.SOURCES": ["roi", "rpn"],
}
BOTH = ["HintHead", "SoftTargetHead"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "overrides", "heads"),
    [
        ("new_baselines/mask_rcnn_R_101_FPN_400ep_LSJ.py", [], BOTH),
        ("new_baselines/mask_rcnn_regnety_4gf_dds_FPN_400ep_LSJ.py", [], BOTH),
        ("COCO-Detection/fcos_R_50_FPN_1x.py", [], ["HintHead"]),
        # ViTDet-B; its square is smaller here than the 1024 pixels of the original.
        (
            "common/models/mask_rcnn_vitdet.py",
            ["model.backbone.square_pad=128", "model.backbone.net.img_size=128"],
            BOTH,
        ),
    ],
    ids=["lsj_r101", "regnety", "fcos", "vitdet"],
)
def test_each_teaches_for_two_iterations(name, overrides, heads, monkeypatch):
    monkeypatch.setattr(meta_arch, "build_teacher", partial(build_teacher, trained=False))
    levels = ["p3", "p4", "p5"]
    options = STUDENT | {"KD.TEACHER.OPTS": overrides, "KD.HINT.IN_FEATURES": levels, "KD.HINT.WEIGHT": 1e-9}
    model = build(distilled_cfg({"KD.TEACHER.CONFIG_FILE": name}, heads, options))
    before = model.teacher.fingerprint()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-6)
    for iteration in range(2):
        losses = step(model, tiny_inputs(((64, 96),)), iteration=iteration)
        assert {"loss_kd_hint"} | ({"loss_kd_soft_target_roi"} if heads == BOTH else set()) <= losses.keys()
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    assert model.teacher.fingerprint() == before
    assert not any(module.training for module in model.teacher.model.modules())
    assert ("RGB" if "vitdet" in name else "BGR") == model.teacher.cfg.INPUT.FORMAT
    assert model.teacher.alignment.is_identity == ("vitdet" not in name)
