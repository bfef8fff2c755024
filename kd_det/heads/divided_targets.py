"""Compares class logits by other divergences than that of soft targets: DKD, NKD, GDKD and DIST."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from kd_det.errors import InputError, check_choice
from kd_det.losses import between_groups_loss, correlation_loss, target_class_loss, within_group_loss
from kd_det.signals import SOFTMAX_SOURCES

DIVERGENCES = ("kl", "dkd", "nkd", "gdkd", "dist")
# Maps keys to the value that they must have, but with the divergences that can do more.
ONLY_WITH = {
    "ADJUST": ("none", ("kl",)),
    "DYNAMIC_TEMPERATURE": ("none", ("kl",)),
    "STANDARDIZE": (False, ("kl", "dkd")),
    "BACKGROUND_WEIGHT": (1.0, ("kl", "dkd", "gdkd")),
}


class DividedTargets:
    """Compares class logits by a loss of two or three terms, each with a weight of its own.

    * "dkd", decoupled knowledge distillation (Zhao et al., CVPR 2022, https://arxiv.org/abs/2203.08679): the labelled
      class against all others, and the others among themselves. Of a box that is labelled background, background is the
      labelled class.
    * "nkd", normalised knowledge distillation (Yang et al., ICCV 2023, https://arxiv.org/abs/2303.13005): the
      cross-entropy of the labelled class, weighted by the teacher's probability of it, at temperature 1, and the others
      among themselves. Of the second term the teacher's entropy, which has no gradient, is left out.
    * "gdkd", generalised decoupled knowledge distillation (https://github.com/ZaberKo/detectron2-gdkd): the teacher's
      most probable classes against the rest, and each of the two groups among themselves. It needs no labels.
    * "dist" (Huang et al., NeurIPS 2022, https://arxiv.org/abs/2205.10536): one minus the correlation of the
      probabilities along the classes of each row, and the same along the rows of each class.

    Args:
        kind: "dkd", "nkd", "gdkd" or "dist".
        temperature: T. The first term of "nkd" does not use it.
        squared_temperature: Whether what is computed at T is multiplied by T^2.
        target_weight: Weight of the first term.
        other_weight: Weight of the second term; of "gdkd" it is that of the less probable classes.
        top_weight: Weight of the most probable classes among themselves ("gdkd").
        top_k: Number of these classes.
    """

    def __init__(
        self,
        kind: str,
        *,
        temperature: float = 1.0,
        squared_temperature: bool = True,
        target_weight: float = 1.0,
        other_weight: float = 1.0,
        top_weight: float = 1.0,
        top_k: int = 5,
    ):
        self.compare = {"dkd": self._dkd, "nkd": self._nkd, "gdkd": self._gdkd, "dist": self._dist}[kind]
        self.temperature = temperature
        self.scale = 1.0 if squared_temperature else temperature**-2
        self.target_weight = target_weight
        self.other_weight = other_weight
        self.top_weight = top_weight
        self.top_k = top_k

    def __call__(
        self, s_logits: Tensor, t_logits: Tensor, labels: Tensor, rows: Tensor, weights: Tensor | None
    ) -> Tensor:
        """Computes the weighted sum of the terms, each a mean over rows.

        Args:
            s_logits: Logits of the student, (N, K).
            t_logits: Logits of the teacher, (N, K).
            labels: True classes (N,), of which "dkd" and "nkd" depend.
            rows: Not used; see :class:`kd_det.heads.targets.ClassTargets`.
            weights: Factor of each row, (N,), None for 1; "nkd" and "dist" do not use it.
        """
        return self.compare(s_logits, t_logits, labels, weights)

    def _dkd(self, s_logits: Tensor, t_logits: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
        others = not_labelled(s_logits, labels)
        options: dict[str, Any] = {"temperature": self.temperature, "weights": weights}
        target = between_groups_loss(s_logits, t_logits, others.long(), count=2, **options)
        return self.scale * (
            self.target_weight * target + self.other_weight * within_group_loss(s_logits, t_logits, others, **options)
        )

    def _nkd(self, s_logits: Tensor, t_logits: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
        others = not_labelled(s_logits, labels)
        target = target_class_loss(s_logits, t_logits, labels)
        other = within_group_loss(s_logits, t_logits, others, temperature=self.temperature)
        return self.target_weight * target + self.scale * self.other_weight * other

    def _gdkd(self, s_logits: Tensor, t_logits: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
        top = torch.zeros_like(t_logits, dtype=torch.bool)
        top.scatter_(1, t_logits.detach().topk(self.top_k, dim=1).indices, True)
        options: dict[str, Any] = {"temperature": self.temperature, "weights": weights}
        return self.scale * (
            self.target_weight * between_groups_loss(s_logits, t_logits, top.long(), count=2, **options)
            + self.top_weight * within_group_loss(s_logits, t_logits, top, **options)
            + self.other_weight * within_group_loss(s_logits, t_logits, ~top, **options)
        )

    def _dist(self, s_logits: Tensor, t_logits: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
        s_probs, t_probs = ((x / self.temperature).softmax(dim=1) for x in (s_logits, t_logits.detach()))
        return self.scale * self.temperature**2 * self._correlate(s_probs, t_probs)

    def _correlate(self, s_probs: Tensor, t_probs: Tensor) -> Tensor:
        of_rows, of_classes = (correlation_loss(s_probs, t_probs, dim=dim) for dim in (1, 0))
        return self.target_weight * of_rows + self.other_weight * of_classes

    def compare_levels(self, s_logits: Tensor, t_logits: Tensor, counts: list[int]) -> Tensor:
        """Compares the sigmoid outputs of a one-stage detector by "dist", level by level.

        Each row is an anchor; in the published code it is a cell with all classes of all its anchors.

        Args:
            s_logits: Logits of the student, (N, anchors, K).
            t_logits: Logits of the teacher, (N, anchors, K).
            counts: Number of anchors of each level.

        Returns:
            Scalar: the sum over levels.
        """
        levels = zip(*(x.sigmoid().split(counts, dim=1) for x in (s_logits, t_logits.detach())), strict=True)
        return torch.stack([self._correlate(s.flatten(0, 1), t.flatten(0, 1)) for s, t in levels]).sum()


def not_labelled(logits: Tensor, labels: Tensor) -> Tensor:
    """Marks the classes that are not the labelled ones, (N, K)."""
    return torch.ones_like(logits, dtype=torch.bool).scatter_(1, labels[:, None], False)


def check_dense(divergence: str, sources: Collection[str]) -> None:
    """Checks that a divergence is not one of softmaxes while the class logits of a one-stage detector are compared.

    Raises:
        InputError: If it is.
    """
    if divergence not in ("kl", "dist") and "dense" in sources:
        raise InputError(
            f"KD.SOFT_TARGET.DIVERGENCE: {divergence!r} is not for the source dense, whose classes have a sigmoid "
            "each; allowed are kl, dist."
        )


def check_divergence(node, sources: Mapping[str, int]) -> dict:
    """Checks DIVERGENCE and the keys that belong to it.

    Args:
        node: ``KD.SOFT_TARGET``.
        sources: Maps each source that is compared to the number of its logits.

    Returns:
        The arguments of :class:`kd_det.heads.SoftTargetHead` that follow from the keys.

    Raises:
        InputError: If a value is not allowed, or does not go with the others.
    """
    check_choice("KD.SOFT_TARGET.DIVERGENCE", node.DIVERGENCE, DIVERGENCES)
    for key in ("TARGET_WEIGHT", "OTHER_WEIGHT", "TOP_WEIGHT"):
        if node[key] < 0:
            raise InputError(f"KD.SOFT_TARGET.{key}: must be 0 or more, got {node[key]}.")
    for key, (value, divergences) in ONLY_WITH.items():
        if node.DIVERGENCE not in divergences and node[key] != value:
            raise InputError(
                f"KD.SOFT_TARGET.{key}: must be {value!r} with DIVERGENCE {node.DIVERGENCE!r}, got {node[key]!r}."
            )
    fitting = (*SOFTMAX_SOURCES, "dense") if node.DIVERGENCE == "dist" else SOFTMAX_SOURCES
    classes = [count for name, count in sources.items() if name in fitting]
    for key, value in (("DIVERGENCE", "kl"), ("STANDARDIZE", False)):
        if node[key] != value and not classes:
            raise InputError(
                f"KD.SOFT_TARGET.{key}: {node[key]!r} is for the sources {', '.join(fitting)}, but "
                f"KD.SOFT_TARGET.SOURCES is {node.SOURCES}."
            )
    check_dense(node.DIVERGENCE, sources)
    if node.DIVERGENCE == "dist" and sources.get("dense") == 1:
        raise InputError("KD.SOFT_TARGET.DIVERGENCE: 'dist' correlates classes, but the dense logits have only one.")
    if node.DIVERGENCE == "dist" and "dense" in sources and "rpn" not in sources and node.ANCHORS != "weighted":
        raise InputError(
            f"KD.SOFT_TARGET.ANCHORS: must be 'weighted' with DIVERGENCE 'dist' of the source dense, which does not "
            f"weigh anchors, got {node.ANCHORS!r}."
        )
    if node.DIVERGENCE == "gdkd" and not 0 < node.TOP_K < min(classes):
        raise InputError(
            f"KD.SOFT_TARGET.TOP_K: must be above 0 and below the number of logits, {min(classes)}, got {node.TOP_K}."
        )
    return {
        "divergence": node.DIVERGENCE,
        "standardize": node.STANDARDIZE,
        "target_weight": node.TARGET_WEIGHT,
        "other_weight": node.OTHER_WEIGHT,
        "top_weight": node.TOP_WEIGHT,
        "top_k": node.TOP_K,
    }
