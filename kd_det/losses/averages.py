"""Averages what several teachers predict (Hinton et al., 2015, https://arxiv.org/abs/1503.02531, section 1).

The arithmetic or the geometric mean is taken of the probabilities that a head compares. The geometric one, normalised
again, is the softmax or the sigmoid of the mean logits, at any temperature.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .numerics import cast_up, check_choice, check_positive

KINDS = ("arithmetic", "geometric")


def average_softmax(logits: Sequence[Tensor], *, kind: str, temperature: float = 1.0) -> Tensor:
    """Averages distributions over classes.

    Args:
        logits: (N, K) logits of each teacher.
        kind: "arithmetic" or "geometric" mean of the probabilities.
        temperature: T of the softmax.

    Returns:
        (N, K) logits whose softmax at this temperature is the mean.

    Example:
        >>> a, b = torch.tensor([[0.8, 0.2]]).log(), torch.tensor([[0.4, 0.6]]).log()
        >>> average_softmax([a, b], kind="arithmetic").exp()
        tensor([[0.6000, 0.4000]])
    """
    check_choice("average_softmax", "kind", kind, KINDS)
    check_positive("average_softmax", "temperature", temperature)
    stacked = torch.stack([cast_up(x) for x in logits])
    if kind == "geometric":
        return stacked.mean(dim=0)
    return temperature * log_mean(F.log_softmax(stacked / temperature, dim=-1))


def average_sigmoid(logits: Sequence[Tensor], *, kind: str) -> Tensor:
    """Averages independent probabilities.

    Args:
        logits: (...) logits of each teacher, each with a sigmoid of its own.
        kind: "arithmetic" or "geometric" mean of the probabilities and of their complements, normalised.

    Returns:
        (...) logits whose sigmoid is the mean.

    Example:
        >>> average_sigmoid(list(torch.tensor([0.9, 0.5]).logit()), kind="arithmetic").sigmoid()
        tensor(0.7000)
    """
    check_choice("average_sigmoid", "kind", kind, KINDS)
    stacked = torch.stack([cast_up(x) for x in logits])
    if kind == "geometric":
        return stacked.mean(dim=0)
    return log_mean(F.logsigmoid(stacked)) - log_mean(F.logsigmoid(-stacked))


def log_mean(logs: Tensor) -> Tensor:
    """Computes the logarithm of the mean over the first axis of numbers that are given by their logarithms."""
    return logs.logsumexp(dim=0) - math.log(len(logs))
