"""Tests CKA against values of published code, and that changes which should not matter leave it as it is."""

import pytest
import torch

from kd_det import InputError
from kd_det.analysis.cka import linear_cka, rbf_cka

X = torch.tensor([[0.2, 0.89, 0.91], [0.24, -0.61, -1.0], [-0.63, 0.22, 0.9], [0.9, 0.22, -0.63]], dtype=torch.float64)
Y = torch.tensor([[0.64, 0.86], [-0.35, -0.98], [0.02, 0.99], [0.32, -0.88]], dtype=torch.float64)


def unbiased_cka(x, y):
    return linear_cka(x, y, unbiased=True)


each_kind = pytest.mark.parametrize("cka", [linear_cka, unbiased_cka, rbf_cka])


@pytest.mark.parametrize(
    ("cka", "expected"),
    [(linear_cka, 0.986384788936879), (unbiased_cka, 0.9870683402417693), (rbf_cka, 0.9826217390118376)],
)
def test_published_values(cka, expected):
    assert cka(X, Y).item() == pytest.approx(expected, abs=1e-9)
    assert cka(X.float(), Y.half()).item() == pytest.approx(expected, abs=1e-3)


def test_linear_cka_by_hand():
    """Centred columns (1, -1, 0) and (1, 0, -1): their product is 1, their squares 2, so (1 / 2)^2."""
    x, y = torch.tensor([[3.0], [1.0], [2.0]]), torch.tensor([[1.0], [0.0], [-1.0]])
    assert linear_cka(x, y).item() == pytest.approx(1 / 4)
    assert linear_cka(x, torch.tensor([[1.0], [1.0], [-2.0]])).item() == pytest.approx(0.0)


@each_kind
def test_cka_ignores_rotation_shift_and_scale(cka):
    rotation = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    torch.testing.assert_close(cka(5 * X @ rotation + 2, Y), cka(X, Y))
    torch.testing.assert_close(cka(Y, X), cka(X, Y))
    torch.testing.assert_close(cka(X, X @ rotation), torch.ones((), dtype=torch.float64))


@each_kind
def test_large_means_cost_no_precision(cka):
    """Features after a ReLU have large means; a difference of large products would have no digits left in float32."""
    x, y = torch.randn(2, 32, 16, generator=torch.Generator().manual_seed(0))
    expected = cka((x + 64).double() - 64, y.double())
    torch.testing.assert_close(cka(x + 64, y - 64).double(), expected, rtol=0, atol=1e-5)


@each_kind
def test_equal_examples_have_no_alignment(cka):
    """The mean of five times 0.1 is not exactly 0.1, which must not matter."""
    same, others = torch.full((5, 3), 0.1), torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    assert cka(same, others).isnan()
    assert cka(others, same).isnan()


def test_few_examples_with_many_features_look_similar_unless_unbiased():
    x, y = torch.randn(2, 20, 8, 4, 4, generator=torch.Generator().manual_seed(0))  # maps are flattened
    assert linear_cka(x, y) > 0.5
    assert abs(unbiased_cka(x, y)) < 0.1


@each_kind
def test_gradient(cka):
    x = X.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: cka(x, Y), x)


@pytest.mark.parametrize(
    ("cka", "rows", "message"),
    [
        (linear_cka, (4, 3), "the same 2 or more examples, got 4 and 3"),
        (linear_cka, (1, 1), "2 or more examples, got 1 and 1"),
        (rbf_cka, (3, 4), "got 3 and 4"),
        (unbiased_cka, (3, 3), "4 or more examples, got 3 and 3"),
    ],
)
def test_wrong_numbers_of_examples_are_refused(cka, rows, message):
    with pytest.raises(InputError, match=f"^CKA: .*{message}"):
        cka(X[: rows[0]], Y[: rows[1]])
