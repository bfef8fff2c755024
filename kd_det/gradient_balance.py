"""Steers the weights of heads so that each has the share of the gradient that was asked for."""

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import nn

from kd_det.errors import InputError
from kd_det.gradients import has_frozen_backbone
from kd_det.heads.build import has_stage, student_signals, teacher_signals
from kd_det.registry import config_key
from kd_det.schedules import WeightSchedule

logger = logging.getLogger(__name__)
# Iterations from one measurement to the next where KD.GRADIENT_SHARES does not say.
DEFAULT_PERIOD = 50
# Least weight of a new measurement in the running mean: it follows the drift of a training, and averages the noise of
# single batches over about 2 / RATE - 1 = 7 measurements.
RATE = 0.25
# After the first measurement, an update multiplies or divides the estimate of a ratio by this at most.
LARGEST_CHANGE = 2.0


class GradientBalance:
    """Steers the weights of heads by their shares of the gradient in the student's backbone.

    As in :class:`kd_det.gradients.GradientShares`, the share of a group of losses is the norm of its gradient, divided
    by the sum of the norms of all groups. Let u_i be the norm of the gradient of steered head i at weight 1, and R the
    sum of the norms of all other groups: the task and the heads that are not steered. Where s_i is the share that head
    i should have and f_i the factor of its schedule, which is 0 for an idle head and 1 for a constant schedule, the
    weights

        f_i w_i  with  w_i = s_i / (1 - sum_j f_j s_j) * R / u_i

    give each head exactly the share f_i s_i. The ratio R / u_i does not depend on any steered weight. Each measurement
    gives one value of it, and the logarithms enter a running mean in which the n-th measurement has the weight
    2 / (n + 1), but at least RATE: at first the ratio changes fast, and later measurements count more in the mean. The
    first measurement is taken as it is; after it, no update changes the estimate of a ratio by more than a factor of
    LARGEST_CHANGE. Until a head has been measured it has the weight of its schedule.

    A measurement in which the gradient of a head or of the others is zero or not finite changes nothing.

    Args:
        shares: Maps the names of the steered heads to their shares, which are above 0 and sum to less than 1.
        schedules: Maps the name of a head to its schedule; a head without one has a constant weight.

    Raises:
        InputError: If the shares are not such shares.
    """

    # Checkpoints that were written before there was a share do not have this part.
    optional = True

    def __init__(self, shares: Mapping[str, float], schedules: Mapping[str, WeightSchedule] | None = None):
        self.shares = dict(shares)
        self.schedules = {name: (schedules or {}).get(name, WeightSchedule()) for name in self.shares}
        # Maps each head whose gradient was measured to the number of valid measurements and the mean logarithm.
        self.ratios: dict[str, tuple[int, float]] = {}
        for name, share in self.shares.items():
            if not 0 < share < 1:
                raise InputError(f"{share_key(name)}: must be 0 (off) or more and below 1, got {share}.")
        if sum(self.shares.values()) >= 1:
            given = ", ".join(f"{name} {share:g}" for name, share in self.shares.items())
            raise InputError(
                "KD.*.SCHEDULE.GRADIENT_SHARE: the shares must sum to less than 1, which leaves the rest to the "
                f"student's own losses; got {given}."
            )

    def weights(self, iteration: int) -> dict[str, float]:
        """Computes the weights of the steered heads at an iteration."""
        factors = {name: replace(schedule, weight=1.0)(iteration) for name, schedule in self.schedules.items()}
        rest = 1 - sum(factors[name] * share for name, share in self.shares.items())
        weights = {}
        for name, schedule in self.schedules.items():
            count, ratio = self.ratios.get(name, (0, 0.0))
            steered = factors[name] * self.shares[name] / rest * math.exp(ratio)
            weights[name] = steered if count else schedule(iteration)
        return weights

    def steers(self, heads: Iterable[str]) -> bool:
        """Reports whether any of these heads is steered."""
        return not self.shares.keys().isdisjoint(heads)

    def is_due(self, iteration: int) -> bool:
        """Reports whether a head acts that was never measured: it is at its START, or its share is new."""
        return any(weight > 0 and name not in self.ratios for name, weight in self.weights(iteration).items())

    def update(self, norms: Mapping[str, float | None], iteration: int) -> dict[str, float]:
        """Takes the measurement of an iteration into account; all processes must call this together.

        Args:
            norms: Maps the groups of losses to the norms of their gradients, which were measured with
                :meth:`weights`; None for losses that do not reach the backbone. Idle heads are left out.
            iteration: The iteration.

        Returns:
            The norms with the weights that hold from now on, averaged over the processes.

        Raises:
            InputError: If the losses of a steered head do not reach the backbone, or only steered heads reach it.
        """
        for name in self.shares:
            if name in norms and norms[name] is None:
                raise InputError(
                    f"{share_key(name)}: got {self.shares[name]}, but the gradient of {name} does not reach the "
                    "student's backbone; allowed is 0."
                )
        averaged = average_over_processes({name: norm or 0.0 for name, norm in norms.items()})
        before = self.weights(iteration)
        steered = [name for name in self.shares if name in averaged]
        rest = sum(norm for name, norm in averaged.items() if name not in steered)
        if rest == 0 and not any(count for count, _ in self.ratios.values()):
            raise InputError(
                f"{share_key(steered[0])}: got {self.shares[steered[0]]}, but nothing except heads with a share has a "
                "gradient in the student's backbone, so that no weight changes the shares; allowed is 0."
            )
        for name in steered:
            self._add(name, rest * before[name], averaged[name])
        after = self.weights(iteration)
        logger.info("Weights for these shares: %s", ", ".join(f"{name} {after[name]:.4g}" for name in steered))
        return averaged | {name: averaged[name] * after[name] / before[name] for name in steered}

    def _add(self, name: str, rest: float, norm: float) -> None:
        """Adds a measurement of ``rest / norm`` to the mean of its logarithm."""
        count, mean = self.ratios.setdefault(name, (0, 0.0))
        if not (0 < rest < math.inf and 0 < norm < math.inf):
            return
        change = (math.log(rest / norm) - mean) * max(2 / (count + 2), RATE)
        if count:
            bound = math.log(LARGEST_CHANGE)
            change = min(max(change, -bound), bound)
        self.ratios[name] = count + 1, mean + change

    def state_dict(self) -> dict[str, list]:
        """Maps each head to the number of its measurements and the mean logarithm of its ratio."""
        return {name: list(ratio) for name, ratio in self.ratios.items()}

    def load_state_dict(self, state: Mapping[str, list]) -> None:
        """Restores the means; those of heads that are not steered now are left out.

        Raises:
            ValueError: If the state is not one of :meth:`state_dict`.
        """
        ratios = {name: (count, mean) for name, (count, mean) in state.items() if name in self.shares}
        for name, (count, mean) in ratios.items():
            if not (type(count) is int and count >= 0 and isinstance(mean, float) and math.isfinite(mean)):
                raise ValueError(f"the measured gradient of {name} is {(count, mean)!r}")
        self.ratios = ratios


def average_over_processes(values: Mapping[str, float]) -> dict[str, float]:
    """Averages numbers over all processes, which get the same results, bit for bit."""
    if comm.get_world_size() == 1:
        return dict(values)
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    total = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return dict(zip(values, (total / comm.get_world_size()).tolist(), strict=True))


def share_key(name: str) -> str:
    """Returns the config key of a head's share."""
    return f"KD.{config_key(name)}.SCHEDULE.GRADIENT_SHARE"


def build_gradient_balance(
    cfg: CfgNode, student: nn.Module, heads: Mapping[str, nn.Module], schedules: Mapping[str, WeightSchedule]
) -> GradientBalance:
    """Builds what steers the heads whose SCHEDULE has a GRADIENT_SHARE.

    Args:
        student: The student.
        heads: The heads by their names.
        schedules: The schedule of each head.

    Raises:
        InputError: If a share cannot be held, because of its value, the head, the student, or the other losses.
    """
    # A user's head may have a default SCHEDULE without the key.
    shares = {name: cfg.KD[config_key(name)].SCHEDULE.get("GRADIENT_SHARE", 0.0) for name in heads}
    shares = {name: share for name, share in shares.items() if share != 0}
    balance = GradientBalance(shares, schedules)
    for name, share in shares.items():
        if has_frozen_backbone(student):
            raise InputError(f"{share_key(name)}: got {share}, but the student's backbone is frozen; allowed is 0.")
        if has_stage(heads[name]) and not (student_signals(heads[name]) or teacher_signals(heads[name])):
            raise InputError(
                f"{share_key(name)}: got {share}, but {name} acts in the pre-training stage only; allowed is 0."
            )
        if schedules[name].weight == 0:
            raise InputError(
                f"KD.{config_key(name)}.WEIGHT: must be above 0 with SCHEDULE.GRADIENT_SHARE {share}, got 0."
            )
    if shares and cfg.KD.TASK_WEIGHT == 0 and len(shares) == len(heads):
        raise InputError(
            f"{share_key(next(iter(shares)))}: got {next(iter(shares.values()))}, but with KD.TASK_WEIGHT 0 there is "
            "no loss beside those of heads with a share; allowed is 0."
        )
    return balance
