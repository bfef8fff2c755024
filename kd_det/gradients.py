"""Measures how much each loss contributes to the gradient in a student."""

import logging
from collections.abc import Mapping, Sequence

import torch
from detectron2.config import CfgNode
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from kd_det.errors import InputError

logger = logging.getLogger(__name__)
# Keeps half-precision gradients from vanishing, with room below their largest value; shares do not depend on it.
SCALE = 1024.0


class GradientShares:
    """Measures periodically the share of each group of losses in the gradient of the student's backbone.

    The backbone is where all losses meet; most distillation losses never reach later layers such as the box predictor.
    A group's share is the norm of the gradient of its losses, divided by the sum of the norms of all groups, so 50 %
    does not mean that two groups pull in the same direction.

    Shares are measured on the images of one process, and with SOLVER.ACCUMULATE on the first part of them. Training
    goes on as if nothing had been measured: no ``.grad`` is touched, no hook of DDP runs and no random number is drawn.
    A measurement costs one more backward pass per group.

    Args:
        period: Iterations from one measurement to the next; 0 measures nothing.
    """

    def __init__(self, period: int = 0):
        self.period = period
        # Maps each suffix to the last iteration that was measured.
        self.last: dict[str, int] = {}

    def is_due(self, iteration: int, suffix: str = "") -> bool:
        """Reports whether to measure now: once per iteration, and not while precise batch norm runs the model.

        Args:
            iteration: The current iteration of the run.
            suffix: The suffix that :meth:`measure` will get.
        """
        if self.period == 0 or iteration % self.period or not torch.is_grad_enabled():
            return False
        return self.last.get(suffix) != iteration

    def measure(self, student: nn.Module, groups: Mapping[str, Sequence[Tensor]], suffix: str = "") -> None:
        """Writes the shares to the event storage as ``kd/gradient/<group><suffix>``, and to the log.

        Args:
            student: A model with a ``backbone``.
            groups: Maps the name of each group to its scalar losses; their graphs are kept.
            suffix: Distinguishes several students.
        """
        storage = get_event_storage()
        self.last[suffix] = storage.iter
        measured = gradient_shares(student.get_submodule("backbone"), groups)
        shares = {f"{name}{suffix}": share for name, share in measured.items()}
        storage.put_scalars(smoothing_hint=False, **{f"kd/gradient/{name}": share for name, share in shares.items()})
        message = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
        logger.info("Shares of the gradient in the backbone at iteration %d: %s", storage.iter, message)


def gradient_shares(module: nn.Module, groups: Mapping[str, Sequence[Tensor]]) -> dict[str, float]:
    """Computes the share of each group of losses in the gradient of a module's parameters; the shares sum to 1.

    Args:
        module: A module with trainable parameters.
        groups: Maps the name of each group to its scalar losses.

    Returns:
        The shares by the groups' names: 0 for losses that do not reach the module, and NaN for all groups if no loss
        reaches it or a gradient overflows.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    norms = torch.tensor([gradient_norm(losses, parameters) for losses in groups.values()])
    return dict(zip(groups, (norms / norms.sum()).tolist(), strict=True))


def gradient_norm(losses: Sequence[Tensor], parameters: Sequence[Tensor]) -> float:
    """Computes the norm of the gradient of SCALE times the sum of losses."""
    losses = [loss.float() for loss in losses if loss.requires_grad]
    if not losses:
        return 0.0
    gradients = torch.autograd.grad(SCALE * torch.stack(losses).sum(), parameters, retain_graph=True, allow_unused=True)
    return float(nn.utils.get_total_norm([gradient for gradient in gradients if gradient is not None]))


def build_gradient_shares(cfg: CfgNode, *students: nn.Module) -> GradientShares:
    """Builds the measurement that ``KD.GRADIENT_SHARES`` asks for.

    Raises:
        InputError: If the period is negative, or the backbone of a student is frozen.
    """
    period = cfg.KD.GRADIENT_SHARES
    if period < 0:
        raise InputError(f"KD.GRADIENT_SHARES: must be 0 (never) or a number of iterations, got {period}.")
    backbones = [student.get_submodule("backbone") for student in students] if period else []
    if not all(any(p.requires_grad for p in backbone.parameters()) for backbone in backbones):
        raise InputError(f"KD.GRADIENT_SHARES: got {period}, but a student's backbone is frozen; 0 is allowed.")
    return GradientShares(period)
