"""Averages of predictions: exact numbers, any temperature, and equal teachers."""

import pytest
import torch

from kd_det.losses.averages import average_sigmoid, average_softmax

A, B = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.1, 0.6, 0.3]])


def test_distributions():
    """Half the sum; and the roots of 0.05, 0.18 and 0.06, divided by their sum."""
    logits = [A.log() + 3, B.log() - 1]
    arithmetic = average_softmax(logits, kind="arithmetic").softmax(dim=1)
    torch.testing.assert_close(arithmetic, torch.tensor([[0.3, 0.45, 0.25]]))
    geometric = average_softmax(logits, kind="geometric").softmax(dim=1)
    torch.testing.assert_close(geometric, torch.tensor([[0.25045, 0.47520, 0.27435]]), rtol=1e-4, atol=0)


@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_softened_distributions(temperature):
    """The logits of A and B at this temperature."""
    logits = [temperature * x.log() for x in (A, B)]
    found = average_softmax(logits, kind="arithmetic", temperature=temperature)
    torch.testing.assert_close((found / temperature).exp(), torch.tensor([[0.3, 0.45, 0.25]]))
    found = average_softmax(logits, kind="geometric", temperature=temperature) / temperature
    torch.testing.assert_close(found, (A.log() + B.log()) / 2)


def test_independent_probabilities():
    """Odds of 9 and 1 have the mean odds 3."""
    logits = list(torch.tensor([0.9, 0.5]).logit())
    assert average_sigmoid(logits, kind="arithmetic").sigmoid().item() == pytest.approx(0.7)
    assert average_sigmoid(logits, kind="geometric").sigmoid().item() == pytest.approx(0.75)


@pytest.mark.parametrize("kind", ["arithmetic", "geometric"])
@pytest.mark.parametrize("function", [average_softmax, average_sigmoid])
def test_equal_teachers_and_half_precision(function, kind):
    """The mean of equals is equal to them; certain predictions stay finite, in float32."""
    logits = torch.tensor([[100.0, -100.0, 3.0], [0.0, 0.5, -2.0]])
    found = function([logits, logits, logits], kind=kind)
    probabilities = torch.softmax if function is average_softmax else lambda x, dim: x.sigmoid()
    torch.testing.assert_close(probabilities(found, dim=1), probabilities(logits, dim=1), rtol=1e-6, atol=1e-7)
    half = function([logits.half(), logits.half()], kind=kind)
    assert half.dtype == torch.float32
    assert half.isfinite().all()


def test_wrong_options():
    with pytest.raises(ValueError, match="kind must be one of 'arithmetic', 'geometric', got 'median'"):
        average_sigmoid([A], kind="median")
    with pytest.raises(ValueError, match="temperature must be above 0, got 0"):
        average_softmax([A], kind="arithmetic", temperature=0)
