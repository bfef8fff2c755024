"""Condenses relevance maps into figures, and colours them."""

import warnings

import cv2
import numpy as np
import torch.nn.functional as F
from scipy.stats import ConstantInputWarning, spearmanr
from torch import Tensor

# Maps are compared by the means of this many cells along each side, or by their pixels if there are fewer.
GRID = 32
# Relevance of this share of a map's largest absolute values has the full colour.
SATURATED = 0.01
PALE = 0.3  # The image below a map keeps this share of its contrast.
POSITIVE, NEGATIVE = np.array([178, 24, 43]), np.array([33, 102, 172])


def relevance_inside(relevance: Tensor, region: Tensor) -> float:
    """Computes the share of the positive relevance that lies in a region, from 0 to 1.

    This is the relevance mass accuracy of Arras et al., "CLEVR-XAI", 2022, https://arxiv.org/abs/2003.07258.

    Args:
        relevance: Relevance of each pixel, (H, W).
        region: Marks the pixels of an object, (H, W), bool.

    Returns:
        The share; NaN if no relevance is positive.

    Example:
        >>> import torch
        >>> relevance_inside(torch.tensor([[3.0, 1.0, -5.0]]), torch.tensor([[True, False, False]]))
        0.75
    """
    positive = relevance.clamp(min=0).double()
    return float((positive * region).sum() / positive.sum())


def rank_correlation(first: Tensor, second: Tensor, *, grid: int = GRID) -> float:
    """Computes Spearman's rank correlation of two relevance maps of one image, from -1 to 1.

    Both are averaged over a grid of cells first, because neighbouring pixels differ by the strides of a network more
    than by what the network looks at, and because images may have been resized differently.

    Args:
        first: Relevance of each pixel, (H, W).
        second: Relevance of each pixel of the same image, (H', W').
        grid: Number of cells along each side, or less if a map has fewer pixels.

    Returns:
        The correlation; NaN if a map is constant.
    """
    size = (min(grid, len(first), len(second)), min(grid, first.shape[1], second.shape[1]))
    cells = [F.adaptive_avg_pool2d(x[None].double(), size).flatten().cpu().numpy() for x in (first, second)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConstantInputWarning)
        return float(spearmanr(*cells).statistic)


def color_relevance(pixels: np.ndarray, relevance: Tensor) -> np.ndarray:
    """Colours relevance over a pale grey image: red where it is positive, blue where it is negative.

    Args:
        pixels: The image, (H, W, 3), from 0 to 255.
        relevance: Relevance of each pixel, (H, W).

    Returns:
        RGB, uint8 (H, W, 3).
    """
    # On average over a little neighbourhood, single pixels do not hide where the relevance lies.
    values = cv2.GaussianBlur(relevance.double().cpu().numpy(), (0, 0), max(relevance.shape) / 200)
    full = np.quantile(np.abs(values), 1 - SATURATED) or np.abs(values).max() or 1.0
    strength = np.clip(np.abs(values) / full, 0, 1)[..., None]
    grey = 255 - PALE * (255 - pixels.mean(axis=2, keepdims=True))
    color = np.where(values[..., None] > 0, POSITIVE, NEGATIVE)
    return ((1 - strength) * grey + strength * color).round().astype(np.uint8)
