"""Tests visual concepts against published code, by hand, and on networks that look at known parts of an image."""

import math

import pytest
import torch

from kd_det import InputError
from kd_det.analysis.visual_concepts import (
    START,
    UNIT,
    concept_ratio,
    entropy,
    find_concepts,
    information_loss,
    learning_effort,
    measure_entropies,
    stability,
)


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float64)


# ---- Values of the published code ----
SIGMA = tensor([0.01, 0.02, 0.05], [0.1, 0.001, 0.03], [1.0, 0.01, 0.04])
IMAGE = tensor([0.0, 0.32, 0.49], [0.43, 0.17, 0.18], [0.44, 0.49, 0.32])
NOISE = torch.stack(
    [
        tensor([0.3, 0.99, 0.6], [-0.44, -1.0, -0.46], [0.58, 0.99, 0.32]),
        tensor([-0.7, -0.95, -0.17], [0.8, 0.89, 0.01], [-0.89, -0.81, 0.15]),
    ]
)
WEIGHTS = tensor(
    [0.28, 0.65, -0.22, -0.36],
    [0.54, 0.45, -0.43, -0.11],
    [0.68, 0.16, -0.5, 0.19],
    [0.68, -0.14, -0.42, 0.47],
    [0.52, -0.38, -0.2, 0.66],
    [0.25, -0.5, 0.1, 0.69],
    [-0.05, -0.46, 0.4, 0.58],
    [-0.32, -0.27, 0.62, 0.34],
    [-0.48, 0.01, 0.7, 0.03],
)


def linear(images):
    return images.flatten(1) @ WEIGHTS


def test_loss_equals_the_published_code():
    noisy, clean = linear(IMAGE + SIGMA * NOISE), linear(IMAGE[None])[0]
    scale = information_loss(linear(IMAGE + START * NOISE), clean, SIGMA, scale=1.0, weight=0.0)
    assert scale.item() == pytest.approx(2.1565853374999945e-05, abs=1e-15)
    assert entropy(SIGMA).mean().item() == pytest.approx(-2.1426025495867367, abs=1e-9)
    loss = information_loss(noisy, clean, SIGMA, scale=scale, weight=7.0)
    assert loss.item() == pytest.approx(2393.212444754793, abs=1e-9)


FOREGROUND = torch.tensor([[[0, 0, 0], [0, 1, 1], [0, 1, 1]]]).bool()


def test_concepts_equal_the_published_code():
    concepts = find_concepts(entropy(SIGMA)[None], FOREGROUND)
    assert concepts.int().tolist() == [[[1, 1, 1], [0, 1, 1], [0, 1, 1]]]
    counts = [(concepts & where).flatten(1).sum(dim=1).double() for where in (FOREGROUND, ~FOREGROUND)]
    assert [x.tolist() for x in counts] == [[4], [3]]
    assert concept_ratio(*counts).item() == pytest.approx(4 / 7, abs=1e-9)


def test_learning_equals_the_published_code():
    ways = tensor([0.0, 0.4, 0.3, 0.2], [0.0, 0.1, 0.1, 0.5])
    mean, variance = learning_effort(tensor([1, 3, 5, 5], [0, 2, 1, 1]), ways)
    assert [mean.item(), variance.item()] == pytest.approx([0.4, 0.09], abs=1e-9)
    cells = [[(1, 1), (2, 2)], [(1, 1), (1, 2)], [(1, 1), (2, 1), (2, 2)]]
    concepts = torch.zeros(3, 1, 4, 4, dtype=torch.bool)
    for epoch, positions in enumerate(cells):
        concepts[epoch, 0][tuple(zip(*positions, strict=True))] = True
    assert stability(concepts).item() == pytest.approx(0.75, abs=1e-9)


# ---- By hand ----
def test_background_is_averaged_over_all_images():
    """The background has 2 and 4, on average 3; all cells below 2.8 are concepts."""
    foreground = torch.tensor([[[True, False]], [[False, True]]])
    concepts = find_concepts(torch.tensor([[[2.9, 2.0]], [[4.0, 2.7]]]), foreground)
    assert concepts.tolist() == [[[False, True]], [[False, True]]]
    assert find_concepts(torch.tensor([[[2.9, 2.0]], [[4.0, 2.7]]]), foreground, threshold=0.05).sum() == 3


def test_images_without_a_result_are_left_out():
    """Images may lack entropies, background or concepts, or may never have had a concept."""
    nan = math.nan
    foreground = torch.tensor([[[True, False]], [[True, True]], [[True, False]]])
    concepts = find_concepts(torch.tensor([[[1.0, 3.0]], [[1.0, 5.0]], [[nan, nan]]]), foreground)
    assert concepts.tolist() == [[[True, False]], [[True, False]], [[False, False]]]
    assert concept_ratio(tensor(1, 3, 0), tensor(3, 1, 0)).item() == 0.5
    assert stability(torch.tensor([[[[True]], [[False]]], [[[True]], [[False]]]])).item() == 0.5
    # Counts are divided in float64, too.
    assert concept_ratio(torch.tensor([1]), torch.tensor([2])).item() == 1 / 3
    assert stability(torch.tensor([[[[True, True, True]]], [[[True, False, False]]]])).item() == 1 / 3
    with pytest.raises(InputError, match="no image has background"):
        find_concepts(torch.ones(1, 2, 2), torch.ones(1, 2, 2, dtype=torch.bool))


def test_all_images_may_share_the_steps_of_the_weights():
    mean, variance = learning_effort(tensor([1, 2, 2], [3, 2, 1], [0, 0, 1]), tensor(0.0, 0.5, 1.0).flatten())
    assert mean.item() == pytest.approx((0.5 + 0.0 + 1.5) / 3)
    assert variance.item() == pytest.approx(7 / 18)


# ---- The search for the noise ----
def left_half(images):
    return images[..., :8].flatten(1)


def test_cells_that_a_feature_ignores_keep_their_entropy():
    image = 128 * torch.ones(3, 16, 16)
    entropies = measure_entropies(left_half, image, grid=4, copies=8)
    assert entropies.shape == (4, 4)
    assert entropies[:, 2:].min() > entropies[:, :2].max() + 0.3
    # The right half's noise grew from the start on.
    assert entropies[:, 2:].min() > entropy(torch.tensor(START))
    assert torch.equal(entropies, measure_entropies(left_half, image, grid=4, copies=8))
    concepts = find_concepts(entropies[None], torch.zeros(1, 4, 4, dtype=torch.bool), threshold=0.1)
    assert concepts[0].any(dim=0).tolist() == [True, True, False, False]


def test_batches_of_copies_give_the_same_result():
    """Whether noise is drawn at once or in batches, its numbers come in the same order."""
    image = 128 * torch.ones(1, 4, 4)
    whole, parts = (measure_entropies(left_half, image, grid=2, copies=10, batch=n) for n in (10, 4))
    torch.testing.assert_close(whole, parts)


def test_the_mean_entropy_comes_close_to_the_target():
    image = 128 * torch.ones(1, 4, 4)
    for target in (-3.1, -2.8):
        entropies = measure_entropies(lambda x: 1e-3 * x.flatten(1)[:, :8], image, grid=2, target=target, copies=32)
        assert entropies.mean().item() == pytest.approx(target, abs=0.05)


@pytest.mark.parametrize("bound", [0.5, 1.5, 4.0])
def test_the_feature_changes_by_the_bound(bound):
    """The cells' pixels count 1, 2, 3 and 4 times; the mean squared change is that of their variances."""
    factors = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).repeat_interleave(4, 0).repeat_interleave(4, 1)
    image = 128 * torch.ones(1, 8, 8)
    entropies = measure_entropies(lambda x: 1e4 + (x * factors).flatten(1), image, grid=2, copies=64, bound=bound)
    change = (entropies.exp() / entropy(torch.tensor(1.0)).exp() * torch.tensor([[1, 2], [3, 4]])).square().mean()
    assert (change / (START**2 * 7.5)).item() == pytest.approx(bound, rel=0.1)
    assert entropies[0, 0] > entropies[1, 1]


def test_a_bound_and_a_target_give_the_same_order_of_cells():
    image = 128 * torch.ones(3, 16, 16)
    entropies = measure_entropies(left_half, image, grid=4, copies=8, bound=1.5)
    assert entropies[:, 2:].min() > entropies[:, :2].max() + 0.3
    assert torch.equal(entropies, measure_entropies(left_half, image, grid=4, copies=8, bound=1.5))


def test_features_that_do_not_respond_have_no_entropies():
    """One feature is constant, one is always negative and therefore rectified to 0, and one is not finite."""
    nan = math.nan
    for feature in (lambda x: torch.ones(len(x), 2), lambda x: -1 - x.flatten(1).abs(), lambda x: nan * x.flatten(1)):
        assert measure_entropies(feature, torch.ones(1, 4, 4), grid=2, copies=2).isnan().all()


def test_noise_is_in_grey_levels():
    """The feature is computed for the image first, then for copies with noise of the initial deviation."""
    seen = []

    def feature(images):
        seen.append(images.detach())
        return images.flatten(1)

    measure_entropies(feature, 100 * torch.ones(1, 32, 32), grid=4, copies=16, steps=1)
    assert seen[0].tolist() == [(100 * torch.ones(1, 32, 32)).tolist()]
    assert seen[1].std().item() == pytest.approx(START * UNIT, rel=0.05)


def test_an_image_may_have_several_features():
    """The features of boxes, for example, come image by image."""

    def boxes(images):
        return torch.stack([images[..., :2].flatten(1), images[..., 2:].flatten(1)], dim=1).flatten(0, 1)

    image = torch.arange(16.0).view(1, 4, 4)
    once = measure_entropies(lambda x: x.flatten(1), image, grid=2, copies=4)
    torch.testing.assert_close(measure_entropies(boxes, image, grid=2, copies=4), once)
