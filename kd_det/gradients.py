"""Measures how much each loss contributes to the gradient in a student."""

import logging
import math
from collections.abc import Mapping, Sequence

import torch
from detectron2.config import CfgNode
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from kd_det.errors import InputError

logger = logging.getLogger(__name__)
# Factors of a loss, tried in this order until its gradient is finite. The first keeps half-precision gradients from
# vanishing, with room below their largest value; the others are for large weights. Norms do not depend on them.
SCALES = (2.0**10, 1.0, 2.0**-10)


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

    def is_due(self, iteration: int, suffix: str = "", *, early: bool = False) -> bool:
        """Reports whether to measure now: once per iteration, and not while precise batch norm runs the model.

        Args:
            iteration: The current iteration of the run.
            suffix: The suffix that :meth:`measure` will get.
            early: Whether to measure between the periods, too.
        """
        if not torch.is_grad_enabled() or self.last.get(suffix) == iteration:
            return False
        return early or (self.period > 0 and iteration % self.period == 0)

    def measure(
        self, student: nn.Module, groups: Mapping[str, Sequence[Tensor]], suffix: str = ""
    ) -> dict[str, float | None]:
        """Measures the norm of the gradient of each group; see :func:`gradient_norms`.

        Args:
            student: A model with a ``backbone``.
            groups: Maps the name of each group to its scalar losses; their graphs are kept.
            suffix: Distinguishes several students.
        """
        self.last[suffix] = get_event_storage().iter
        return gradient_norms(student.get_submodule("backbone"), groups)

    def log(self, norms: Mapping[str, float | None], suffix: str = "") -> None:
        """Writes the shares to the event storage as ``kd/gradient/<group><suffix>``, and to the log.

        Args:
            norms: Maps the name of each group to the norm of its gradient.
            suffix: Distinguishes several students.
        """
        storage = get_event_storage()
        shares = {f"{name}{suffix}": share for name, share in to_shares(norms).items()}
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
    return to_shares(gradient_norms(module, groups))


def to_shares(norms: Mapping[str, float | None]) -> dict[str, float]:
    """Divides norms by their sum; None counts as 0."""
    values = torch.tensor([norm or 0.0 for norm in norms.values()])
    return dict(zip(norms, (values / values.sum()).tolist(), strict=True))


def gradient_norms(module: nn.Module, groups: Mapping[str, Sequence[Tensor]]) -> dict[str, float | None]:
    """Computes the norm of the gradient of each group of losses in a module's parameters.

    Args:
        module: A module with trainable parameters.
        groups: Maps the name of each group to its scalar losses; their graphs are kept.

    Returns:
        The norms by the groups' names: None for losses whose gradient does not reach the module, and infinity or NaN
        for a gradient that overflows.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    return {name: gradient_norm(losses, parameters) for name, losses in groups.items()}


def gradient_norm(losses: Sequence[Tensor], parameters: Sequence[Tensor]) -> float | None:
    """Computes the norm of the gradient of the sum of losses; see :func:`gradient_norms`."""
    losses = [loss.float() for loss in losses if loss.requires_grad]
    if not losses:
        return 0.0
    total, norm = torch.stack(losses).sum(), math.nan
    for scale in SCALES:
        gradients = torch.autograd.grad(scale * total, parameters, retain_graph=True, allow_unused=True)
        reached = [gradient for gradient in gradients if gradient is not None]
        if not reached:
            return None
        norm = float(nn.utils.get_total_norm(reached)) / scale
        if math.isfinite(norm):
            break
    return norm


def build_gradient_shares(cfg: CfgNode, *students: nn.Module, default: int = 0) -> GradientShares:
    """Builds the measurement that ``KD.GRADIENT_SHARES`` asks for.

    Args:
        default: The period if the key is 0.

    Raises:
        InputError: If the period is negative, or the backbone of a student is frozen.
    """
    period = cfg.KD.GRADIENT_SHARES
    if period < 0:
        raise InputError(f"KD.GRADIENT_SHARES: must be 0 (never) or a number of iterations, got {period}.")
    if period and any(has_frozen_backbone(student) for student in students):
        raise InputError(f"KD.GRADIENT_SHARES: got {period}, but a student's backbone is frozen; 0 is allowed.")
    return GradientShares(period or default)


def has_frozen_backbone(student: nn.Module) -> bool:
    """Reports whether no parameter of a student's backbone is trained."""
    return not any(p.requires_grad for p in student.get_submodule("backbone").parameters())
