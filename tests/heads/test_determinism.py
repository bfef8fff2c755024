"""No head has an operation that PyTorch refuses on a GPU in deterministic mode, and all of them work in that mode."""

import pytest
import torch
from detectron2.utils.events import EventStorage
from torch.utils._python_dispatch import TorchDispatchMode

from kd_det import Batch
from kd_det.heads.build import freeze_pretrained

from .cases import CASES, STUDENT, TEACHER, each, make_head
from .signals import make_input, make_signals

# From the documentation of torch.use_deterministic_algorithms. Bilinear interpolation, which it names, is replaced on a
# GPU by a deterministic form.
REFUSED = {
    "_adaptive_avg_pool2d_backward.default",
    "_adaptive_avg_pool3d_backward.default",
    "adaptive_max_pool2d_backward.default",
    "avg_pool3d_backward.default",
    "grid_sampler_2d_backward.default",
    "histc.default",
    "max_unpool2d.default",
    "median.dim",
    "nll_loss2d_forward.default",
    "put_.default",
    "reflection_pad2d_backward.default",
    "scatter_reduce.two",
    "upsample_bicubic2d_backward.default",
    "upsample_linear1d_backward.default",
}


class Recorded(TorchDispatchMode):
    """Collects the names of all operations inside, forward and backward."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(str(function).removeprefix("aten."))
        return function(*args, **(kwargs or {}))


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_operations_are_seen():
    x = torch.randn(1, 1, 5, 5, requires_grad=True)
    with Recorded() as recorded:
        torch.nn.functional.adaptive_avg_pool2d(x, 2).sum().backward()
    assert recorded.names & REFUSED == {"_adaptive_avg_pool2d_backward.default"}


@pytest.mark.usefixtures("deterministic")
@each([case for case in CASES if "SyncBN" not in case[1]])
def test_heads_have_deterministic_operations_alone(name, options):
    head = make_head(name, options)
    freeze_pretrained(head)
    student, teacher = (make_signals(spec, seed=seed) for seed, spec in enumerate((STUDENT, TEACHER)))
    for x in student.values():
        x.requires_grad_(x.is_floating_point())
    batch = Batch.from_inputs(
        [make_input(64, 128, [4, 4, 40, 40]), make_input(40, 96, [8, 8, 30, 30])], mask_padding=True
    )
    with EventStorage(), Recorded() as recorded:
        sum(head(student, teacher, batch).values()).backward()
    assert not recorded.names & REFUSED
