"""The pretended GPU waits and counts as a real one does."""

import pytest
import torch
from pretended_gpu import PretendedGPU, to_gpu
from torch import nn

CUDA = torch.device("cuda", 0)
WAITING = {
    "item": lambda x: x.sum().item(),
    "branch": lambda x: bool(x.sum() > 0),
    "copy to the host": lambda x: x.cpu(),
    "boolean index": lambda x: x[x > 0],
    "nonzero": lambda x: x.nonzero(),
    "index on the host": lambda x: x[torch.tensor([0])],
    "unique": lambda x: x.unique(),
    "copy to the device": lambda x: x + torch.ones(3).to(CUDA),
    "numbers of the host": lambda x: x + torch.tensor([1.0, 2.0, 3.0], device=CUDA),
}
GOING_ON = {
    "arithmetic": lambda x: (x * 2 + torch.ones(3, device=CUDA)).sum(),
    "mask": lambda x: x.masked_fill(x > 0, 0),
    "choice": lambda x: torch.where(x > 0, x, 0.0),
    "index on the device": lambda x: x[torch.arange(2, device=CUDA)],
    "copy that does not block": lambda x: x + torch.ones(3).to(CUDA, non_blocking=True),
    "a number of the host": lambda x: x + torch.tensor(2.0),
}
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("operation", WAITING.values(), ids=WAITING)
def test_waits(operation):
    with PretendedGPU() as gpu:
        operation(torch.arange(3.0, device=CUDA))
    assert len(gpu.waits) == 1
    assert gpu.waits[0].code == "test_pretended_gpu.py:<lambda>"


@pytest.mark.parametrize("operation", GOING_ON.values(), ids=GOING_ON)
def test_goes_on(operation):
    with PretendedGPU() as gpu:
        operation(torch.arange(3.0, device=CUDA))
    assert gpu.waits == []


@on_gpu
@pytest.mark.parametrize("operation", [*WAITING.values(), *GOING_ON.values()], ids=[*WAITING, *GOING_ON])
def test_waits_are_those_of_a_real_gpu(operation):
    x = torch.arange(3.0, device=CUDA)
    torch.cuda.set_sync_debug_mode("error")
    try:
        if operation in WAITING.values():
            with pytest.raises(RuntimeError, match="synchronizing"):
                operation(x)
        else:
            operation(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_kernels_are_operations_that_compute():
    with PretendedGPU() as gpu:
        x = torch.empty(2, 3, device=CUDA)
        with gpu.part("views"):
            x.view(3, 2).T[1:].unsqueeze(0).expand(4, 1, 3)
        with gpu.part("sums"):
            (x + x).sum()
    assert gpu.kernels["views"] == 0
    assert gpu.kernels["sums"] == 2


def test_devices_do_not_mix():
    with PretendedGPU(), pytest.raises(RuntimeError, match=r"aten.add.Tensor at test_pretended_gpu.py:.* both devices"):
        torch.ones(2, device=CUDA) + torch.ones(2)


def test_values_and_gradients_are_real():
    torch.manual_seed(0)
    layer, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.BatchNorm1d(4)), torch.rand(5, 3)
    layer(x).square().sum().backward()
    expected, running = [p.grad.clone() for p in layer.parameters()], layer[2].running_mean.clone()
    layer[2].reset_running_stats()
    with PretendedGPU():
        to_gpu(layer)
        layer(to_gpu(x)).square().sum().backward()
    torch.testing.assert_close([p.grad.values for p in layer.parameters()], expected)
    torch.testing.assert_close(layer[2].running_mean.values, running)
