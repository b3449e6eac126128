"""Distances and shares of generated samples against closed forms and a slow count."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from avalanche_ext.evaluation.generation import (
    class_accuracy,
    evaluate_generator,
    frechet_distance,
    gaussian_distance,
    generator_accuracy,
    precision_and_recall,
    reverse_accuracy,
)


def eye(scale, n=4):
    return scale * torch.eye(n).double()


@pytest.mark.parametrize(
    ("shift", "first", "second", "want"),
    [(2.0, 1.0, 1.0, 16.0), (0.0, 4.0, 9.0, 4.0), (1.0, 4.0, 4.0, 4.0), (0.0, 0.0, 9.0, 36.0)],
)
def test_gaussians_in_four_dimensions(shift, first, second, want):
    zero, mean = torch.zeros(4).double(), torch.full((4,), shift).double()
    parts = (zero, eye(first)), (mean, eye(second))
    assert gaussian_distance(*parts[0], *parts[1]) == pytest.approx(want)
    assert gaussian_distance(*parts[1], *parts[0]) == pytest.approx(want)


def test_covariances_that_do_not_commute():
    torch.manual_seed(0)
    a, b = torch.randn(5, 5).double(), torch.randn(5, 5).double()
    a, b = a @ a.T, b @ b.T
    # (a b)^(1/2) has the trace of the roots of the eigenvalues of a b, which is not symmetric.
    roots = torch.linalg.eigvals(a @ b).real.clamp(min=0).sqrt().sum()
    want = a.trace() + b.trace() - 2 * roots
    zero = torch.zeros(5).double()
    assert gaussian_distance(zero, a, zero, b) == pytest.approx(want.item())


def test_features_are_fitted_by_mean_and_covariance():
    torch.manual_seed(0)
    x, y = torch.randn(50, 3), 2 * torch.randn(70, 3) + 1
    want = gaussian_distance(
        x.mean(0).double(), torch.cov(x.T.double()), y.mean(0).double(), torch.cov(y.T.double())
    )
    assert frechet_distance(x, y) == pytest.approx(want, rel=1e-5)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x, x + 2) == pytest.approx(12.0, rel=1e-5)
    assert frechet_distance(x[:, :1], x[:, :1] + 3) == pytest.approx(9.0, rel=1e-5)


def counted(points, others, k):
    hits = 0
    for p in points:
        for i, o in enumerate(others):
            own = sorted((o - q).norm().item() for j, q in enumerate(others) if j != i)
            if (p - o).norm().item() <= own[k - 1]:
                hits += 1
                break
    return hits / len(points)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("offset", [0, 10_000], ids=["near", "far"])  # far in single precision
def test_precision_and_recall_are_counted(k, offset):
    torch.manual_seed(0)
    real, made = torch.randn(40, 2) + offset, 0.5 * torch.randn(30, 2) + 1 + offset
    found = precision_and_recall(real, made, k=k)
    assert found == pytest.approx((counted(made, real, k), counted(real, made, k)))


def test_a_generator_of_one_good_mode_is_precise_and_recalls_half():
    torch.manual_seed(0)
    left, right = torch.randn(300, 2), torch.randn(300, 2) + 50
    precision, recall = precision_and_recall(torch.cat([left, right]), torch.randn(300, 2))
    assert precision > 0.95
    assert 0.45 < recall <= 0.5
    assert precision_and_recall(left, right) == (0.0, 0.0)


def test_features_that_do_not_fit_are_refused():
    for a, b in ((torch.zeros(3), torch.zeros(3)), (torch.zeros(9, 2), torch.zeros(9, 3)),
                 (torch.zeros(1, 2), torch.zeros(9, 2))):  # fmt: skip
        with pytest.raises(ValueError, match="at least 2 rows"):
            frechet_distance(a, b)
    with pytest.raises(ValueError, match="at least 4 rows"):
        precision_and_recall(torch.zeros(3, 2), torch.zeros(9, 2))


class Known:
    """A conditional generator that makes its classes as one-hot rows, but ``wrong`` as class 0."""

    in_shape = (3,)
    conditional = True

    def __init__(self, seen, wrong=None, labels=True):
        self.seen, self.wrong, self.labels = seen, wrong, labels

    def sample(self, n, classes=None, generator=None):
        y = torch.tensor(self.seen)[torch.arange(n) % len(self.seen)]
        shown = torch.where(y == self.wrong, 0, y) if self.wrong is not None else y
        x = F.one_hot(shown, 3).float() + 0.01 * torch.randn(n, 3, generator=generator)
        return x, y if self.labels else None


def report(generator):
    torch.manual_seed(0)
    real = F.one_hot(torch.arange(300) % 3, 3).float() + 0.01 * torch.randn(300, 3)
    return evaluate_generator(generator, real, lambda x: x, lambda x: x, n=300)


def test_a_perfect_generator():
    found = report(Known([0, 1, 2]))
    assert found.accuracy == 1.0
    assert found.label_kl == pytest.approx(0)
    assert found.distance < 0.01
    assert found.precision > 0.9
    assert found.recall > 0.9


def test_a_class_that_is_made_as_another_shows_in_every_number():
    found = report(Known([0, 1, 2], wrong=2))
    assert found.accuracy == pytest.approx(2 / 3)
    # Labels 0, 1, 2 with shares 2/3, 1/3, 0.
    want = 2 / 3 * math.log(2) + 0
    assert found.label_kl == pytest.approx(want)
    assert found.recall < 0.7
    assert found.precision > 0.9
    # Means (1/3, 1/3, 1/3) and (2/3, 1/3, 0) are 2/9 apart in square; covariances differ as well.
    assert found.distance > 2 / 9


def test_without_labels_there_is_no_accuracy_and_a_foreign_class_is_infinitely_far():
    assert report(Known([0, 1, 2], labels=False)).accuracy is None
    assert report(Known([1, 2], wrong=2)).label_kl == math.inf
    with pytest.raises(ValueError, match="learnt no class"):
        report(Known([]))


def test_accuracy_is_a_mean_over_classes():
    x, y = F.one_hot(torch.tensor([0, 0, 0, 1, 1, 2]), 3).float(), torch.tensor([0, 0, 1, 1, 0, 2])
    # Right: 2 of 3 zeros, 1 of 2 ones, the two.
    assert class_accuracy(lambda u: u, x, y) == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)
    many = x.repeat(200, 1), y.repeat(200)  # more than go through at once
    assert class_accuracy(lambda u: u, *many) == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)
    for bad in (x[:0], y[:0]), (x, y[:2]):
        with pytest.raises(ValueError, match="one label for each"):
            class_accuracy(lambda u: u, *bad)


@pytest.mark.parametrize(("wrong", "want"), [(None, 1.0), (2, 2 / 3)])
def test_generated_samples_are_classified(wrong, want):
    assert generator_accuracy(Known([0, 1, 2], wrong), lambda x: x, n=300) == pytest.approx(want)
    assert report(Known([0, 1, 2], wrong)).accuracy == pytest.approx(want)
    with pytest.raises(ValueError, match="n_classes"):
        generator_accuracy(Known([0, 1], labels=False), lambda x: x)
    with pytest.raises(ValueError, match="n >= 1"):
        generator_accuracy(Known([0, 1]), lambda x: x, n=0)


@pytest.mark.parametrize(("wrong", "want"), [(None, 1.0), (2, 2 / 3)])
def test_what_learns_from_generated_samples_classifies_real_ones(wrong, want):
    torch.manual_seed(0)
    network = torch.nn.Linear(3, 3)
    before = [p.clone() for p in network.parameters()]
    y = torch.arange(60) % 3
    x = F.one_hot(y, 3).float()
    found = [reverse_accuracy(Known([0, 1, 2], wrong), network, x, y, steps=1500, seed=s)
             for s in (0, 0)]  # fmt: skip
    # Class 2 is never seen as it is: taken for class 0 or 1, wherever it lies.
    assert found == pytest.approx([want, want])
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))
    with pytest.raises(ValueError, match="n_classes"):
        reverse_accuracy(Known([0, 1], labels=False), network, x, y)
    with pytest.raises(ValueError, match="steps"):
        reverse_accuracy(Known([0, 1]), network, x, y, steps=0)


def test_one_good_sample_per_class_is_accurate_but_teaches_little():
    class Collapsed(Known):
        """Makes one corner of each class; real classes are told apart by another number."""

        def sample(self, n, classes=None, generator=None):
            y = torch.arange(n) % 2
            return torch.stack([torch.ones(n), 2.0 * y - 1, torch.zeros(n)], 1), y

    y = torch.arange(40) % 2
    real = torch.stack([2.0 * (torch.arange(40) % 4 // 2) - 1, (2.0 * y - 1), torch.zeros(40)], 1)
    real[:, 1] *= real[:, 0]  # exclusive or

    def judge(x):
        return torch.stack([-x[:, 0] * x[:, 1], x[:, 0] * x[:, 1]], 1)

    assert class_accuracy(judge, real, y) == 1.0
    assert generator_accuracy(Collapsed([0, 1]), judge, n=50) == 1.0
    network = torch.nn.Linear(3, 2)
    for p in network.parameters():
        torch.nn.init.zeros_(p)
    assert reverse_accuracy(Collapsed([0, 1]), network, real, y, steps=200) == 0.5
