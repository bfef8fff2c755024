"""ReviewKD computes its fusion modules once more in the backward pass, if asked to."""

import pytest
import torch
from torch import nn

from kd_det import Batch, InputError, build_kd_heads
from kd_det.benchmarking.head_memory import recording_kept_memory

from .cases import STUDENT, TEACHER, make_cfg, make_head
from .signals import make_input, make_signals


@pytest.mark.parametrize("norm", ["BN", "LN"])
@pytest.mark.parametrize("half", [False, True])
def test_recomputed_fusions_change_no_number(norm, half):
    """Neither losses, nor gradients, nor running statistics; and what is kept is less."""
    results, kept = [], []
    for recompute in (False, True):
        head = make_head("ReviewKDHead", {"MID_CHANNELS": 8, "NORM": norm, "RECOMPUTE": recompute})
        student, teacher = (make_signals(spec, seed=seed) for seed, spec in enumerate((STUDENT, TEACHER)))
        for name in head.signals:
            student[name].requires_grad_()
        batch = Batch.from_inputs([make_input(64, 128), make_input(40, 96)], mask_padding=True)
        with recording_kept_memory(nn.ModuleDict({"head": head})) as sizes, torch.autocast("cpu", torch.bfloat16, half):
            losses = head(student, teacher, batch)
        # Gradients may be measured before the backward pass.
        torch.autograd.grad(losses["loss_kd_review"], student["p2"], retain_graph=True)
        losses["loss_kd_review"].backward()
        gradients = [x.grad for x in (*head.parameters(), *(student[name] for name in head.signals))]
        results.append([losses["loss_kd_review"].detach(), *gradients, *head.buffers()])
        kept.append(sizes["head"])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert kept[1] < 0.1 * kept[0]


def test_compiled_heads_are_not_recomputed():
    cfg = make_cfg("ReviewKDHead", {"RECOMPUTE": True})
    cfg.KD.COMPILE_HEADS = True
    with pytest.raises(InputError, match=r"^KD\.REVIEW\.RECOMPUTE: must be False where KD\.COMPILE_HEADS is True"):
        build_kd_heads(cfg, STUDENT, TEACHER)
