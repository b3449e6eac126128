"""Pairwise similarities, their correlation, and per-sample gradients, against plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from avalanche_ext.functional.similarity import (
    cosine_similarities,
    pearson,
    per_sample_gradients,
    split_pairs,
)


def test_cosine_similarities_closed_form():
    rows = torch.tensor([[3.0, 4.0], [4.0, -3.0], [-6.0, -8.0], [1.0, 0.0], [0.0, 0.0]])
    want = torch.tensor(
        [
            [1, 0, -1, 0.6, 0],
            [0, 1, 0, 0.8, 0],
            [-1, 0, 1, -0.6, 0],
            [0.6, 0.8, -0.6, 1, 0],
            [0, 0, 0, 0, 0],  # a zero row is like nothing, itself included
        ]
    )
    torch.testing.assert_close(cosine_similarities(rows), want)


def test_cosine_similarities_flatten_behind_the_first_axis():
    maps = torch.randn(5, 2, 3, 4)
    got = cosine_similarities(maps)
    assert torch.equal(got, cosine_similarities(maps.flatten(1)))
    for i in range(5):
        for j in range(5):
            want = F.cosine_similarity(maps[i].flatten(), maps[j].flatten(), dim=0)
            assert float(got[i, j]) == pytest.approx(float(want), abs=1e-6)


def test_split_pairs_takes_each_unordered_pair_once():
    matrix = torch.arange(16.0).reshape(4, 4)  # entry (i, j) is 4 i + j
    different, same = split_pairs(matrix, torch.tensor([7, 9001, 7, 9001]))
    assert different.tolist() == [1, 3, 6, 11]  # (0,1) (0,3) (1,2) (2,3)
    assert same.tolist() == [2, 7]  # (0,2) (1,3)


@pytest.mark.parametrize(("labels", "counts"), [([1, 1, 1], (0, 3)), ([1, 2, 3], (3, 0))])
def test_split_pairs_may_leave_one_side_empty(labels, counts):
    different, same = split_pairs(torch.zeros(3, 3), torch.tensor(labels))
    assert (len(different), len(same)) == counts


@pytest.mark.parametrize("shape", [(3, 3), (2, 3), (2,)])
def test_split_pairs_refuses_other_shapes(shape):
    with pytest.raises(ValueError, match=r"\(B, B\) and targets \(B,\)"):
        split_pairs(torch.zeros(shape), torch.tensor([0, 1]))


def test_pearson_closed_forms():
    a = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert float(pearson(a, 5 - 2 * a)) == pytest.approx(-1, abs=1e-12)
    assert float(pearson(a, 1e6 + 3 * a)) == pytest.approx(1, abs=1e-9)
    assert float(pearson(a, torch.tensor([1.0, -1.0, -1.0, 1.0]))) == pytest.approx(0, abs=1e-12)
    assert math.isnan(float(pearson(a, torch.ones(4))))


def test_pearson_equals_numpy():
    a, b = torch.randn(50), torch.randn(50)
    want = np.corrcoef(a.double().numpy(), b.double().numpy())[0, 1]
    assert float(pearson(a, b)) == pytest.approx(want, abs=1e-12)
    assert pearson(a, b).dtype == torch.float64


@pytest.mark.parametrize(("a", "b"), [((3,), (2,)), ((1,), (1,)), ((2, 2), (2, 2))])
def test_pearson_refuses_other_shapes(a, b):
    with pytest.raises(ValueError, match="two vectors of one length >= 2"):
        pearson(torch.ones(a), torch.ones(b))


@pytest.fixture
def net():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()
    model[1].running_mean.fill_(0.3)
    return model.eval()


def loop(model, x, y):
    """One backward pass per sample."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for i in range(len(y)):
        gradients = torch.autograd.grad(
            F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), parameters
        )
        rows.append(torch.cat([g.flatten() for g in gradients]))
    return torch.stack(rows)


@pytest.mark.parametrize("chunk_size", [None, 1, 4])
def test_per_sample_gradients_equal_one_backward_per_sample(net, chunk_size):
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])
    got = per_sample_gradients(net, x, y, chunk_size=chunk_size)
    assert got.shape == (6, 4 * 5 + 5 + 10 + 5 * 3 + 3)
    torch.testing.assert_close(got, loop(net, x, y), rtol=1e-10, atol=1e-12)


def test_per_sample_gradients_skip_frozen_parameters_and_leave_grad_alone(net):
    for parameter in net[0].parameters():
        parameter.requires_grad_(False)
    net[3].bias.grad = torch.full((3,), 7.0, dtype=torch.float64)
    x, y = torch.randn(3, 4, dtype=torch.float64), torch.tensor([0, 1, 2])
    got = per_sample_gradients(net, x, y)
    assert got.shape == (3, 10 + 5 * 3 + 3)
    torch.testing.assert_close(got, loop(net, x, y), rtol=1e-10, atol=1e-12)
    assert net[3].bias.grad.tolist() == [7.0, 7.0, 7.0]
    assert net[3].weight.grad is None


def test_per_sample_gradients_use_the_given_loss(net):
    x, y = torch.randn(3, 4, dtype=torch.float64), torch.tensor([0, 1, 2])
    double = per_sample_gradients(net, x, y, lambda out, t: 2 * F.cross_entropy(out, t))
    torch.testing.assert_close(double, 2 * per_sample_gradients(net, x, y))


@pytest.mark.parametrize("scale", [1e-30, 1e-13, 1.0, 1e18])
def test_cosine_does_not_depend_on_the_length_of_a_row(scale):
    rows = torch.tensor([[3.0, 4.0], [6.0, 8.0], [4.0, -3.0]])
    expected = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    torch.testing.assert_close(cosine_similarities(scale * rows), expected, rtol=0, atol=1e-6)
