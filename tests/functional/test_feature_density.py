"""Gaussians of features against NumPy's moments in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from avalanche_ext.functional.feature_density import (
    diagonal_gaussian,
    draw_gaussian,
    drift_of,
    k_means,
    low_rank_gaussian,
    map_gaussian,
    pooled_gaussian,
)


def samples(n, d=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=g, dtype=torch.float64)
    return torch.randn(n, d, generator=g, dtype=torch.float64) @ mix + 3


@pytest.mark.parametrize("n", [40, 6, 5, 3])  # more samples than features, and fewer
def test_all_directions_give_the_covariance_exactly(n):
    u = samples(n)
    mean, factor = low_rank_gaussian(u)
    torch.testing.assert_close(mean, u.mean(0))
    assert factor.shape == (min(n - 1, 5), 5)
    want = torch.from_numpy(np.cov(u.numpy().T))
    torch.testing.assert_close(factor.T @ factor, want, atol=1e-9, rtol=0)


@pytest.mark.parametrize("n", [40, 4])
def test_few_directions_are_the_strongest(n):
    u = samples(n)
    _, factor = low_rank_gaussian(u, 2)
    values, vectors = np.linalg.eigh(np.cov(u.numpy().T))
    want = (vectors[:, -2:] * values[-2:]) @ vectors[:, -2:].T
    torch.testing.assert_close(factor.T @ factor, torch.from_numpy(want), atol=1e-9, rtol=0)
    lengths = factor.square().sum(1)
    torch.testing.assert_close(lengths, torch.from_numpy(values[-2:][::-1].copy()))


def test_no_more_directions_than_samples_have():
    assert low_rank_gaussian(samples(3), 20)[1].shape == (2, 5)
    mean, factor = low_rank_gaussian(samples(1), 20)
    assert factor.shape == (0, 5)
    drawn = draw_gaussian(mean, factor, torch.zeros(4, 0, dtype=torch.float64))
    assert torch.equal(drawn, mean.expand(4, 5))
    same = torch.ones(7, 5)  # and where they do not vary, directions of length 0
    assert low_rank_gaussian(same, 20)[1].abs().max() == 0
    assert low_rank_gaussian(same[:3], 20)[1].abs().max() == 0


def test_a_diagonal_one_has_the_features_own_deviations():
    u = samples(30)
    mean, deviations = diagonal_gaussian(u)
    torch.testing.assert_close(mean, u.mean(0))
    torch.testing.assert_close(deviations, u.std(0))
    assert diagonal_gaussian(u[:1])[1].abs().max() == 0


def test_draws_have_the_moments_that_were_asked_for():
    noise = torch.randn(200_000, 2, generator=torch.Generator().manual_seed(3))
    factor = torch.tensor([[3.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    u = draw_gaussian(torch.tensor([1.0, 2.0, 3.0]), factor, noise)
    torch.testing.assert_close(u.mean(0), torch.tensor([1.0, 2.0, 3.0]), atol=0.03, rtol=0)
    torch.testing.assert_close(u.var(0), torch.tensor([9.0, 1.0, 0.0]), atol=0.1, rtol=0)
    one = draw_gaussian(torch.zeros(2), torch.tensor([2.0, 5.0]), torch.tensor([[1.0, -1.0]]))
    assert one.tolist() == [[2.0, -5.0]]


def test_a_map_moves_mean_and_covariance():
    weight, bias = torch.diag(torch.tensor([2.0, 3.0])), torch.zeros(2)
    mean, factor = map_gaussian(torch.ones(2), torch.eye(2), weight, bias)
    assert mean.tolist() == [2.0, 3.0]
    assert (factor.T @ factor).tolist() == [[4.0, 0.0], [0.0, 9.0]]
    turn = torch.tensor([[0.0, -1.0], [1.0, 1.0]])
    mean, factor = map_gaussian(
        torch.tensor([1.0, 2.0]), torch.tensor([[2.0, 0.0]]), turn, torch.tensor([5.0, 0.0])
    )
    assert mean.tolist() == [3.0, 3.0]
    assert factor.tolist() == [[0.0, 2.0]]
    _, deviations = map_gaussian(torch.zeros(2), torch.tensor([3.0, 4.0]), turn, torch.zeros(2))
    assert deviations.tolist() == [4.0, 5.0]  # diagonal of turn diag(9, 16) turn^T: 16, 25


def fitted(u, kind):
    """Mean, factor and number of samples."""
    return (*(diagonal_gaussian(u) if kind == "diagonal" else low_rank_gaussian(u, kind)), len(u))


@pytest.mark.parametrize("sizes", [(40, 25), (3, 2), (1, 1), (1, 40), (2, 1)])
def test_two_gaussians_make_that_of_all_their_samples(sizes):
    n, m = sizes
    u, v = samples(n), 3 * samples(m, seed=1) - 20
    both = torch.cat([u, v])
    mean, factor = pooled_gaussian(fitted(u, None), fitted(v, None))
    torch.testing.assert_close(mean, both.mean(0))
    assert factor.shape == (min(n + m - 1, 5), 5)
    want = torch.from_numpy(np.cov(both.numpy().T))
    torch.testing.assert_close(factor.T @ factor, want, atol=1e-9, rtol=1e-9)
    mean, spread = pooled_gaussian(fitted(u, "diagonal"), fitted(v, "diagonal"))
    torch.testing.assert_close(mean, both.mean(0))
    torch.testing.assert_close(spread, both.std(0))


def test_of_two_gaussians_the_strongest_directions_stay():
    u, v = samples(30), samples(50, seed=1) + 4
    _, factor = pooled_gaussian(fitted(u, None), fitted(v, None), 2)
    torch.testing.assert_close(
        factor.T @ factor, (lambda f: f.T @ f)(low_rank_gaussian(torch.cat([u, v]), 2)[1])
    )
    # Single precision in, single precision out.
    small = pooled_gaussian(
        *[(a.float(), b.float(), n) for a, b, n in (fitted(u, 2), fitted(v, 2))]
    )
    assert {t.dtype for t in small} == {torch.float32}


def test_a_mean_follows_the_samples_close_to_it():
    before = torch.tensor([[0.0, 0.0], [0.0, 4.0]])
    after = before + torch.tensor([[1.0, 0.0], [0.0, 7.0]])
    # squared distances 0 and 16, their mean 8: weights 1 and e^-1
    share = float(torch.sigmoid(torch.tensor(1.0)))
    want = torch.tensor([share, 7 * (1 - share)])
    torch.testing.assert_close(drift_of(torch.zeros(2), before, after), want)
    assert drift_of(torch.ones(2), before, before).tolist() == [0.0, 0.0]
    on_it = torch.zeros(2, 2)
    assert drift_of(torch.zeros(2), on_it, on_it + 2).tolist() == [2.0, 2.0]


def test_clusters_are_found_and_empty_ones_left_out():
    u = torch.tensor([[0.0], [0.1], [10.0], [10.1], [20.0], [20.2]])
    cluster = k_means(u, 3, torch.Generator().manual_seed(1))
    assert cluster[0] == cluster[1]
    assert cluster[2] == cluster[3]
    assert cluster[4] == cluster[5]
    assert sorted(cluster.unique().tolist()) == [0, 1, 2]
    same = k_means(torch.ones(4, 2), 3, torch.Generator())
    assert same.tolist() == [0, 0, 0, 0]
    assert k_means(u[:1], 5, torch.Generator()).tolist() == [0]


def test_k_means_ends_where_no_sample_is_closer_to_another_centre():
    u = samples(60, 3)
    cluster = k_means(u, 4, torch.Generator().manual_seed(0))
    centres = torch.stack([u[cluster == c].mean(0) for c in range(4)])
    assert torch.equal(torch.cdist(u, centres).argmin(1), cluster)


@pytest.mark.parametrize("shape", [(0, 3), (4,)])
def test_what_is_no_sample_is_refused(shape):
    for fit in (low_rank_gaussian, diagonal_gaussian):
        with pytest.raises(ValueError, match=r"\(N, D\)"):
            fit(torch.zeros(shape))
