"""Ridge regression against normal equations solved one target at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from avalanche_ext.functional.linear_map import r_squared, ridge


def pairs(n=50, d=4, e=3):
    x = torch.randn(n, d, dtype=torch.float64) * torch.tensor([1.0, 2.0, 0.5, 3.0])[:d]
    return x, torch.randn(n, e, dtype=torch.float64) + x[:, :1]


@pytest.mark.parametrize("lam", [0.0, 0.3, 50.0])
@pytest.mark.parametrize("identity", [False, True])
def test_ridge_is_the_minimum_of_its_objective(lam, identity):
    x, y = pairs(e=4)
    start = torch.eye(4, dtype=torch.float64) if identity else torch.zeros(4, 4).double()
    weight, bias = ridge(x, y, lam, towards_identity=identity)
    weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    objective = ((x @ weight.T + bias - y) ** 2).sum() + lam * ((weight - start) ** 2).sum()
    slopes = torch.autograd.grad(objective, (weight, bias))
    assert all(s.abs().max() < 1e-9 for s in slopes)


def test_ridge_is_a_least_squares_problem_with_more_rows():
    x, y = pairs()
    weight, bias = ridge(x, y, 0.7)
    a = np.vstack([(x - x.mean(0)).numpy(), np.sqrt(0.7) * np.eye(4)])
    b = np.vstack([(y - y.mean(0)).numpy(), np.zeros((4, 3))])
    want = np.linalg.lstsq(a, b, rcond=None)[0].T
    np.testing.assert_allclose(weight.numpy(), want, atol=1e-10)
    torch.testing.assert_close(bias, y.mean(0) - weight @ x.mean(0))


def test_a_map_that_is_there_is_found():
    x, _ = pairs()
    a, b = torch.randn(3, 4).double(), torch.randn(3).double()
    weight, bias = ridge(x, x @ a.T + b, 0.0)
    torch.testing.assert_close(weight, a, atol=1e-9, rtol=0)
    torch.testing.assert_close(bias, b, atol=1e-9, rtol=0)


@pytest.mark.parametrize("lam", [0.0, 1e-2])
@pytest.mark.parametrize("identity", [False, True])
def test_where_nothing_varies_the_map_is_what_it_shrinks_towards(lam, identity):
    x, _ = pairs()
    x[:, 2] = 1.5
    weight, _ = ridge(x, 3 * x, lam, towards_identity=identity)
    want = torch.tensor([0.0, 0.0, 1.0 if identity else 0.0, 0.0]).double()
    torch.testing.assert_close(weight[:, 2], want, atol=1e-9, rtol=0)
    torch.testing.assert_close(weight[0, 0].item(), 3.0, atol=1e-3, rtol=0)


@pytest.mark.parametrize("n", [1, 3])
def test_fewer_samples_than_features_are_mapped_exactly_without_a_penalty(n):
    x, y = pairs(n=n)
    weight, bias = ridge(x, y, 0.0)
    torch.testing.assert_close(x @ weight.T + bias, y, atol=1e-9, rtol=0)


def test_what_comes_in_single_precision_goes_out_so():
    x, y = pairs()
    assert ridge(x.float(), y.float())[0].dtype == torch.float32


def test_r_squared_by_hand():
    y = torch.tensor([[0.0, 0.0], [2.0, 0.0], [1.0, 3.0]])  # varies by 2 + 6 around (1, 1)
    assert r_squared(y, y) == 1
    assert r_squared(y.mean(0).expand(3, 2), y) == 0
    wrong = y.clone()
    wrong[0, 0] = 2.0
    assert r_squared(wrong, y).item() == pytest.approx(0.5)
    assert r_squared(torch.ones(2, 2), torch.ones(2, 2)) == 1
    assert r_squared(torch.zeros(2, 2), torch.ones(2, 2)) == -torch.inf


def test_what_does_not_pair_is_refused():
    with pytest.raises(ValueError, match="3 and 2"):
        ridge(torch.zeros(3, 2), torch.zeros(2, 2))
    with pytest.raises(ValueError, match="0 and 0"):
        ridge(torch.zeros(0, 2), torch.zeros(0, 2))
    with pytest.raises(ValueError, match="one size"):
        ridge(torch.zeros(3, 2), torch.zeros(3, 4), towards_identity=True)
