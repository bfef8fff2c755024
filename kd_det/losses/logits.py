"""Compares class scores, and computes the targets, weights and temperatures that go into the comparison.

Log-probabilities serve as logits: probabilities p that were derived from a teacher's, such as those of
`adjust_probability_shift`, enter a loss at temperature T as `T * p.log()`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .numerics import (
    check_choice,
    check_logits,
    check_positive,
    check_same_shape,
    check_shape,
    divergence,
    divergence_terms,
    in_float32,
    mean,
    mean_square,
    standardize,
    weighted,
)


@in_float32
def soft_target_loss(
    s_logits: Tensor, t_logits: Tensor, *, temperature: float | Tensor, weights: Tensor | None = None
) -> Tensor:
    """Computes T^2 times the Kullback-Leibler divergence of the student's softened probabilities from the teacher's.

    Hinton et al., 2015, https://arxiv.org/abs/1503.02531. This is the paper's soft cross-entropy minus the teacher's
    entropy, which has the same gradient. The factor T^2 keeps the size of the gradient when T changes.

    Args:
        s_logits: (..., K) logits of the student.
        t_logits: (..., K) logits of the teacher; no gradient flows into them.
        temperature: T, above 0: a number for all rows, or a tensor (...) with one per row, see `dynamic_temperature`.
        weights: (...) factor of each row's divergence, None for 1. The mean divides by the number of rows, not by the
            sum of the weights.

    Returns:
        Scalar: sum over classes, mean over rows; 0 without rows.

    Example:
        >>> soft_target_loss(torch.zeros(1, 2), torch.tensor([[3.0, 1.0]]).log(), temperature=1)
        tensor(0.1308)
    """
    name = "soft_target_loss"
    check_same_shape(name, s_logits, t_logits)
    if isinstance(temperature, Tensor):
        temperature = temperature.detach().to(s_logits)
        check_shape(name, "temperature", temperature, tuple(s_logits.shape[:-1]) if temperature.dim() else ())
    else:
        check_positive(name, "temperature", temperature)
    return mean(weighted(name, divergence(s_logits, t_logits, temperature), weights))


@in_float32
def binary_soft_target_loss(s_logits: Tensor, t_logits: Tensor, *, weights: Tensor | None = None) -> Tensor:
    """Computes the divergence between the Bernoulli distributions of a sigmoid head, element by element.

    These are the soft targets (Hinton et al., 2015, https://arxiv.org/abs/1503.02531) for objectness, masks and dense
    class scores: binary cross-entropy minus the teacher's entropy, so 0 where both agree. There is no temperature.

    Args:
        s_logits: logits of the student, of any shape.
        t_logits: logits of the teacher, of the same shape; no gradient flows into them.
        weights: non-negative weight of each element, of the same shape, for a weighted mean; None for the plain mean.

    Returns:
        Scalar; 0 without elements, or if all weights are 0.

    Example:
        >>> binary_soft_target_loss(torch.zeros(1), torch.tensor([3.0]).log())
        tensor(0.1308)
    """
    name = "binary_soft_target_loss"
    check_same_shape(name, s_logits, t_logits)
    t_logits = t_logits.detach()
    on, off = (divergence_terms(F.logsigmoid(x * t_logits), F.logsigmoid(x * s_logits)) for x in (1, -1))
    elements = on + off
    if weights is None:
        return mean(elements)
    check_shape(name, "weights", weights, tuple(s_logits.shape))
    weights = weights.to(elements)
    total = weights.sum()
    return (weights * elements).sum() / total.masked_fill(total == 0, 1)


@in_float32
def focal_soft_target_loss(
    s_logits: Tensor, t_logits: Tensor, *, beta: float = 1.0, weights: Tensor | None = None, normalizer: float | Tensor
) -> Tensor:
    """Sums a binary cross-entropy with the teacher's probabilities, weighted by how far the student is from them.

    The class part of BCKD: Yang et al., 2023, https://arxiv.org/abs/2308.14286, and of CrossKD: Wang et al., 2023,
    https://arxiv.org/abs/2306.11369, for dense heads: ``|q - p|^beta * BCE(q, p)`` with q and p the sigmoids of student
    and teacher, summed over all elements and divided by `normalizer`. As in the published code, the gradient passes
    through the weight as well.

    Args:
        s_logits: (..., K) logits of the student.
        t_logits: (..., K) logits of the teacher; no gradient flows into them.
        beta: exponent of the weight, 0 or at least 1; in between, its gradient would be infinite where both agree.
        weights: (...) factor of each row, such as 0 for ignored anchors; None for 1.
        normalizer: divisor of the sum, such as the number of positive anchors.

    Returns:
        Scalar; 0 without rows.

    Example:
        >>> focal_soft_target_loss(torch.zeros(1, 1), torch.tensor([[3.0]]).log(), normalizer=2)
        tensor(0.0866)
    """
    name = "focal_soft_target_loss"
    check_same_shape(name, s_logits, t_logits)
    if beta != 0 and not beta >= 1:
        raise ValueError(f"{name}: beta must be 0 or at least 1, got {beta}")
    p = t_logits.detach().sigmoid()
    elements = F.binary_cross_entropy_with_logits(s_logits, p, reduction="none")
    elements = (s_logits.sigmoid() - p).abs().pow(beta) * elements
    return weighted(name, elements.sum(dim=-1), weights).sum() / normalizer


@in_float32
def standardize_logits(logits: Tensor, *, eps: float = 1e-7) -> Tensor:
    """Subtracts each row's mean and divides by its standard deviation.

    Logit standardisation: Sun et al., 2024, https://arxiv.org/abs/2403.01427: ``(x - mean) / (std + eps)`` with the
    unbiased standard deviation over the classes, for both sides, before a loss at a temperature. The student then
    learns the order and the relations of the logits, not their size; two classes leave nothing to learn.

    Args:
        logits: (..., K) logits of either side; the gradient passes through mean and standard deviation.
        eps: added to the standard deviations.

    Returns:
        (..., K) standardised logits; a row of equal logits gives zeros.

    Example:
        >>> standardize_logits(torch.tensor([[1.0, 2.0, 3.0]]))
        tensor([[-1.0000,  0.0000,  1.0000]])
    """
    return standardize(logits, (-1,), eps=eps)


@in_float32
def mutual_loss(own_logits: Tensor, peer_logits: Tensor) -> Tensor:
    """Computes the Kullback-Leibler divergence of a network's probabilities from those of its peer.

    DML: Zhang et al., 2017, https://arxiv.org/abs/1706.00384. The loss is KL(peer || own) at temperature 1. With
    several peers the paper takes the mean over them and the published code the sum; this is left to the caller.

    Args:
        own_logits: (..., K) logits of the network that learns.
        peer_logits: (..., K) logits of its peer; no gradient flows into them.

    Returns:
        Scalar: sum over classes, mean over rows; 0 without rows.

    Example:
        >>> mutual_loss(torch.zeros(1, 2), torch.tensor([[3.0, 1.0]]).log())
        tensor(0.1308)
    """
    check_same_shape("mutual_loss", own_logits, peer_logits)
    return mean(divergence(own_logits, peer_logits))


@in_float32
def softmax_regression_loss(
    s_logits: Tensor, t_logits: Tensor, *, kind: str = "mse", temperature: float = 1.0
) -> Tensor:
    """Compares the logits that the teacher's classifier gives for the student's and for the teacher's features.

    SRRL: Yang et al., 2021, https://openreview.net/forum?id=ZzwDy_wiWv. The gradient must reach the student through the
    frozen classifier, so do not run the classifier under no_grad.

    Args:
        s_logits: (N, K) output of the teacher's classifier on the student's connected features.
        t_logits: (N, K) output of the teacher's classifier on its own features; no gradient flows into it.
        kind: "mse", the mean squared difference of the logits (published code, over N and K); or "ce", the
            cross-entropy with the teacher's probabilities (the paper's definition, mean over N).
        temperature: above 0; "ce" divides both logits by it. The loss is not multiplied by its square.

    Returns:
        Scalar; 0 without rows.

    Example:
        >>> softmax_regression_loss(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 4.0]]))
        tensor(2.)
    """
    name = "softmax_regression_loss"
    check_positive(name, "temperature", temperature)
    check_choice(name, "kind", kind, ("mse", "ce"))
    check_same_shape(name, s_logits, t_logits)
    if kind == "mse":
        return mean_square(s_logits - t_logits.detach())
    return mean(_cross_entropy(s_logits / temperature, t_logits / temperature))


@in_float32
def born_again_loss(s_logits: Tensor, t_logits: Tensor) -> Tensor:
    """Computes the cross-entropy of the student with the previous generation's probabilities.

    BAN: Furlanello et al., 2018, https://arxiv.org/abs/1805.04770. The temperature is 1, and labels are not used. For
    DKPP pass the logarithm of `permute_dark_knowledge` as the teacher's logits; for CWTM multiply the cross-entropy
    with the labels by `confidence_weights` and sum.

    Args:
        s_logits: (..., K) logits of the student.
        t_logits: (..., K) logits of the previous generation; no gradient flows into them.

    Returns:
        Scalar: sum over classes, mean over rows; 0 without rows.

    Example:
        >>> born_again_loss(torch.zeros(1, 4), torch.zeros(1, 4))
        tensor(1.3863)
    """
    check_same_shape("born_again_loss", s_logits, t_logits)
    return mean(_cross_entropy(s_logits, t_logits))


@in_float32
def confidence_weights(t_logits: Tensor) -> Tensor:
    """Computes a weight for each sample from the teacher's confidence.

    CWTM of BAN: Furlanello et al., 2018, https://arxiv.org/abs/1805.04770. The weights sum to 1 over the batch, so sum
    the weighted losses instead of averaging them.

    Args:
        t_logits: (N, K) logits of the teacher.

    Returns:
        (N,) highest probability of each row divided by the sum of these over the rows, without gradient.

    Example:
        >>> confidence_weights(torch.tensor([[0.9, 0.1], [0.6, 0.4]]).log())
        tensor([0.6000, 0.4000])
    """
    check_logits("confidence_weights", t_logits)
    confidence = t_logits.detach().softmax(dim=1).amax(dim=1)
    return confidence / confidence.sum()


@in_float32
def permute_dark_knowledge(
    t_probs: Tensor, *, generator: torch.Generator | None = None, permutations: Tensor | None = None
) -> Tensor:
    """Permutes each row's probabilities among all classes except the most probable one.

    DKPP of BAN: Furlanello et al., 2018, https://arxiv.org/abs/1805.04770. Every row gets a permutation of its own.

    Args:
        t_probs: (N, K) probabilities of the teacher.
        generator: source of the random permutations, on the device of `t_probs`; None for the global one.
        permutations: (N, K - 1) permutations to use instead of random ones. Of the classes other than the most probable
            one, in increasing order, the i-th takes the probability of the class that is the row's i-th entry.

    Returns:
        (N, K) new probabilities, without gradient.

    Example:
        >>> permute_dark_knowledge(torch.tensor([[0.7, 0.2, 0.1]]), permutations=torch.tensor([[2, 1]]))
        tensor([[0.7000, 0.1000, 0.2000]])
    """
    name = "permute_dark_knowledge"
    check_logits(name, t_probs)
    t_probs = t_probs.detach()
    n, k = t_probs.shape
    others = torch.arange(k - 1, device=t_probs.device).repeat(n, 1)
    others += others >= t_probs.argmax(dim=1, keepdim=True)
    if permutations is None:
        # torch.compile cannot trace the argument `generator`, not even if it is None.
        source: dict[str, Any] = {} if generator is None else {"generator": generator}
        keys = torch.rand(n, k - 1, device=t_probs.device, dtype=torch.float64, **source)
        permutations = others.gather(1, keys.argsort(dim=1))
    else:
        check_shape(name, "permutations", permutations, (n, k - 1))
        if not torch.equal(permutations.sort(dim=1).values, others):
            raise ValueError(f"{name}: each row of permutations must hold every class but the most probable one once")
    return t_probs.scatter(1, others, t_probs.gather(1, permutations))


@in_float32
def adjust_probability_shift(t_probs: Tensor, labels: Tensor) -> Tensor:
    """Corrects a mistaken teacher by swapping the probabilities of its answer and of the label.

    KA by probability shift: Wen et al., 2019, https://arxiv.org/abs/1911.07471. Rows that the teacher gets right are
    unchanged.

    Args:
        t_probs: (N, K) probabilities of the teacher, usually softened.
        labels: (N,) true classes.

    Returns:
        (N, K) new probabilities, without gradient; in a loss at temperature T use `T * probs.log()` as logits.

    Example:
        >>> adjust_probability_shift(torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([1]))
        tensor([[0.2000, 0.7000, 0.1000]])
    """
    check_logits("adjust_probability_shift", t_probs)
    check_shape("adjust_probability_shift", "labels", labels, tuple(t_probs.shape[:1]))
    t_probs, label = t_probs.detach(), labels[:, None]
    answer = t_probs.argmax(dim=1, keepdim=True)
    return t_probs.scatter(1, answer, t_probs.gather(1, label)).scatter(1, label, t_probs.gather(1, answer))


@in_float32
def adjust_label_smoothing(t_probs: Tensor, labels: Tensor, *, correct_prob: float = 0.9) -> Tensor:
    """Corrects a mistaken teacher by replacing its row with a smoothed label.

    KA by label smoothing: Wen et al., 2019, https://arxiv.org/abs/1911.07471. Rows that the teacher gets right are
    unchanged. The new rows are not softened, so at a high temperature they outweigh the others.

    Args:
        t_probs: (N, K) probabilities of the teacher, usually softened; K of 2 or more.
        labels: (N,) true classes.
        correct_prob: probability of the label, in (0, 1]; the other classes share the rest equally.

    Returns:
        (N, K) new probabilities, without gradient; in a loss at temperature T use `T * probs.log()` as logits.

    Example:
        >>> adjust_label_smoothing(torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([1]), correct_prob=0.8)
        tensor([[0.1000, 0.8000, 0.1000]])
    """
    name = "adjust_label_smoothing"
    check_logits(name, t_probs)
    check_shape(name, "labels", labels, tuple(t_probs.shape[:1]))
    if not 0 < correct_prob <= 1:
        raise ValueError(f"{name}: correct_prob must be above 0 and at most 1, got {correct_prob}")
    if t_probs.shape[1] < 2:
        raise ValueError(f"{name}: expected two classes or more, got a tensor of shape {tuple(t_probs.shape)}")
    t_probs, label = t_probs.detach(), labels[:, None]
    rest = (1 - correct_prob) / (t_probs.shape[1] - 1)
    smoothed = torch.full_like(t_probs, rest).scatter(1, label, correct_prob)
    return torch.where(t_probs.argmax(dim=1, keepdim=True) == label, t_probs, smoothed)


@in_float32
def dynamic_temperature(
    s_logits: Tensor,
    t_logits: Tensor,
    *,
    kind: str = "flsw",
    base: float,
    beta: float,
    gamma: float = 2.0,
    bounds: tuple[float, float] | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """Gives each sample its own temperature, lower for confusing samples.

    DTD: Wen et al., 2019, https://arxiv.org/abs/1911.07471. The temperature is base + beta * (mean(w) - w), with a
    weight w per sample; the mean is taken over the given rows (on several GPUs, over the rows of each GPU). The bounds
    are not in the paper: nothing else keeps the formula above zero.

    Args:
        s_logits: (N, K) logits of the student.
        t_logits: (N, K) logits of the teacher.
        kind: "flsw", w = (1 - cosine of the two rows of logits)^gamma; or "cwsm", w = 1 / highest probability of the
            student.
        base: temperature of a sample of average weight.
        beta: strength of the change.
        gamma: exponent of "flsw"; "cwsm" does not use it.
        bounds: lowest and highest temperature; None for min(1, base / 2) and 2 * base.
        rows: (N,) boolean, true for the samples over which the mean is taken; the others' temperatures have no meaning.
            None for all.

    Returns:
        (N,) temperatures, without gradient.

    Example:
        >>> s_logits = torch.tensor([[0.5, 0.5], [0.8, 0.2]]).log()
        >>> dynamic_temperature(s_logits, torch.zeros(2, 2), kind="cwsm", base=3, beta=1)
        tensor([2.6250, 3.3750])
    """
    name = "dynamic_temperature"
    check_choice(name, "kind", kind, ("flsw", "cwsm"))
    check_logits(name, s_logits, t_logits)
    check_same_shape(name, s_logits, t_logits)
    low, high = (min(1.0, base / 2), 2.0 * base) if bounds is None else bounds
    if not 0 < low <= high:
        raise ValueError(f"{name}: bounds must be above 0 and in increasing order, got {(low, high)}")
    s_logits, t_logits = s_logits.detach(), t_logits.detach()
    if kind == "flsw":
        weight = (1 - F.cosine_similarity(s_logits, t_logits, dim=1)).clamp(min=0).pow(gamma)
    else:
        weight = 1 / s_logits.softmax(dim=1).amax(dim=1)
    if rows is None:
        average = weight.mean()
    else:
        check_shape(name, "rows", rows, tuple(weight.shape))
        average = weight.masked_fill(~rows, 0).sum() / rows.sum().clamp(min=1)
    return (base + beta * (average - weight)).clamp(low, high)


def _cross_entropy(s_logits: Tensor, t_logits: Tensor) -> Tensor:
    """Computes the cross-entropy of each row with the teacher's probabilities."""
    return -(t_logits.detach().softmax(dim=-1) * s_logits.log_softmax(dim=-1)).sum(dim=-1)
