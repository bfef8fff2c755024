"""Visual concepts: the cells of an image that a network's feature keeps, and how the network came to keep them.

Cheng et al., "Explaining Knowledge Distillation by Quantifying the Knowledge", CVPR 2020,
https://arxiv.org/abs/2003.03622. A cell counts as a visual concept if its pixels must be known more exactly than the
background's for the feature to stay what it is. The paper expects of a distilled network more concepts on objects and
fewer on the background, learned at the same time, and with fewer detours.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_det.errors import InputError

# Of the deviations of the noise: where they begin, and what they are kept within.
START = 0.01
BOUNDS = (0.001, 1.0)
# What a deviation of 1 is in grey levels from 0 to 255: the mean of the deviations that ImageNet networks divide by.
UNIT = 57.6


def entropy(sigma: Tensor) -> Tensor:
    """Entropy of Gaussian noise of deviation sigma, in nats: ln sigma + 1/2 ln(2 pi e)."""
    return sigma.log() + 0.5 * math.log(2 * math.pi * math.e)


def information_loss(noisy: Tensor, clean: Tensor, sigma: Tensor, *, scale: float | Tensor, weight: float) -> Tensor:
    """Computes what the deviations of the noise are chosen by: the feature shall stay, the entropy be high.

    Args:
        noisy: Features of copies of an image with noise, (n, ...).
        clean: Its feature without noise, (...). Both are rectified first, as the published code does.
        sigma: Deviation of the noise in each cell, (g, g).
        scale: What the squared error is divided by: its own value at :data:`START`.
        weight: Factor of the mean entropy.

    Returns:
        Scalar: mean squared error / scale - weight * mean entropy.
    """
    return (noisy.relu() - clean.relu()).square().mean() / scale - weight * entropy(sigma).mean()


def measure_entropies(
    feature: Callable[[Tensor], Tensor],
    image: Tensor,
    *,
    grid: int = 16,
    weight: float = 6.0,
    target: float = -2.8,
    steps: int = 80,
    copies: int = 96,
    batch: int = 96,
    learning_rate: float = 1e-4,
    seed: int = 0,
) -> Tensor:
    """Measures how much of each cell of an image a feature discards.

    Noise is added to the pixels, with a deviation for each cell, and by gradient descent on :func:`information_loss`
    the deviations grow where the feature does not mind. As in the published code, those are taken whose mean entropy
    comes nearest to a target, so that features and networks are compared at the same total; after three quarters of
    the steps the search ends if the target was reached, else the entropy weighs half as much again.

    Args:
        feature: Images (n, C, H, W) to their features (n * r, ...), the same for the same image; differentiable.
        image: (C, H, W), in grey levels from 0 to 255; the deviations' unit is :data:`UNIT` of them.
        grid: Cells along each side.
        weight: Of the entropy: 6 for ResNets, 7 for AlexNet and VGG in the published code.
        target: Mean entropy in nats; -2.8 is a deviation of 0.015.
        steps: Steps of gradient descent.
        copies: Noisy images of a step.
        batch: How many of them are computed at a time.
        learning_rate: Of plain gradient descent.
        seed: Of the noise.

    Returns:
        (grid, grid) entropies in nats; NaN if the feature does not change when noise is added, or is not finite.
    """
    generator = torch.Generator(image.device).manual_seed(seed)
    with torch.no_grad():
        clean = feature(image[None])
    sigma = torch.full((grid, grid), START, device=image.device, requires_grad=True)
    optimizer = torch.optim.SGD([sigma], lr=learning_rate)

    def loss(number: int, scale: float | Tensor, weight: float) -> Tensor:
        noise = torch.randn((number, *image.shape), generator=generator, device=image.device)
        spread = F.interpolate(sigma[None, None], size=image.shape[-2:], mode="nearest")[0]
        noisy = feature(image + UNIT * spread * noise)
        return information_loss(noisy.unflatten(0, (number, -1)), clean, sigma, scale=scale, weight=weight)

    parts = [min(batch, copies - first) for first in range(0, copies, batch)]
    with torch.no_grad():
        scale = sum(loss(part, 1.0, 0.0) * part for part in parts) / copies
    if not 0 < scale < math.inf:
        return torch.full_like(sigma, math.nan).detach()
    found, nearest, reached = sigma.detach().clone(), math.inf, False
    for step in range(steps):
        with torch.no_grad():
            sigma.clamp_(*BOUNDS)
            mean = entropy(sigma).mean().item()
        reached |= mean > target
        if abs(mean - target) < nearest:
            found, nearest = sigma.detach().clone(), abs(mean - target)
        if step == steps * 3 // 4:
            if reached:
                break
            weight *= 1.5
        optimizer.zero_grad()
        for part in parts:
            (loss(part, scale, weight) * part / copies).backward()
        optimizer.step()
    return entropy(found)


def find_concepts(entropies: Tensor, foreground: Tensor, *, threshold: float = 0.2) -> Tensor:
    """Finds the cells whose entropy is lower than the background's by more than a threshold.

    Args:
        entropies: (N, g, g) of :func:`measure_entropies`, one network's on N images; NaN of an image that has none.
        foreground: Booleans (N, g, g): the cells of objects.
        threshold: In nats.

    Returns:
        Booleans (N, g, g), all False of an image without entropies. The background's entropy is the mean over images of
        each one's mean over its background.

    Raises:
        InputError: If no image has background.
    """
    if foreground.all():
        raise InputError("visual concepts: no image has background, which they are defined against.")
    background = entropies.masked_fill(foreground, math.nan).flatten(1).nanmean(dim=1).nanmean()
    return background - entropies > threshold


def concept_ratio(foreground: Tensor, background: Tensor) -> Tensor:
    """Computes the share of concepts that lie on objects, lambda of the paper.

    Args:
        foreground: Concepts on objects of each image, (N,).
        background: Concepts on the background of each image, (N,).

    Returns:
        Scalar: mean of foreground / (foreground + background) over images that have concepts; NaN if none has.
    """
    return (foreground.double() / (foreground + background)).nanmean()


def learning_effort(counts: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """Computes how far the weights had gone when an image had most concepts, and how much that differs.

    Args:
        counts: Concepts on objects of each image at each checkpoint, (N, M).
        steps: How far the weights went since the checkpoint before, over the length of the first one's: (M,) or (N, M);
            0 for the first.

    Returns:
        D_mean and D_std of the paper: mean and variance over images, as paper and published code compute the latter,
        of the way to the first checkpoint with the most concepts.
    """
    ways = steps.cumsum(dim=-1).expand(counts.shape)
    ways = ways.gather(1, counts.argmax(dim=1, keepdim=True))
    return ways.mean(), ways.var(correction=0)


def stability(concepts: Tensor) -> Tensor:
    """Computes the share of all concepts ever learned that the last checkpoint has, rho of the paper.

    Args:
        concepts: Booleans (M, N, g, g): concepts on objects of M checkpoints on N images.

    Returns:
        Scalar, mean over images; an image that never had a concept counts as 0, as in the published code.
    """
    ever = concepts.any(dim=0).flatten(1).sum(dim=1)
    return (concepts[-1].flatten(1).sum(dim=1).double() / ever.clamp(min=1)).mean()
