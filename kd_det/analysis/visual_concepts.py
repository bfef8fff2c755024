"""Measures visual concepts: the cells of an image that a network's feature depends on, and how they were learned.

Cheng et al., "Explaining Knowledge Distillation by Quantifying the Knowledge", CVPR 2020,
https://arxiv.org/abs/2003.03622. A cell counts as a visual concept if the feature tolerates less noise in its pixels
than in the background's. According to the paper, a distilled network has more concepts on objects and fewer on the
background than one trained alone, and learns them at the same time and with fewer detours.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_det.errors import InputError

# Initial standard deviation of the noise, and the bounds that it is clamped to.
START = 0.01
BOUNDS = (0.001, 1.0)
# Number of times that the noise is multiplied to reach a bound of the feature's change.
SCALINGS = 5
# Grey levels, from 0 to 255, of a deviation of 1: the mean of the deviations that ImageNet networks divide by.
UNIT = 57.6


def entropy(sigma: Tensor) -> Tensor:
    """Computes the entropy of Gaussian noise of standard deviation sigma, in nats: ln sigma + 1/2 ln(2 pi e).

    Example:
        >>> entropy(torch.tensor(1.0))
        tensor(1.4189)
    """
    return sigma.log() + 0.5 * math.log(2 * math.pi * math.e)


def information_loss(noisy: Tensor, clean: Tensor, sigma: Tensor, *, scale: float | Tensor, weight: float) -> Tensor:
    """Computes the loss that the noise minimises: it should change the feature little and have a high entropy.

    Args:
        noisy: Features of noisy copies of an image, (n, ...).
        clean: Its feature without noise, (...). Both are rectified first, as in the published code.
        sigma: Standard deviation of the noise in each cell, (g, g).
        scale: Divisor of the squared error: the error at :data:`START`.
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
    bound: float | None = None,
) -> Tensor:
    """Measures how much of each cell of an image a feature discards.

    Noise is added to the pixels, with its own standard deviation in each cell. Gradient descent on
    :func:`information_loss` increases the deviations wherever this hardly changes the feature. As in the published
    code, the result are the deviations whose mean entropy comes closest to a target, so that features and networks are
    compared at the same total. After three quarters of the steps, the search ends if the target has been reached;
    otherwise the weight of the entropy is multiplied by 1.5.

    With a bound, features and networks are compared at the same change of the feature instead, as in the paper's
    definition: the noise of the last step is multiplied by the factor at which the mean squared change of the feature
    reaches the bound. For a feature that is linear in the noise, the most entropy under any bound has the same shape.

    Args:
        feature: Maps images (n, C, H, W) to their features (n * r, ...); differentiable and deterministic.
        image: (C, H, W), in grey levels from 0 to 255. Deviations are in units of :data:`UNIT` grey levels.
        grid: Number of cells along each side.
        weight: Weight of the entropy; the published code uses 6 for ResNets, 7 for AlexNet and VGG.
        target: Mean entropy in nats; -2.8 is a deviation of 0.015.
        steps: Number of steps of gradient descent.
        copies: Number of noisy copies per step.
        batch: Number of copies to compute at a time.
        learning_rate: Learning rate of plain gradient descent.
        seed: Seed of the noise.
        bound: Mean squared change of the rectified feature, relative to that under noise of :data:`START`; None takes
            the deviations closest to the target. The published code has a bound of 1.5, which it does not use.

    Returns:
        Entropies (grid, grid) in nats; NaN if noise does not change the feature, or if the feature is not finite.
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

    @torch.no_grad()
    def change(scale: float | Tensor) -> Tensor:
        return sum((loss(part, scale, 0.0) * part for part in parts), torch.zeros_like(sigma[0, 0])) / copies

    scale = change(1.0)
    if not 0 < scale < math.inf:
        return torch.full_like(sigma, math.nan).detach()
    closest, distance, reached = sigma.detach().clone(), math.inf, False
    for step in range(steps):
        with torch.no_grad():
            sigma.clamp_(*BOUNDS)
            mean = entropy(sigma).mean().item()
        reached |= mean > target
        if abs(mean - target) < distance:
            closest, distance = sigma.detach().clone(), abs(mean - target)
        if bound is None and step == steps * 3 // 4:
            if reached:
                break
            weight *= 1.5
        optimizer.zero_grad()
        for part in parts:
            (loss(part, scale, weight) * part / copies).backward()
        optimizer.step()
    if bound is None:
        return entropy(closest)
    with torch.no_grad():
        sigma.clamp_(*BOUNDS)
        for _ in range(SCALINGS):  # The change grows with about the square of the noise.
            sigma.mul_((bound / change(scale)).sqrt()).clamp_(*BOUNDS)
        return entropy(sigma)


def find_concepts(entropies: Tensor, foreground: Tensor, *, threshold: float = 0.2) -> Tensor:
    """Finds the cells whose entropy is lower than the background's by more than a threshold.

    The entropy of the background is averaged over the background of each image first, and then over images.

    Args:
        entropies: Results of :func:`measure_entropies` for one network and N images, (N, g, g); may be NaN.
        foreground: Marks the cells of objects, (N, g, g), bool.
        threshold: The threshold in nats.

    Returns:
        Booleans (N, g, g); all False for an image whose entropies are NaN.

    Raises:
        InputError: If no image has background.

    Example:
        >>> find_concepts(torch.tensor([[[1.0, 3.0]]]), torch.tensor([[[True, False]]]))
        tensor([[[ True, False]]])
    """
    if foreground.all():
        raise InputError("visual concepts: no image has background, which they are defined against.")
    background = entropies.masked_fill(foreground, math.nan).flatten(1).nanmean(dim=1).nanmean()
    return background - entropies > threshold


def concept_ratio(foreground: Tensor, background: Tensor) -> Tensor:
    """Computes the share of concepts that lie on objects: lambda in the paper.

    Args:
        foreground: Number of concepts on the objects of each image, (N,).
        background: Number of concepts on the background of each image, (N,).

    Returns:
        Scalar: mean of foreground / (foreground + background) over the images with concepts; NaN if there are none.
    """
    return (foreground.double() / (foreground + background)).nanmean()


def learning_effort(counts: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """Computes how far the weights moved until an image had the most concepts: mean and variance over images.

    Args:
        counts: Number of concepts on the objects of each image at each checkpoint, (N, M).
        steps: Distance of the weights from those of the checkpoint before, divided by the norm of the first
            checkpoint's weights: (M,) or (N, M); 0 for the first checkpoint.

    Returns:
        D_mean and D_std of the paper, for the path to the first checkpoint with the most concepts. D_std is a variance,
        in the paper and in its published code, too.
    """
    paths = steps.cumsum(dim=-1).expand(counts.shape)
    paths = paths.gather(1, counts.argmax(dim=1, keepdim=True))
    return paths.mean(), paths.var(correction=0)


def stability(concepts: Tensor) -> Tensor:
    """Computes the share of all concepts ever learned that the last checkpoint still has: rho in the paper.

    Args:
        concepts: Concepts on objects for M checkpoints and N images, (M, N, g, g), bool.

    Returns:
        Scalar, mean over images. An image that never had a concept counts as 0, as in the published code.
    """
    ever = concepts.any(dim=0).flatten(1).sum(dim=1)
    return (concepts[-1].flatten(1).sum(dim=1).double() / ever.clamp(min=1)).mean()
