r"""How good generated samples are, by classifiers of real and of generated data; nothing to fetch.

The distance between Gaussians that are fitted to features of real and of generated samples is
called Fréchet classifier distance here, never FID, which is the same with Inception's features. It
compares generators under one and the same classifier only.

``generator_accuracy`` is that of Memory Replay GANs' tables. It rewards a generator that makes one
good sample of each class; ``reverse_accuracy`` does not, so report both.

Reference:
    Heusel et al. (2017), GANs Trained by a Two Time-Scale Update Rule; Kynkäänniemi et al. (2019),
    Improved Precision and Recall Metric for Assessing Generative Models; Wu et al. (2018), Memory
    Replay GANs, for the accuracy.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from avalanche_ext.models.generators.base import Generator
from avalanche_ext.training.checks import check_count

__all__ = [
    "GenerationReport",
    "class_accuracy",
    "evaluate_generator",
    "frechet_distance",
    "gaussian_distance",
    "generator_accuracy",
    "precision_and_recall",
    "reverse_accuracy",
]

_CHUNK = 512  # samples at once, in networks and in distances
Network = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class GenerationReport:
    """What ``evaluate_generator`` found.

    Args:
        distance: Fréchet classifier distance, >= 0; 0 is best.
        precision: Share of generated samples that look like real ones.
        recall: Share of real samples that look like generated ones.
        accuracy: For a conditional generator, the share of samples that the classifier takes for
            the class that was asked for, mean over classes; else ``None``.
        label_kl: How far the classifier's labels of generated samples are from even over the
            generator's classes, in nats; infinite if it finds other classes as well.
    """

    distance: float
    precision: float
    recall: float
    accuracy: float | None
    label_kl: float


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """``gaussian_distance`` of the Gaussians that are fitted to two sets of features.

    Shapes:
        a ``(N, D)``, b ``(M, D)``, at least two rows each.

    Raises:
        ValueError: If the shapes do not fit.
    """
    _check_features("frechet_distance", a, b, 2)
    parts = [(x.double().mean(0), x.double().T.cov().reshape(x.shape[1], -1)) for x in (a, b)]
    return gaussian_distance(*parts[0], *parts[1])


def gaussian_distance(mean: Tensor, cov: Tensor, other_mean: Tensor, other_cov: Tensor) -> float:
    r"""Squared Wasserstein distance of two Gaussians.

    .. math:: \|\mu_1 - \mu_2\|^2 + \mathrm{tr}\left(\Sigma_1 + \Sigma_2
              - 2 (\Sigma_1^{1/2} \Sigma_2 \Sigma_1^{1/2})^{1/2}\right)

    Shapes:
        means ``(D,)``, covariances ``(D, D)``, in float64.
    """
    values, vectors = torch.linalg.eigh(cov)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ other_cov @ root).clamp(min=0).sqrt().sum()
    shift = (mean - other_mean).square().sum()
    return max(0.0, float(shift + cov.trace() + other_cov.trace() - 2 * cross))


def precision_and_recall(real: Tensor, made: Tensor, *, k: int = 3) -> tuple[float, float]:
    """Shares of made samples among the real ones, and of real samples among the made ones.

    A sample is among others if for one of them it is nearer than that one's ``k``-th neighbour of
    its own kind.

    Shapes:
        real ``(N, D)``, made ``(M, D)``, more than ``k`` rows each.

    Raises:
        ValueError: If the shapes do not fit.

    References:
        Kynkäänniemi et al. (2019), Eq. 1 to 3; ``k`` = 3 there.
    """
    check_count("precision_and_recall", k=k)
    _check_features("precision_and_recall", real, made, k + 1)
    return _share_within(made, real, k), _share_within(real, made, k)


@torch.no_grad()
def evaluate_generator(
    generator: Generator,
    real: Tensor,
    classifier: Network,
    features: Network,
    *,
    n: int = 2000,
    seed: int = 0,
) -> GenerationReport:
    """Compare ``n`` samples of a generator with real ones of the classes that it has learnt.

    Args:
        generator: What makes the samples.
        real: Real test samples of its classes, ``(N, ...)``.
        classifier: Logits of a network that was trained on real data, in evaluation mode.
        features: Its features, ``(B, D)``: ``MLP(...).features`` after ``flatten``, for example.
        n: Generated samples.
        seed: Of the samples.

    Raises:
        ValueError: If there are too few samples, or the generator has learnt no class.
    """
    check_count("evaluate_generator", n=n)
    if not generator.seen:
        raise ValueError("evaluate_generator expects a trained generator; this one has learnt no "
                         "class.")  # fmt: skip
    made, wanted = generator.sample(n, generator=torch.Generator().manual_seed(seed))
    labels = _in_chunks(classifier, made).argmax(1)
    accuracy = None
    if wanted is not None:
        accuracy = _mean_over_classes(labels, wanted)
    h_real, h_made = (_in_chunks(features, x) for x in (real, made))
    precision, recall = precision_and_recall(h_real, h_made)
    return GenerationReport(
        distance=frechet_distance(h_real, h_made),
        precision=precision,
        recall=recall,
        accuracy=accuracy,
        label_kl=_label_kl(labels, generator.seen),
    )


@torch.no_grad()
def class_accuracy(classifier: Network, x: Tensor, y: Tensor) -> float:
    """Share of right labels, mean over the classes that occur.

    Args:
        classifier: Logits of a network in evaluation mode.
        x: Samples ``(N, ...)``.
        y: Their labels ``(N,)``.

    Raises:
        ValueError: If there are no samples, or not one label for each.
    """
    if not len(x) or len(x) != len(y):
        raise ValueError(
            f"class_accuracy expects one label for each of one or more samples; got {len(x)} "
            f"samples and {len(y)} labels."
        )
    return _mean_over_classes(_in_chunks(classifier, x).argmax(1), y)


@torch.no_grad()
def generator_accuracy(
    generator: Generator, classifier: Network, *, n: int = 2000, seed: int = 0
) -> float:
    """Share of samples that a classifier of real data takes for the class that was asked for.

    Args:
        generator: A conditional generator.
        classifier: Logits of a network that was trained on real data, in evaluation mode.
        n: Samples, evenly over the classes that it has learnt (paper: 6400 each).
        seed: Of the samples.

    Raises:
        ValueError: If samples have no labels.

    References:
        Wu et al. (2018), Memory Replay GANs: accuracy.
    """
    check_count("generator_accuracy", n=n)
    x, y = generator.sample(n, generator=torch.Generator().manual_seed(seed))
    return class_accuracy(classifier, x, _labels(y))


def reverse_accuracy(
    generator: Generator,
    network: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    steps: int = 1000,
    seed: int = 0,
) -> float:
    """Accuracy on real data of a classifier that has learnt from generated samples alone.

    Args:
        generator: A conditional generator.
        network: The classifier before training; a copy is trained, with Adam (1e-3) on batches of
            64 fresh samples.
        x: Real test samples ``(N, ...)`` of the classes that the generator has learnt.
        y: Their labels ``(N,)``.
        steps: Batches.
        seed: Of the samples.

    Raises:
        ValueError: If samples have no labels.

    References:
        Wu et al. (2018), Memory Replay GANs: reverse accuracy.
    """
    check_count("reverse_accuracy", steps=steps)
    network = copy.deepcopy(network).train()
    optimizer = torch.optim.Adam(network.parameters())
    draws = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        made, wanted = generator.sample(64, generator=draws)
        optimizer.zero_grad()
        F.cross_entropy(network(made), _labels(wanted)).backward()
        optimizer.step()
    return class_accuracy(network.eval(), x, y)


def _labels(y: Tensor | None) -> Tensor:
    if y is None:
        raise ValueError(
            "the accuracy of samples needs the class that each was asked for; this generator has "
            "none. Build it with n_classes."
        )
    return y


def _mean_over_classes(labels: Tensor, wanted: Tensor) -> float:
    hits = (labels == wanted).double()
    return float(torch.stack([hits[wanted == c].mean() for c in wanted.unique()]).mean())


def _label_kl(labels: Tensor, seen: list[int]) -> float:
    p = torch.stack([(labels == c).double().mean() for c in seen])
    if not torch.isin(labels, torch.tensor(seen, device=labels.device)).all():
        return float("inf")
    return float(torch.xlogy(p, p * len(seen)).sum())


def _in_chunks(network: Network, x: Tensor) -> Tensor:
    return torch.cat([network(part) for part in x.split(_CHUNK)])


def _share_within(points: Tensor, others: Tensor, k: int) -> float:
    """Share of ``points`` that lie in the ball of one of ``others``."""
    # The first neighbour is the sample itself.
    reach = torch.cat([
        _distances(part, others).kthvalue(k + 1, dim=1).values for part in others.split(_CHUNK)
    ])  # fmt: skip
    inside = [(_distances(part, others) <= reach).any(1) for part in points.split(_CHUNK)]
    return float(torch.cat(inside).double().mean())


def _distances(a: Tensor, b: Tensor) -> Tensor:
    # Through inner products, in which near neighbours would drown in single precision.
    return torch.cdist(a.double(), b.double())


def _check_features(owner: str, a: Tensor, b: Tensor, least: int) -> None:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < least:
        raise ValueError(
            f"{owner} expects features (N, D) and (M, D) with at least {least} rows each; got "
            f"{tuple(a.shape)} and {tuple(b.shape)}."
        )
