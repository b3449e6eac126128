"""Densities of features: what is drawn, how evenly, and that nothing written is touched."""

from __future__ import annotations

import pickle

import pytest
import torch

from avalanche_ext.functional.feature_density import low_rank_gaussian
from avalanche_ext.models.feature_memory import GaussianMemory


def features(n=300, d=6, classes=(3, 1), seed=0, shift=0.0):
    g = torch.Generator().manual_seed(seed)
    y = torch.tensor(classes).repeat_interleave(n)
    mix = torch.randn(d, d, generator=g)
    return torch.randn(len(y), d, generator=g) @ mix + y[:, None] + shift, y


def seed(k=0):
    return torch.Generator().manual_seed(k)


def moments(memory, label, n=40_000):
    u, y = memory.sample(n, seed(5))
    mine = u[y == label].double()
    return mine.mean(0), mine.T.cov()


@pytest.mark.parametrize("covariance", ["full", 6, 20])
def test_draws_have_the_moments_of_the_class(covariance):
    u, y = features()
    memory = GaussianMemory(covariance)
    memory.write(u, y)
    for label in (3, 1):
        mean, cov = moments(memory, label)
        mine = u[y == label].double()
        torch.testing.assert_close(mean, mine.mean(0), atol=0.1, rtol=0)
        torch.testing.assert_close(cov, mine.T.cov(), atol=0.4, rtol=0.05)


def test_few_directions_and_none():
    u, y = features()
    memory = GaussianMemory(2)
    memory.write(u, y)
    _, cov = moments(memory, 3)
    _, factor = low_rank_gaussian(u[y == 3].double(), 2)
    torch.testing.assert_close(cov, factor.T @ factor, atol=0.4, rtol=0.05)
    diagonal = GaussianMemory("diagonal")
    diagonal.write(u, y)
    _, cov = moments(diagonal, 1)
    torch.testing.assert_close(cov, torch.diag(u[y == 1].double().var(0)), atol=0.4, rtol=0.05)


@pytest.mark.parametrize("n", [1, 2, 7, 100])
def test_any_stretch_of_labels_is_even(n):
    memory = GaussianMemory()
    memory.write(*features(9, classes=(0, 1, 2)))
    memory.write(*features(9, classes=(7, 4)))
    _, y = memory.sample(n, seed(n))
    assert len(y) == n
    for start in range(n):
        counts = [(y[start : start + 12] == c).sum().item() for c in (0, 1, 2, 7, 4)]
        assert sum(counts) == min(12, n - start)
        assert max(counts) - min(counts) <= 1


def test_every_draw_starts_with_another_class():
    memory = GaussianMemory()
    memory.write(*features(9, classes=(0, 1, 2)))
    g = seed()
    assert {memory.sample(1, g)[1].item() for _ in range(40)} == {0, 1, 2}


def test_what_is_written_is_not_touched_by_what_comes_later():
    memory = GaussianMemory()
    memory.write(*features(classes=(3, 1)))
    before = pickle.dumps(memory._gaussians[3]), pickle.dumps(memory._gaussians[1])
    memory.write(*features(classes=(0, 2), seed=1))
    assert (pickle.dumps(memory._gaussians[3]), pickle.dumps(memory._gaussians[1])) == before
    assert memory.classes == [1, 3, 0, 2]


@pytest.mark.parametrize("covariance", ["full", "diagonal"])
def test_a_class_that_comes_back_has_the_density_of_all_its_samples(covariance):
    u, y = features(90, classes=(0,))
    parts, whole = GaussianMemory(covariance), GaussianMemory(covariance)
    for rows in torch.arange(90).split([50, 1, 39]):
        parts.write(u[rows], y[rows])
    whole.write(u, y)
    (found,), (want,) = parts._gaussians[0], whole._gaussians[0]
    assert found.count == 90
    torch.testing.assert_close(found.mean, want.mean)
    square = (lambda f: f.T @ f) if covariance == "full" else torch.square
    torch.testing.assert_close(square(found.factor), square(want.factor), atol=1e-4, rtol=1e-4)
    assert parts.nbytes == whole.nbytes
    assert parts.classes == [0]


def test_classes_that_come_back_for_ever_take_no_more_bytes():
    memory = GaussianMemory(3, components=2)
    for visit in range(30):
        memory.write(*features(20, seed=visit), seed(visit))
        # Clusters of few samples have fewer directions.
        assert memory.nbytes <= 2 * 2 * (6 + 3 * 6) * 4
    assert sum(g.count for g in memory._gaussians[1]) == 600


def test_of_a_classs_densities_the_nearest_become_one():
    memory = GaussianMemory("diagonal", components=2)
    for shift, n in ((0.0, 300), (100.0, 100), (8.0, 200)):
        u = features(n, classes=(0,), shift=shift)[0]
        memory._gaussians[0] = memory._pooled([*memory._gaussians.get(0, []), memory._fit(u)])
    assert sorted(g.count for g in memory._gaussians[0]) == [100, 500]
    u = memory.sample(20_000, seed())[0]
    assert (u[:, 0] > 50).float().mean().item() == pytest.approx(1 / 6, abs=0.02)
    want = (100 * 100 + 200 * 8) / 600
    assert memory.mean(0).mean().item() == pytest.approx(want, abs=0.3)


def test_clusters_of_a_class_are_kept_apart():
    u = torch.cat([torch.randn(60, 2), torch.randn(20, 2) + 40])
    memory = GaussianMemory("diagonal", components=2)
    memory.write(u, torch.zeros(80, dtype=torch.int64), seed())
    drawn, _ = memory.sample(8000, seed(1))
    far = drawn[:, 0] > 20
    assert far.float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert drawn[far].std(0).max() < 1.6
    assert drawn[~far].std(0).max() < 1.6
    assert memory.nbytes == 2 * (2 + 2) * 4


def test_behind_a_relu_nothing_is_drawn_below_0():
    u, y = features()
    memory = GaussianMemory()
    memory.write(u.relu(), y)
    drawn, _ = memory.sample(500, seed())
    assert drawn.min() == 0
    assert (drawn == 0).float().mean() > 0.1
    memory.write(u, y + 10)  # features that may be negative after all
    assert memory.sample(500, seed())[0].min() < 0


@pytest.mark.parametrize(
    ("covariance", "numbers"), [("diagonal", 2 * 6), (3, 4 * 6), ("full", 7 * 6), (50, 7 * 6)]
)
def test_bytes_are_those_of_means_and_factors(covariance, numbers):
    memory = GaussianMemory(covariance)
    assert memory.nbytes == 0
    memory.write(*features())
    assert memory.nbytes == 2 * numbers * 4


@pytest.mark.parametrize("covariance", ["diagonal", 4, "full"])
@pytest.mark.parametrize("n", [1, 2])
def test_a_class_of_one_or_two_samples(covariance, n):
    memory = GaussianMemory(covariance)
    u, y = features(n, classes=(5,))
    memory.write(u, y)
    drawn, labels = memory.sample(6, seed())
    assert torch.isfinite(drawn).all()
    assert labels.tolist() == [5] * 6
    assert drawn.allclose(u[:1].expand(6, -1)) == (n == 1)


def test_it_moves_with_an_affine_map():
    u, y = features()
    memory, moved = GaussianMemory("full"), GaussianMemory("full")
    memory.write(u, y)
    weight, bias = torch.randn(6, 6), torch.randn(6)
    memory.move(weight, bias)
    moved.write(u @ weight.T + bias, y)
    for label in (1, 3):
        a, b = memory._gaussians[label][0], moved._gaussians[label][0]
        torch.testing.assert_close(a.mean, b.mean, atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(
            a.factor.T @ a.factor, b.factor.T @ b.factor, atol=1e-2, rtol=1e-3
        )


def test_it_follows_a_space_that_has_moved():
    u, y = features()
    weight, bias = torch.eye(6) + 0.3 * torch.randn(6, 6), torch.randn(6)
    want = GaussianMemory()
    want.write(u @ weight.T + bias, y)
    new = torch.randn(200, 6) * 3
    for kind, atol in (("linear", 1e-3), ("none", 0.0)):
        memory = GaussianMemory()
        memory.write(u, y)
        if kind != "none":
            memory.follow(new, new @ weight.T + bias, kind)
        close = torch.allclose(memory._gaussians[3][0].mean, want._gaussians[3][0].mean, atol=atol)
        assert close == (kind == "linear")
    shifted = GaussianMemory()
    shifted.write(u, y)
    before = shifted._gaussians[3][0].mean.clone()
    shifted.follow(new, new + 2, "sdc")
    torch.testing.assert_close(shifted._gaussians[3][0].mean, before + 2)


def test_one_generator_gives_one_draw_and_the_global_one_is_not_asked():
    memory = GaussianMemory("diagonal", components=2)
    state = torch.get_rng_state()
    memory.write(*features(), seed(1))
    a, b, c = (memory.sample(50, seed(k))[0] for k in (2, 2, 3))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("covariance", [0, True, 2.5, "diag", None])
def test_bad_covariances_are_refused(covariance):
    with pytest.raises(ValueError, match="'diagonal', 'full'"):
        GaussianMemory(covariance)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="components >= 1"):
        GaussianMemory(components=0)
    with pytest.raises(ValueError, match="empty"):
        GaussianMemory().sample(3)
    u, y = features()
    u[4, 2] = torch.nan
    with pytest.raises(ValueError, match="diverged"):
        GaussianMemory().write(u, y)
