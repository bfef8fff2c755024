"""Measures the similarity of two networks' features by centred kernel alignment (CKA)."""

from collections.abc import Callable

import torch
from torch import Tensor

from kd_det.errors import InputError


def linear_cka(x: Tensor, y: Tensor, *, unbiased: bool = False) -> Tensor:
    """Computes the linear CKA of two sets of features of the same examples.

    Kornblith et al., ICML 2019, https://arxiv.org/abs/1905.00414. The result does not change if either set is
    rotated, shifted or scaled as a whole, and the two may have different numbers of features.

    Args:
        x: Features of n examples, (n, ...); all but the first dimension are flattened. Pass float64 for full precision.
        y: Features of the same examples, (n, ...).
        unbiased: Whether to use the unbiased estimate of HSIC (Song et al., 2012), which is advisable for n below 100:
            otherwise, few examples with many features always look similar. It needs n >= 4 and may be negative.

    Returns:
        Scalar, 1 for equal features; NaN if all examples of one set are equal.

    Raises:
        InputError: If the numbers of examples differ or are too small.

    Example:
        >>> x = torch.tensor([[3.0], [1.0], [2.0]])
        >>> linear_cka(x, torch.tensor([[1.0], [0.0], [-1.0]]))
        tensor(0.2500)
        >>> linear_cka(x, 5 * x + 1)
        tensor(1.)
    """
    x, y = _rows(x, y, least=4 if unbiased else 2)
    if unbiased:
        return _align(x @ x.T, y @ y.T, _unbiased_hsic)
    return (y.T @ x).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm())


def rbf_cka(x: Tensor, y: Tensor, *, width: float = 1.0) -> Tensor:
    """Computes CKA with a Gaussian kernel, which gives more weight to near examples than to distant ones.

    Kornblith et al., ICML 2019, https://arxiv.org/abs/1905.00414.

    Args:
        x: Features of n examples, (n, ...).
        y: Features of the same examples, (n, ...).
        width: Standard deviation of the kernel, in units of the root of the median squared distance of two examples.

    Returns:
        Scalar in [0, 1]; NaN if all examples of one set are equal.

    Raises:
        InputError: If the numbers of examples differ or are below 2.
    """
    x, y = _rows(x, y, least=2)
    return _align(_gaussian_gram(x, width), _gaussian_gram(y, width), _inner_product)


def _rows(x: Tensor, y: Tensor, *, least: int) -> list[Tensor]:
    """Returns both sets as (n, features), at least in float32, with mean 0.

    In products of features with large means, all other digits would be lost.
    """
    if len(x) != len(y) or len(x) < least:
        raise InputError(f"CKA: both sides need the same {least} or more examples, got {len(x)} and {len(y)}.")
    rows = [(z if z.dtype == torch.float64 else z.float()).flatten(1) for z in (x, y)]
    # Equal examples become exactly 0; subtracting only the mean would leave rounding errors.
    shifted = [z - z[:1] for z in rows]
    return [z - z.mean(dim=0) for z in shifted]


def _gaussian_gram(rows: Tensor, width: float) -> Tensor:
    """Computes the centred Gram matrix (n, n) of the Gaussian kernel."""
    products = rows @ rows.T
    square = products.diag()
    distances = (square[:, None] + square - 2 * products).clamp(min=0)
    # This is numpy's median: for an even number of values, the mean of the two in the middle.
    median = (distances.median() - (-distances).median()) / 2
    gram = (-distances / (2 * width**2 * median)).exp()
    return gram - gram.mean(dim=0) - gram.mean(dim=1, keepdim=True) + gram.mean()


def _align(gram_x: Tensor, gram_y: Tensor, inner: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    return inner(gram_x, gram_y) / (inner(gram_x, gram_x) * inner(gram_y, gram_y)).sqrt()


def _inner_product(gram_x: Tensor, gram_y: Tensor) -> Tensor:
    return (gram_x * gram_y).sum()


def _unbiased_hsic(gram_x: Tensor, gram_y: Tensor) -> Tensor:
    """Computes the unbiased HSIC of two Gram matrices (n, n), times n (n - 3), which cancels in CKA."""
    n = len(gram_x)
    x, y = (gram - gram.diag().diag() for gram in (gram_x, gram_y))
    return (x * y).sum() + x.sum() * y.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (x.sum(dim=0) * y.sum(dim=0)).sum()
