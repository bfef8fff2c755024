"""Compares class logits by soft targets, optionally with a corrected teacher and a temperature for each row."""

from collections.abc import Collection

import torch
from torch import Tensor

from kd_det.errors import InputError, check_choice
from kd_det.heads.scalars import log_scalar
from kd_det.losses import adjust_label_smoothing, adjust_probability_shift, dynamic_temperature, soft_target_loss
from kd_det.losses.numerics import cast_up
from kd_det.signals import SOFTMAX_SOURCES

ADJUST = ("none", "probability_shift", "label_smoothing")
DYNAMIC_TEMPERATURE = ("none", "flsw", "cwsm")


class ClassTargets:
    """Compares class logits at a temperature (Hinton et al., 2015), with two options of Wen et al.

    The options are those of "Preparing Lessons" (Wen et al., 2019, https://arxiv.org/abs/1911.07471):

    * Knowledge adjustment (KA) corrects the rows in which the teacher's most probable class is not the labelled one.
      "probability_shift" swaps the probabilities of these two classes. "label_smoothing" replaces the row with a
      smoothed label; since that is not a softened prediction, the row does not get the factor T^2, with which it would
      drown the others.
    * Dynamic temperature distillation (DTD) gives each row its own T, lower for confusing rows: those where student and
      teacher disagree ("flsw", on the teacher's uncorrected logits) or where the student is unsure ("cwsm"). The result
      is clamped between min(1, T / 2) and 2 T; the scalar ``kd/dtd_clamped`` is the share of rows at these bounds. It
      is not known whether the paper has the factor T^2; public code of DTD does not (`squared_temperature`).

    Both apply to some of the rows only: for boxes, to the foreground. Many background boxes overlap an object that the
    teacher rightly detects; they would dominate the mean in DTD, so they keep T.

    Args:
        temperature: T.
        squared_temperature: Whether each row's divergence is multiplied by its T^2.
        adjust: "none", "probability_shift" or "label_smoothing".
        correct_prob: Probability of the label in a smoothed label.
        dynamic_temperature: "none", "flsw" or "cwsm".
        beta: Strength of the change of T.
        gamma: Exponent of "flsw".
    """

    def __init__(
        self,
        *,
        temperature: float,
        squared_temperature: bool = True,
        adjust: str = "none",
        correct_prob: float = 0.9,
        dynamic_temperature: str = "none",
        beta: float = 1.0,
        gamma: float = 2.0,
    ):
        self.temperature = temperature
        self.squared_temperature = squared_temperature
        self.adjust = adjust
        self.correct_prob = correct_prob
        self.dynamic_temperature = dynamic_temperature
        self.beta = beta
        self.gamma = gamma

    def __call__(
        self, s_logits: Tensor, t_logits: Tensor, labels: Tensor, rows: Tensor, weights: Tensor | None
    ) -> Tensor:
        """Computes the divergence of the student from the teacher, by default times T^2, mean over rows.

        Args:
            s_logits: Logits of the student, (N, K).
            t_logits: Logits of the teacher, (N, K).
            labels: True classes (N,); only KA needs them.
            rows: Booleans (N,), true for the rows to which KA and DTD apply.
            weights: Factor of each row, (N,); None for 1.
        """
        if self.dynamic_temperature == self.adjust == "none":
            loss = soft_target_loss(s_logits, t_logits, temperature=self.temperature, weights=weights)
            return loss if self.squared_temperature else loss * self.temperature**-2
        temperatures = self._temperatures(s_logits, t_logits, rows)
        squared = torch.full_like(rows, self.squared_temperature)
        if self.adjust != "none":
            t_logits, mistaken = self._correct(t_logits.detach().to(temperatures), labels, rows, temperatures)
            if self.adjust == "label_smoothing":
                squared &= ~mistaken
        factors = torch.where(squared, 1.0, temperatures**-2)
        weights = factors if weights is None else weights * factors
        return soft_target_loss(s_logits, t_logits, temperature=temperatures, weights=weights)

    def _temperatures(self, s_logits: Tensor, t_logits: Tensor, rows: Tensor) -> Tensor:
        """Computes the temperature of each row, (N,)."""
        # In half precision the weights of the rows would be inaccurate.
        dtype, device = cast_up(s_logits).dtype, s_logits.device
        temperatures = torch.full(s_logits.shape[:1], self.temperature, dtype=dtype, device=device)
        if self.dynamic_temperature == "none":
            return temperatures
        low, high = min(1.0, self.temperature / 2), 2.0 * self.temperature
        dynamic = dynamic_temperature(
            s_logits,
            t_logits,
            kind=self.dynamic_temperature,
            base=self.temperature,
            beta=self.beta,
            gamma=self.gamma,
            bounds=(low, high),
            rows=rows,
        )
        log_scalar("kd/dtd_clamped", lambda: share_of(rows, (dynamic <= low) | (dynamic >= high)))
        return torch.where(rows, dynamic.to(temperatures), temperatures)

    def _correct(self, t_logits: Tensor, labels: Tensor, rows: Tensor, temperatures: Tensor) -> tuple[Tensor, Tensor]:
        """Corrects the teacher's mistakes; returns its new logits and a mask of the rows with mistakes."""
        probs = (t_logits / temperatures[:, None]).softmax(dim=1)
        mistaken = rows & (probs.argmax(dim=1) != labels)
        if self.adjust == "probability_shift":
            probs = adjust_probability_shift(probs, labels)
        else:
            probs = adjust_label_smoothing(probs, labels, correct_prob=self.correct_prob)
        return torch.where(mistaken[:, None], temperatures[:, None] * probs.log(), t_logits), mistaken


def share_of(rows: Tensor, marked: Tensor) -> Tensor:
    """Computes the share of the true rows that are marked; 0 without rows."""
    return (rows & marked).sum() / rows.sum().clamp(min=1)


def check_class_targets(node, sources: Collection[str]) -> dict:
    """Checks the keys of KA and DTD.

    Args:
        node: ``KD.SOFT_TARGET``.
        sources: The sources that are compared by a softmax over classes.

    Returns:
        The arguments of :class:`ClassTargets` that follow from the keys.

    Raises:
        InputError: If a value is not allowed, or there is no source that it applies to.
    """
    for key, allowed in (("ADJUST", ADJUST), ("DYNAMIC_TEMPERATURE", DYNAMIC_TEMPERATURE)):
        check_choice(f"KD.SOFT_TARGET.{key}", node[key], allowed)
        if node[key] != "none" and not sources:
            raise InputError(
                f"KD.SOFT_TARGET.{key}: {node[key]!r} is for the sources {' and '.join(SOFTMAX_SOURCES)}, "
                f"but KD.SOFT_TARGET.SOURCES is {node.SOURCES}."
            )
    if not 0 < node.CORRECT_PROB <= 1:
        raise InputError(f"KD.SOFT_TARGET.CORRECT_PROB: must be above 0 and at most 1, got {node.CORRECT_PROB}.")
    if node.BETA < 0:
        raise InputError(f"KD.SOFT_TARGET.BETA: must be 0 or more, got {node.BETA}.")
    if node.GAMMA <= 0:
        raise InputError(f"KD.SOFT_TARGET.GAMMA: must be above 0, got {node.GAMMA}.")
    return {
        "adjust": node.ADJUST,
        "correct_prob": node.CORRECT_PROB,
        "dynamic_temperature": node.DYNAMIC_TEMPERATURE,
        "beta": node.BETA,
        "gamma": node.GAMMA,
    }
