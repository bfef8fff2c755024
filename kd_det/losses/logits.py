"""Losses on class scores, and the targets, weights and temperatures that go into them.

Log-probabilities are logits: probabilities p that were made from a teacher, such as those of
`adjust_probability_shift`, enter a loss at temperature T as `T * p.log()`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .numerics import check_choice, check_logits, check_same_shape, check_shape, in_float32, mean


@in_float32
def soft_target_loss(
    s_logits: Tensor, t_logits: Tensor, *, temperature: float | Tensor, weights: Tensor | None = None
) -> Tensor:
    """Computes T^2 times the Kullback-Leibler divergence of the student's softened probabilities from the teacher's.

    Hinton et al., 2015, https://arxiv.org/abs/1503.02531: its soft cross-entropy less the teacher's entropy, which has
    the same gradient. T^2 keeps the gradient's size when T changes.

    Args:
        s_logits: (..., K) logits of the student.
        t_logits: (..., K) logits of the teacher; no gradient flows into them.
        temperature: T, above 0: one for all rows, or a tensor (...) with one for each, see `dynamic_temperature`.
        weights: (...) factors of the rows' divergences, which the mean does not divide by again; None for 1.

    Returns:
        Scalar: sum over classes, mean over rows; 0 without rows.
    """
    name = "soft_target_loss"
    check_same_shape(name, s_logits, t_logits)
    if isinstance(temperature, Tensor):
        temperature = temperature.detach().to(s_logits)
        check_shape(name, "temperature", temperature, tuple(s_logits.shape[:-1]) if temperature.dim() else ())
    elif temperature <= 0:
        raise ValueError(f"{name}: temperature must be above 0, got {temperature}")
    divergence = _divergence(s_logits, t_logits, temperature)
    if weights is not None:
        check_shape(name, "weights", weights, tuple(s_logits.shape[:-1]))
        divergence = weights.detach().to(divergence) * divergence
    return mean(divergence)


@in_float32
def binary_soft_target_loss(s_logits: Tensor, t_logits: Tensor, *, weights: Tensor | None = None) -> Tensor:
    """Computes the divergence between the Bernoulli distributions of a sigmoid head, element by element.

    Soft targets (Hinton et al., 2015, https://arxiv.org/abs/1503.02531) for objectness, masks and dense class scores:
    binary cross-entropy less the teacher's entropy, so 0 where both agree. No temperature.

    Args:
        s_logits: logits of the student, of any shape.
        t_logits: logits of the teacher, of the same shape; no gradient flows into them.
        weights: non-negative weight of each element, of the same shape, for a weighted mean; None for the plain mean.

    Returns:
        Scalar; 0 without elements, or if all weights are 0.
    """
    name = "binary_soft_target_loss"
    check_same_shape(name, s_logits, t_logits)
    t_logits = t_logits.detach()
    on, off = (_divergence_terms(F.logsigmoid(x * t_logits), F.logsigmoid(x * s_logits)) for x in (1, -1))
    divergence = on + off
    if weights is None:
        return mean(divergence)
    check_shape(name, "weights", weights, tuple(s_logits.shape))
    weights = weights.to(divergence)
    total = weights.sum()
    return (weights * divergence).sum() / total.masked_fill(total == 0, 1)


@in_float32
def mutual_loss(own_logits: Tensor, peer_logits: Tensor) -> Tensor:
    """Computes the Kullback-Leibler divergence of a network's probabilities from those of its peer.

    DML: Zhang et al., 2017, https://arxiv.org/abs/1706.00384. KL(peer || own) at temperature 1. With several peers the
    paper takes the mean over them and the published code the sum: that is the caller's.

    Args:
        own_logits: (..., K) logits of the network that learns.
        peer_logits: (..., K) logits of its peer; no gradient flows into them.

    Returns:
        Scalar: sum over classes, mean over rows; 0 without rows.
    """
    check_same_shape("mutual_loss", own_logits, peer_logits)
    return mean(_divergence(own_logits, peer_logits))


@in_float32
def softmax_regression_loss(
    s_logits: Tensor, t_logits: Tensor, *, kind: str = "mse", temperature: float = 1.0
) -> Tensor:
    """Compares what the teacher's classifier makes of the student's features with what it makes of the teacher's.

    SRRL: Yang et al., 2021, https://openreview.net/forum?id=ZzwDy_wiWv. Gradient has to reach the student through the
    frozen classifier: do not wrap that in no_grad.

    Args:
        s_logits: (N, K) output of the teacher's classifier on the student's connected features.
        t_logits: (N, K) output of the teacher's classifier on its own features; no gradient flows into it.
        kind: "mse", the mean squared difference of the logits (published code, over N and K); or "ce", the
            cross-entropy with the teacher's probabilities (the paper's definition, mean over N).
        temperature: above 0; "ce" divides both logits by it. The loss is not multiplied by its square.

    Returns:
        Scalar; 0 without rows.
    """
    name = "softmax_regression_loss"
    if temperature <= 0:
        raise ValueError(f"{name}: temperature must be above 0, got {temperature}")
    check_choice(name, "kind", kind, ("mse", "ce"))
    check_same_shape(name, s_logits, t_logits)
    if kind == "mse":
        return mean((s_logits - t_logits.detach()).square())
    return mean(_cross_entropy(s_logits / temperature, t_logits / temperature))


@in_float32
def born_again_loss(s_logits: Tensor, t_logits: Tensor) -> Tensor:
    """Computes the cross-entropy of the student with the previous generation's probabilities.

    BAN: Furlanello et al., 2018, https://arxiv.org/abs/1805.04770. Temperature 1, no labels. For DKPP give the
    logarithm of `permute_dark_knowledge` as the teacher's logits; for CWTM multiply the labels' cross-entropy by
    `confidence_weights` and sum.

    Args:
        s_logits: (..., K) logits of the student.
        t_logits: (..., K) logits of the previous generation; no gradient flows into them.

    Returns:
        Scalar: sum over classes, mean over rows; 0 without rows.
    """
    check_same_shape("born_again_loss", s_logits, t_logits)
    return mean(_cross_entropy(s_logits, t_logits))


@in_float32
def confidence_weights(t_logits: Tensor) -> Tensor:
    """Weighs samples by the teacher's confidence.

    CWTM of BAN: Furlanello et al., 2018, https://arxiv.org/abs/1805.04770. The weights sum to 1 over the batch: sum the
    weighted losses, do not average them.

    Args:
        t_logits: (N, K) logits of the teacher.

    Returns:
        (N,) highest probability of each row divided by the sum of these over the rows, without gradient.
    """
    check_logits("confidence_weights", t_logits)
    confidence = t_logits.detach().softmax(dim=1).amax(dim=1)
    return confidence / confidence.sum()


@in_float32
def permute_dark_knowledge(
    t_probs: Tensor, *, generator: torch.Generator | None = None, permutations: Tensor | None = None
) -> Tensor:
    """Permutes each row's probabilities among all classes but the most probable one.

    DKPP of BAN: Furlanello et al., 2018, https://arxiv.org/abs/1805.04770. Every row gets a fresh permutation.

    Args:
        t_probs: (N, K) probabilities of the teacher.
        generator: source of the random permutations, on the device of `t_probs`; None for the global one.
        permutations: (N, K - 1) given permutations instead of random ones: the classes from which the classes other
            than the most probable one, in increasing order, take their probabilities.

    Returns:
        (N, K) new probabilities, without gradient.
    """
    name = "permute_dark_knowledge"
    check_logits(name, t_probs)
    t_probs = t_probs.detach()
    n, k = t_probs.shape
    others = torch.arange(k - 1, device=t_probs.device).repeat(n, 1)
    others += others >= t_probs.argmax(dim=1, keepdim=True)
    if permutations is None:
        # torch.compile cannot trace the argument, not even None.
        source = {} if generator is None else {"generator": generator}
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
    kept.

    Args:
        t_probs: (N, K) probabilities of the teacher, usually softened.
        labels: (N,) true classes.

    Returns:
        (N, K) new probabilities, without gradient; in a loss at temperature T use `T * probs.log()` as logits.
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
    kept. The new rows are not softened, so at a high temperature they outweigh the others.

    Args:
        t_probs: (N, K) probabilities of the teacher, usually softened; K of 2 or more.
        labels: (N,) true classes.
        correct_prob: probability of the label, in (0, 1]; the other classes share the rest equally.

    Returns:
        (N, K) new probabilities, without gradient; in a loss at temperature T use `T * probs.log()` as logits.
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
) -> Tensor:
    """Gives each sample its own temperature, lower for the confusing ones.

    DTD: Wen et al., 2019, https://arxiv.org/abs/1911.07471. base + beta * (mean(w) - w) with a weight w per sample,
    whose mean is taken over the rows given (on several GPUs: over each GPU's own). The bounds are an addition: nothing
    else keeps the formula above zero.

    Args:
        s_logits: (N, K) logits of the student.
        t_logits: (N, K) logits of the teacher.
        kind: "flsw", w = (1 - cosine of the two rows of logits)^gamma; or "cwsm", w = 1 / highest probability of the
            student.
        base: temperature of a sample of average weight.
        beta: strength of the change.
        gamma: exponent of "flsw"; "cwsm" has none.
        bounds: lowest and highest temperature; None for min(1, base / 2) and 2 * base.

    Returns:
        (N,) temperatures, without gradient.
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
    return (base + beta * (weight.mean() - weight)).clamp(low, high)


def _divergence(s_logits: Tensor, t_logits: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """T^2 * KL(teacher || student) of each row."""
    divisor = temperature[..., None] if isinstance(temperature, Tensor) else temperature
    log_p = (t_logits.detach() / divisor).log_softmax(dim=-1)
    log_q = (s_logits / divisor).log_softmax(dim=-1)
    return temperature**2 * _divergence_terms(log_p, log_q).sum(dim=-1)


def _divergence_terms(log_p: Tensor, log_q: Tensor) -> Tensor:
    """p log(p / q) + q - p of each class, whose sum is the Kullback-Leibler divergence, since q - p sums to 0.

    Near q = p the terms p log(p / q) alone cancel each other, and in float32 little is left of a small divergence.
    """
    p, q = log_p.exp(), log_q.exp()
    ratio = (log_p - log_q).masked_fill(p == 0, 0)  # 0 * log 0 = 0
    near = (ratio.abs() < 1) & (p > 0)
    return p * ratio + torch.where(near, p * (-ratio.clamp(-1, 1)).expm1(), q - p)


def _cross_entropy(s_logits: Tensor, t_logits: Tensor) -> Tensor:
    """Cross-entropy of each row with the teacher's probabilities."""
    return -(t_logits.detach().softmax(dim=-1) * s_logits.log_softmax(dim=-1)).sum(dim=-1)
