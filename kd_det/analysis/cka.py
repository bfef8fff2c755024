"""How alike two networks' features are: centred kernel alignment (CKA)."""

import torch
from torch import Tensor

from kd_det.errors import InputError


def linear_cka(x: Tensor, y: Tensor, *, unbiased: bool = False) -> Tensor:
    """Computes linear CKA of two sets of features of the same examples.

    Kornblith et al., ICML 2019, https://arxiv.org/abs/1905.00414. It does not change when either side is rotated,
    shifted or scaled as a whole, and the two may have different numbers of features.

    Args:
        x: Features of n examples, (n, ...); all but the first dimension are flattened. In float64 where digits matter.
        y: Features of the same examples, (n, ...).
        unbiased: Whether to use the unbiased estimate of HSIC (Song et al., 2012), advisable for n below 100: few
            examples of many features look alike otherwise. It needs n of 4 or more, and may fall below 0.

    Returns:
        Scalar, 1 for equal features; NaN if one side is the same for all examples.

    Raises:
        InputError: If the numbers of examples differ, or are too small.
    """
    x, y = _rows(x, y, least=4 if unbiased else 2)
    if unbiased:
        return _align(x @ x.T, y @ y.T, _unbiased_hsic)
    return (y.T @ x).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm())


def rbf_cka(x: Tensor, y: Tensor, *, width: float = 1.0) -> Tensor:
    """Computes CKA with a Gaussian kernel, to which near examples matter more than far ones.

    Kornblith et al., ICML 2019, https://arxiv.org/abs/1905.00414.

    Args:
        x: Features of n examples, (n, ...).
        y: Features of the same examples, (n, ...).
        width: Standard deviation of the kernel, in units of the root of the median squared distance of two examples.

    Returns:
        Scalar in [0, 1]; NaN if one side is the same for all examples.

    Raises:
        InputError: If the numbers of examples differ, or are smaller than 2.
    """
    grams = []
    for features in _rows(x, y, least=2):
        products = features @ features.T
        square = products.diag()
        distances = (square[:, None] + square - 2 * products).clamp(min=0)
        # As numpy's: of an even number of values the mean of the two in the middle.
        median = (distances.median() - (-distances).median()) / 2
        grams.append((-distances / (2 * width**2 * median)).exp())
    return _align(*(k - k.mean(dim=0) - k.mean(dim=1, keepdim=True) + k.mean() for k in grams), _inner_product)


def _rows(x: Tensor, y: Tensor, *, least: int) -> list[Tensor]:
    """Both sides as (n, features), in float32 at least, with mean 0: products of large means would drown all else."""
    if len(x) != len(y) or len(x) < least:
        raise InputError(f"CKA: both sides need the same {least} or more examples, got {len(x)} and {len(y)}.")
    rows = [(z if z.dtype == torch.float64 else z.float()).flatten(1) for z in (x, y)]
    shifted = [z - z[:1] for z in rows]  # Equal examples become zeros, which the mean alone would miss by rounding.
    return [z - z.mean(dim=0) for z in shifted]


def _align(k: Tensor, other: Tensor, inner) -> Tensor:
    return inner(k, other) / (inner(k, k) * inner(other, other)).sqrt()


def _inner_product(k: Tensor, other: Tensor) -> Tensor:
    return (k * other).sum()


def _unbiased_hsic(k: Tensor, other: Tensor) -> Tensor:
    """Unbiased HSIC of two Gram matrices (n, n), times n (n - 3), which cancels in CKA."""
    n = len(k)
    k, other = (gram - gram.diag().diag() for gram in (k, other))
    return (
        (k * other).sum()
        + k.sum() * other.sum() / ((n - 1) * (n - 2))
        - 2 / (n - 2) * (k.sum(dim=0) * other.sum(dim=0)).sum()
    )
