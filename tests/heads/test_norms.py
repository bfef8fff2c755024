"""Normalisation in heads: every head that has one has the same choices, and builds what was asked for."""

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import BatchNorm2d
from detectron2.utils import comm
from torch import nn

from kd_det import InputError, add_kd_config, build_kd_heads
from kd_det.registry import config_key

from .signals import make_spec

LAYERS = {"BN": BatchNorm2d, "SyncBN": nn.SyncBatchNorm, "GN": nn.GroupNorm}
HEADS = {
    "ReviewKDHead": {"MID_CHANNELS": 32},
    "HintHead": {"REGRESSOR": "rectified"},
    "FactorTransferHead": {"FACTOR_RATE": 1.0},
    "InheritExploreHead": {"FACTOR_RATE": 1.0},
    "OverhaulHead": {},
    "ActivationBoundaryHead": {},
    "SoftmaxRegressionHead": {},
}
each_head = pytest.mark.parametrize("name", HEADS)


def make(name, norm, *, student=64, teacher=32, device="cpu"):
    cfg = get_cfg()
    add_kd_config(cfg)
    cfg.KD.HEADS, cfg.MODEL.DEVICE = [name], device
    for key, value in (HEADS[name] | {"NORM": norm}).items():
        cfg.KD[config_key(name)][key] = value
    return build_kd_heads(cfg, make_spec(student), make_spec(teacher))[name]


@each_head
@pytest.mark.parametrize("norm", LAYERS)
def test_the_layers_are_those_asked_for(name, norm):
    layers = [x for x in make(name, norm).modules() if isinstance(x, tuple(LAYERS.values()))]
    assert {type(layer) for layer in layers} == {LAYERS[norm]}


@each_head
def test_another_norm(name):
    allowed = "'', BN, SyncBN, GN, LN" if name == "FactorTransferHead" else "BN, SyncBN, GN, LN"
    with pytest.raises(InputError, match=rf"^KD.{config_key(name)}.NORM: 'naiveSyncBN' is not one of {allowed}\.$"):
        make(name, "naiveSyncBN")


@each_head
def test_groups_that_do_not_divide_the_channels(name):
    with pytest.raises(InputError, match=rf"^KD.{config_key(name)}.NORM: GN has 32 groups, which do not divide"):
        make(name, "GN", teacher=50)


@each_head
def test_sync_bn_of_processes_without_gpus(name, monkeypatch):
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    told = rf"^KD.{config_key(name)}.NORM: SyncBN of several processes needs GPUs; on CPUs there are BN, GN and LN\.$"
    with pytest.raises(InputError, match=told):
        make(name, "SyncBN")
    make(name, "SyncBN", device="cuda")


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_softmax_regression_takes_part_in_every_synchronisation(rows, monkeypatch):
    """Other processes wait for the statistics of this one, however few boxes it has."""
    head = make("SoftmaxRegressionHead", "SyncBN").train()
    modes = []
    monkeypatch.setattr(nn.SyncBatchNorm, "forward", lambda norm, x: modes.append(norm.training) or x)
    for processes in (1, 2):
        monkeypatch.setattr(comm, "get_world_size", lambda processes=processes: processes)
        head.connect(torch.zeros(rows, 64))
    assert modes == [rows > 1, True]
