"""Adds Gaussian noise to a feature of a trained model, relative to the spread of each of its channels."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from kd_det.analysis.run import Run
from kd_det.errors import InputError
from kd_det.taps import build_tap


class FeatureNoise:
    """Adds noise to a feature x, channel by channel: x + strength * std * n with standard normal n.

    The noise n depends on the seed, the image and the draw alone. It is the same for features of equal shapes, at every
    strength and in batches of any size.

    Args:
        std: Standard deviation of each channel over images and cells, (C,).
        seed: Seed of the noise.

    Attributes:
        strength: Factor of the standard deviations.
        draw: Number of the draw.
        images: Numbers of the images in the batch that the model runs on.
    """

    def __init__(self, std: Tensor, seed: int):
        self.std = std
        self.seed = seed
        self.strength = 0.0
        self.draw = 0
        self.images: Sequence[int] = ()

    def __call__(self, feature: Tensor) -> Tensor:
        """Returns the feature (N, C, ...) of the current images with noise."""
        noise = torch.stack([draw_noise(feature.shape[1:], self.seed, i, self.draw) for i in self.images])
        std = self.std.view(-1, *[1] * (feature.dim() - 2))
        return feature + (self.strength * std * noise).to(feature)


def draw_noise(shape: Sequence[int], seed: int, image: int, draw: int) -> Tensor:
    """Draws standard normal numbers that depend on the arguments alone, on the CPU."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(mix_seed(seed, image, draw)))


def mix_seed(*numbers: int) -> int:
    """Turns numbers that are not negative into one seed, so that near numbers give unrelated seeds."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


@torch.no_grad()
def measure_std(run: Run, feature: str, batches: Iterable[list[dict]]) -> Tensor:
    """Measures the standard deviation of each channel of a feature over all images and cells.

    Cells of the padding count as well.

    Args:
        run: The model.
        feature: Name of the signal, (N, C, ...).
        batches: Images as the model gets them.

    Returns:
        (C,), on the CPU.

    Raises:
        InputError: If the feature is not finite for some image.
    """
    tap = build_tap(run.model)
    count, sums, squares = 0, torch.zeros(()), torch.zeros(())
    for batch in batches:
        cells = tap.compute(batch, {feature}, {})[feature].movedim(1, -1).flatten(0, -2).double()
        count += len(cells)
        sums, squares = sums + cells.sum(dim=0).cpu(), squares + cells.square().sum(dim=0).cpu()
    if not (sums.isfinite() & squares.isfinite()).all():
        raise InputError(f"--feature: {feature} of {run.name!r} has values that are not finite.")
    return (squares / count - (sums / count).square()).clamp(min=0).sqrt().float()
