"""A reservoir of activations: its budget, its balance, and what it gives."""

from __future__ import annotations

import pickle

import pytest
import torch

from avalanche_ext.training.storage_policy.feature_buffer import FeatureBuffer


def seed(k=0):
    return torch.Generator().manual_seed(k)


def rows(label, n, d=4):
    """Rows that tell their class and number."""
    u = torch.zeros(n, d)
    u[:, 0], u[:, 1] = label, torch.arange(n)
    return u, torch.full((n,), label)


def held(buffer):
    return torch.bincount(buffer._labels[buffer._ledger.index().slots], minlength=3).tolist()


def test_the_budget_is_kept_and_shared_evenly():
    buffer = FeatureBuffer(10)
    buffer.write(*rows(0, 30), seed())
    assert held(buffer) == [10, 0, 0]
    buffer.write(*rows(1, 3), seed(1))
    assert held(buffer) == [5, 3, 0]
    u, y = (torch.cat(c) for c in zip(rows(2, 40), rows(1, 40), strict=True))
    buffer.write(u, y, seed(2))
    assert held(buffer) == [4, 3, 3]
    assert len(buffer) == 10
    assert buffer.nbytes == 10 * (4 * 4 + 8)
    assert buffer.classes == [0, 1, 2]


def test_features_stay_with_their_labels():
    buffer = FeatureBuffer(9)
    for label in (0, 1, 2):
        buffer.write(*rows(label, 20), seed(label))
    u, y = buffer.sample(200, seed())
    assert torch.equal(u[:, 0].long(), y)
    for label in (0, 1, 2):
        assert len(u[y == label, 1].unique()) == 3  # all that is kept of it


def test_what_is_kept_is_a_uniform_subset_of_all_that_came():
    counts = torch.zeros(20)
    for k in range(300):
        buffer = FeatureBuffer(8)
        u, y = rows(0, 20)
        for part in range(4):  # a class that comes back
            buffer.write(u[5 * part : 5 * part + 5], y[:5], seed(1000 * k + part))
        buffer.write(*rows(1, 5), seed(k))
        u, y = buffer.sample(200, seed(k))
        counts[u[y == 0, 1].unique().long()] += 1
    assert counts.sum() == 300 * 4
    assert counts.min() > 35  # 60 each is expected, with a deviation of 7
    assert counts.max() < 90


@pytest.mark.parametrize("n", [1, 7, 50])
def test_any_stretch_of_labels_is_even(n):
    buffer = FeatureBuffer(20)
    for label, size in ((0, 30), (1, 2), (2, 9)):
        buffer.write(*rows(label, size), seed(label))
    _, y = buffer.sample(n, seed(n))
    counts = y.bincount(minlength=3)
    assert counts.sum() == n
    assert counts.max() - counts.min() <= 1


def test_a_budget_in_bytes():
    buffer = FeatureBuffer(mem_bytes=100)  # 24 bytes a row
    buffer.write(*rows(0, 30), seed())
    assert len(buffer) == 4
    assert buffer.nbytes == 96


def test_the_global_random_state_is_not_asked_and_pickles_give_the_same():
    state = torch.get_rng_state()
    buffer = FeatureBuffer(5)
    assert buffer.nbytes == 0
    assert buffer.classes == []
    buffer.write(*rows(0, 30), seed())
    twin = pickle.loads(pickle.dumps(buffer))
    assert torch.equal(buffer.sample(9, seed(1))[0], twin.sample(9, seed(1))[0])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("size", [{}, {"mem": 3, "mem_bytes": 9}, {"mem": 0}, {"mem_bytes": -1}])
def test_bad_sizes_are_refused(size):
    with pytest.raises(ValueError, match="mem"):
        FeatureBuffer(**size)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="empty"):
        FeatureBuffer(3).sample(1)
    u, y = (torch.cat(c) for c in zip(rows(0, 4), rows(1, 4), strict=True))
    with pytest.raises(ValueError, match=r"1 samples of 24 bytes cannot .* 2 cla"):
        FeatureBuffer(1).write(u, y)
