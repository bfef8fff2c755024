"""Normalisation in heads: every head that has one has the same choices, and builds what was asked for."""

import pytest
import torch
from detectron2.utils import comm
from torch import nn

from kd_det import InputError, build_kd_heads
from kd_det.heads.norms import BatchNorm2d, GroupNorm, SyncBatchNorm, build_norm
from kd_det.registry import config_key

from .cases import NAMES, NORMALISED, make_cfg, own_options
from .signals import make_spec

LAYERS = {"BN": BatchNorm2d, "SyncBN": SyncBatchNorm, "GN": GroupNorm}
STOCK = {"BN": nn.BatchNorm2d, "SyncBN": nn.SyncBatchNorm, "GN": nn.GroupNorm}
each_head = pytest.mark.parametrize("name", [name for name in NAMES if "NORM" in own_options(name)])


def make(name, norm, *, student=64, teacher=32, device="cpu"):
    cfg = make_cfg(name, NORMALISED.get(name, {}) | {"NORM": norm})
    cfg.MODEL.DEVICE = device
    return build_kd_heads(cfg, make_spec(student), make_spec(teacher))[name]


@each_head
@pytest.mark.parametrize("norm", LAYERS)
def test_the_layers_are_those_asked_for(name, norm):
    layers = [x for x in make(name, norm).modules() if isinstance(x, tuple(STOCK.values()))]
    assert layers, f"name the options with which {name} has such layers in NORMALISED of tests/heads/cases.py"
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


@pytest.mark.parametrize("norm", ["BN", "SyncBN", "GN", "LN"])
@pytest.mark.parametrize("shape", [(1, 32, 1, 1), (0, 32, 4, 4)])
def test_too_few_values(norm, shape):
    """They are normalised as in evaluation, and leave the running statistics as they are."""
    layer = build_norm(norm, 32).train()
    state = {key: value.clone() for key, value in layer.state_dict().items()}
    x = torch.randn(shape, requires_grad=True)
    found = layer(x)
    found.sum().backward()
    assert layer.training
    assert all(torch.equal(value, state[key]) for key, value in layer.state_dict().items())
    assert torch.equal(found, layer.eval()(x))
    assert layer.weight.grad.isfinite().all()


@pytest.mark.parametrize("norm", STOCK)
def test_more_values_are_normalised_as_by_torch(norm):
    own = build_norm(norm, 32)
    stock = nn.GroupNorm(32, 32) if norm == "GN" else STOCK[norm](32)
    x = torch.randn(2, 32, 3, 1, generator=torch.Generator().manual_seed(0))
    for mode in (True, False):
        assert torch.equal(own.train(mode)(x), stock.train(mode)(x))
    assert own.state_dict().keys() == stock.state_dict().keys()
    assert all(torch.equal(value, stock.state_dict()[key]) for key, value in own.state_dict().items())


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_every_process_takes_part_in_every_synchronisation(rows, monkeypatch):
    """Other processes wait for the statistics of this one, however few values it has."""
    layer, calls = build_norm("SyncBN", 32).train(), []
    monkeypatch.setattr(nn.SyncBatchNorm, "forward", lambda norm, x: calls.append(norm.training) or x)
    for processes in (1, 2):
        monkeypatch.setattr(comm, "get_world_size", lambda processes=processes: processes)
        layer(torch.zeros(rows, 32, 1, 1))
    assert calls == [True] * (2 if rows > 1 else 1)
