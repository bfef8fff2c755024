"""Soft targets of classes, with a mistaken teacher corrected and a temperature for each row where that is asked for."""

from collections.abc import Collection

import torch
from detectron2.utils.events import get_event_storage, has_event_storage
from torch import Tensor

from kd_det.errors import InputError
from kd_det.losses import adjust_label_smoothing, adjust_probability_shift, dynamic_temperature, soft_target_loss
from kd_det.losses.numerics import cast_up

ADJUST = ("none", "probability_shift", "label_smoothing")
DYNAMIC_TEMPERATURE = ("none", "flsw", "cwsm")


class ClassTargets:
    """Compares class logits at a temperature (Hinton et al., 2015), with two amendments of Wen et al.

    "Preparing Lessons" (Wen et al., 2019, https://arxiv.org/abs/1911.07471):

    * Knowledge adjustment (KA) corrects the rows whose most probable class for the teacher is not the labelled one.
      "probability_shift" swaps these two classes' probabilities. "label_smoothing" puts a smoothed label in their
      place; that is no softened prediction, so such a row goes without the factor T^2, by which it would drown the
      others.
    * Dynamic temperature distillation (DTD) gives each row its own T, lower for confusing ones: those where student and
      teacher disagree ("flsw", on the teacher's uncorrected logits) or where the student is unsure ("cwsm"). It is
      kept within min(1, T / 2) and 2 T; the scalar ``kd/dtd_clamped`` is the share of rows at these bounds. Whether the
      paper has the factor T^2 is not known; public code of DTD has not (`squared_temperature`).

    Both apply to some of the rows: on boxes to the foreground. Of background boxes many lie on an object that the
    teacher rightly sees, and they would rule the mean that DTD's temperatures are relative to; they keep T.

    Args:
        temperature: T.
        squared_temperature: Whether each row's divergence is multiplied by its T^2.
        adjust: "none", "probability_shift" or "label_smoothing".
        correct_prob: Probability of the label in a smoothed one.
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

    def __call__(self, own: Tensor, other: Tensor, labels: Tensor | None, rows: Tensor, weights: Tensor) -> Tensor:
        """The divergence of the student from the teacher, by default times T^2, mean over rows.

        Args:
            own: Logits of the student, (N, K).
            other: Logits of the teacher, (N, K).
            labels: True classes (N,); KA alone needs them.
            rows: Booleans (N,): where KA and DTD apply.
            weights: Factor of each row, (N,).
        """
        temperatures = self._temperatures(own, other, rows)
        squared = torch.full_like(rows, self.squared_temperature)
        if self.adjust != "none":
            other, mistaken = self._correct(other.detach().to(temperatures), labels, rows, temperatures)
            if self.adjust == "label_smoothing":
                squared &= ~mistaken
        weights = weights * torch.where(squared, 1.0, temperatures**-2)
        return soft_target_loss(own, other, temperature=temperatures, weights=weights)

    def _temperatures(self, own: Tensor, other: Tensor, rows: Tensor) -> Tensor:
        """Temperature of each row, (N,)."""
        # In half precision the rows' weights would lose their accuracy.
        temperatures = torch.full(own.shape[:1], self.temperature, dtype=cast_up(own).dtype, device=own.device)
        if self.dynamic_temperature == "none":
            return temperatures
        low, high = min(1.0, self.temperature / 2), 2.0 * self.temperature
        found = dynamic_temperature(
            own[rows],
            other[rows],
            kind=self.dynamic_temperature,
            base=self.temperature,
            beta=self.beta,
            gamma=self.gamma,
            bounds=(low, high),
        )
        if has_event_storage():
            clamped = ((found <= low) | (found >= high)).sum() / max(len(found), 1)
            get_event_storage().put_scalar("kd/dtd_clamped", clamped)
        temperatures[rows] = found.to(temperatures)
        return temperatures

    def _correct(self, other: Tensor, labels: Tensor, rows: Tensor, temperatures: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher's logits with its mistakes corrected, and in which rows it made them."""
        probs = (other / temperatures[:, None]).softmax(dim=1)
        mistaken = rows & (probs.argmax(dim=1) != labels)
        if self.adjust == "probability_shift":
            probs = adjust_probability_shift(probs, labels)
        else:
            probs = adjust_label_smoothing(probs, labels, correct_prob=self.correct_prob)
        return torch.where(mistaken[:, None], temperatures[:, None] * probs.log(), other), mistaken


def check_class_targets(node, sources: Collection[str]) -> dict:
    """Check the keys of KA and DTD.

    Args:
        node: ``KD.SOFT_TARGET``.
        sources: The sources that are compared by a softmax over classes.

    Returns:
        The arguments of :class:`ClassTargets` that they give.

    Raises:
        InputError: If a value is not allowed, or has nothing to act on.
    """
    for key, allowed in (("ADJUST", ADJUST), ("DYNAMIC_TEMPERATURE", DYNAMIC_TEMPERATURE)):
        if node[key] not in allowed:
            raise InputError(f"KD.SOFT_TARGET.{key}: {node[key]!r} is not one of {', '.join(allowed)}.")
        if node[key] != "none" and not sources:
            raise InputError(
                f"KD.SOFT_TARGET.{key}: {node[key]!r} is for the sources roi and cls, "
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
