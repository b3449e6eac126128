r"""Densities of features, one class at a time: fit, draw, and move them with their space.

A Gaussian is its mean and a factor of its covariance: rows :math:`u_j` of
:math:`\Sigma = \sum_j u_j u_j^\top`, or, where it is diagonal, the standard deviations.

Notation: ``N`` samples, ``D`` features, ``K`` rows.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

__all__ = [
    "diagonal_gaussian",
    "draw_gaussian",
    "drift_of",
    "k_means",
    "low_rank_gaussian",
    "map_gaussian",
    "pooled_gaussian",
]


def low_rank_gaussian(u: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor]:
    r"""Mean, and the ``rank`` strongest directions of the covariance.

    With ``rank=None`` the covariance is that of the samples (divided by ``N - 1``), exactly; no
    covariance of ``N`` samples needs more than ``N - 1`` rows, and there are no more.

    Args:
        u: Samples of one class.
        rank: Most rows.

    Shapes:
        u ``(N, D)``, results ``(D,)`` and ``(K, D)``.
    """
    mean, centred = _centred(u)
    n, width = centred.shape
    kept = min(n - 1, width, width if rank is None else rank)
    # Products in the samples' own precision: centred, they need no more, and cost half as much.
    factor = _strongest(centred, max(n - 1, 1), u.dtype)[:kept]
    return mean.to(u.dtype), factor.to(u.dtype)


def pooled_gaussian(
    one: tuple[Tensor, Tensor, int], other: tuple[Tensor, Tensor, int], rank: int | None = None
) -> tuple[Tensor, Tensor]:
    r"""The Gaussian of all the samples that two were fitted to.

    .. math:: \mu = \frac{n_1 \mu_1 + n_2 \mu_2}{n}, \qquad (n - 1) \Sigma
              = (n_1 - 1) \Sigma_1 + (n_2 - 1) \Sigma_2
              + \frac{n_1 n_2}{n} (\mu_1 - \mu_2)(\mu_1 - \mu_2)^\top

    Exact, but for what lies outside the ``rank`` strongest directions. Of diagonal ones the
    diagonal.

    Args:
        one: Mean, factor and number of samples.
        other: The same of the other.
        rank: Most rows.

    Shapes:
        means ``(D,)``, factors ``(K, D)`` or ``(D,)``; so are the results.
    """
    (mean, factor, n), (other_mean, other_factor, m) = one, other
    total = n + m
    apart = (other_mean - mean).double()
    middle = mean.double() + m / total * apart
    rest = max(total - 1, 1)
    own = ((n - 1) / rest) ** 0.5 * factor.double()
    others = ((m - 1) / rest) ** 0.5 * other_factor.double()
    between = (n * m / total / rest) ** 0.5 * apart
    if factor.ndim == 1:
        spread = (own.square() + others.square() + between.square()).sqrt()
        return middle.to(mean.dtype), spread.to(factor.dtype)
    rows = torch.cat([own, others, between[None]])
    kept = min(total - 1, len(mean), len(mean) if rank is None else rank)
    return middle.to(mean.dtype), _strongest(rows, 1, rows.dtype)[:kept].to(factor.dtype)


def diagonal_gaussian(u: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviations (with ``N - 1``); those of a single sample are 0.

    Shapes:
        u ``(N, D)``, results ``(D,)``.
    """
    mean, centred = _centred(u)
    variance = centred.square().sum(0) / max(len(u) - 1, 1)
    return mean.to(u.dtype), variance.sqrt().to(u.dtype)


def draw_gaussian(mean: Tensor, factor: Tensor, noise: Tensor) -> Tensor:
    r"""Draws from standard noise: :math:`\mu + \sum_j z_j u_j`.

    Shapes:
        mean ``(D,)``, factor ``(K, D)`` or ``(D,)``, noise ``(B, K)`` or ``(B, D)``, result
        ``(B, D)``.
    """
    if factor.ndim == 1:
        return torch.addcmul(mean, noise, factor)
    return torch.addmm(mean, noise, factor)


def map_gaussian(
    mean: Tensor, factor: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    r"""The Gaussian of :math:`W u + b`: mean :math:`W \mu + b`, covariance :math:`W\Sigma W^\top`.

    Of a diagonal one the diagonal of its covariance.

    Shapes:
        mean ``(D,)``, factor ``(K, D)`` or ``(D,)``, weight ``(D, D)``, bias ``(D,)``.
    """
    diagonal = factor.ndim == 1
    moved = (weight.square() @ factor.square()).sqrt() if diagonal else factor @ weight.T
    return weight @ mean + bias, moved


def drift_of(mean: Tensor, before: Tensor, after: Tensor) -> Tensor:
    r"""How far a mean has moved, from samples that were close to it.

    .. math:: \frac{\sum_i w_i (v_i - u_i)}{\sum_i w_i}, \qquad
              w_i = e^{-\| u_i - \mu \|^2 / 2 \sigma^2}

    The width :math:`\sigma^2` is the mean squared distance of the samples.

    Args:
        mean: Of an old class, in the space before.
        before: Samples in the space before.
        after: The same samples after it.

    Shapes:
        mean ``(D,)``, before and after ``(N, D)``, result ``(D,)``.

    References:
        L. Yu et al. (2020), Semantic Drift Compensation for Class-Incremental Learning, CVPR. There
        the width is a constant to choose.
    """
    distance = (before - mean).square().sum(1)
    width = distance.mean().clamp_min(torch.finfo(distance.dtype).tiny)
    return torch.softmax(-distance / (2 * width), 0) @ (after - before)


def k_means(u: Tensor, k: int, generator: Generator | None = None, steps: int = 50) -> Tensor:
    """Which of at most ``k`` clusters each sample is in: Lloyd's steps from k-means++'s start.

    Clusters that have lost their samples are left out.

    Args:
        u: Samples.
        k: Clusters.
        generator: Random numbers, on the CPU.
        steps: Most steps.

    Shapes:
        u ``(N, D)``, result ``(N,)``.
    """
    nearest = torch.full((len(u),), torch.inf, dtype=torch.float64)
    weights = torch.ones(len(u), dtype=torch.float64)
    centres: list[Tensor] = []
    while len(centres) < k and bool(weights.sum() > 0):
        chosen = u[int(torch.multinomial(weights, 1, generator=generator))]
        centres.append(chosen)
        distance = (u - chosen).square().sum(1).double().cpu()
        nearest = weights = torch.minimum(nearest, distance)
    table = torch.stack(centres)
    cluster = torch.cdist(u, table).argmin(1)
    for _ in range(steps):
        for c in cluster.unique():
            table[c] = u[cluster == c].mean(0)
        moved = torch.cdist(u, table).argmin(1)
        if torch.equal(moved, cluster):
            break
        cluster = moved
    return cluster.unique(return_inverse=True)[1]


def _strongest(rows: Tensor, divisor: int, dtype: torch.dtype) -> Tensor:
    """A factor of ``rows.T @ rows / divisor`` ``(min(N, D), D)``, orthogonal, longest row first.

    Its products are made in ``dtype``.
    """
    narrow = rows.to(dtype)
    if rows.shape[1] <= len(rows):
        values, vectors = torch.linalg.eigh((narrow.T @ narrow).double() / divisor)
        directions = vectors.T
    else:  # the rows' products are the smaller matrix
        values, vectors = torch.linalg.eigh((narrow @ narrow.T).double() / divisor)
        lengths = (values.clamp_min(0) * divisor).sqrt()[:, None]
        directions = (vectors.T @ rows) / torch.where(lengths > 0, lengths, 1.0)
    return (values.clamp_min(0).sqrt()[:, None] * directions).flip(0)  # eigh's values ascend


def _centred(u: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviations in float64."""
    if u.ndim != 2 or not len(u):
        raise ValueError(f"a density needs samples (N, D); got shape {tuple(u.shape)}.")
    wide = u.double()
    mean = wide.mean(0)
    return mean, wide - mean
