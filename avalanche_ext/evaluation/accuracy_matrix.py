"""Numbers that follow from the accuracy matrix, and its picture.

``a[i][j]`` is the test accuracy on experience j after training on experience i, 0 to 1. The matrix
is square; lower triangular, with i + 1 numbers in row i, where nothing ahead of training was
tested; or one column, where the stream has one test experience for all of training. What such a
matrix does not define (transfer between experiences that have no test of their own, a mean over
no experience) is ``nan``; ``matrix_metrics`` leaves it out.

Two papers say backward and forward transfer and mean different numbers. They keep the paper's
name here.

References:
    Lopez-Paz and Ranzato (2017), Gradient Episodic Memory, Eqs. 2-4.
    Chaudhry et al. (2018), Riemannian Walk, Sec. 3.
    Yan et al. (2021), DER: Dynamically Expandable Representation, Sec. 4 (ExpandableDER here).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = [
    "average_accuracy",
    "average_incremental_accuracy",
    "backward_transfer_expandable_der",
    "backward_transfer_gem",
    "draw_accuracy_matrix",
    "filled",
    "forgetting",
    "forward_transfer_expandable_der",
    "forward_transfer_gem",
    "intransigence",
    "matrix_metrics",
    "seen_accuracies",
]

Matrix = Sequence[Sequence[float]]


def average_accuracy(matrix: Matrix) -> float:
    r"""Mean accuracy over all experiences at the end, :math:`\frac1T \sum_j a_{Tj}`."""
    return float(filled(matrix)[-1].mean())


def seen_accuracies(matrix: Matrix, samples: Sequence[int] | None = None) -> list[float]:
    r"""Accuracy on what was seen after each experience, :math:`A_i = \frac1i\sum_{j\le i} a_{ij}`.

    Args:
        matrix: The accuracy matrix.
        samples: Test samples per experience. With them A is the accuracy over samples, as
            class-incremental papers print it, not over experiences; the two differ where the
            experiences differ in size.

    Raises:
        ValueError: If there is not one count per test experience.
    """
    a = filled(matrix)
    if samples is not None and len(samples) != a.shape[1]:
        raise ValueError(
            f"samples expects one count per test experience, {a.shape[1]}; got {len(samples)}."
        )
    if a.shape[1] == 1:
        return [float(x) for x in a[:, 0]]
    if samples is None:
        return [float(a[i, : i + 1].mean()) for i in range(len(a))]
    return [float(np.average(a[i, : i + 1], weights=samples[: i + 1])) for i in range(len(a))]


def average_incremental_accuracy(
    matrix: Matrix, samples: Sequence[int] | None = None, *, skip_first: bool = False
) -> float:
    r"""Mean over training of the accuracy on what was seen, :math:`\frac1T\sum_i A_i`.

    Args:
        matrix: The accuracy matrix.
        samples: See ``seen_accuracies``.
        skip_first: Leave out the first experience, as the tables of EEIL, IL2M and ScaIL do;
            ``nan`` if it is the only one.
    """
    values = seen_accuracies(matrix, samples)[int(skip_first) :]
    return float(np.mean(values)) if values else math.nan


def forgetting(matrix: Matrix) -> float:
    r"""How far accuracy fell from its best, :math:`\frac{1}{T-1}\sum_{j<T}\max_{j\le i<T} a_{ij} - a_{Tj}`.

    0 for a single experience, ``nan`` for one test experience. Chaudhry et al. (2018), Riemannian
    Walk, Eq. 3, counted from the experience's own training on.
    """  # noqa: E501 - one formula
    a = filled(matrix)
    last = len(a) - 1
    if last == 0:
        return 0.0
    if a.shape[1] == 1:
        return math.nan
    return float(np.mean([a[j:last, j].max() - a[last, j] for j in range(last)]))


def backward_transfer_gem(matrix: Matrix) -> float:
    r"""What later training did to earlier experiences, :math:`\frac{1}{T-1}\sum_{j<T} a_{Tj} - a_{jj}`.

    ``nan`` for a single experience, and for one test experience. Lopez-Paz and Ranzato (2017),
    Eq. 3.
    """  # noqa: E501 - one formula
    a = filled(matrix)
    last = len(a) - 1
    if not _has_transfer(a):
        return math.nan
    return float(np.mean([a[last, j] - a[j, j] for j in range(last)]))


def backward_transfer_expandable_der(matrix: Matrix) -> float:
    r"""The same along training, :math:`\frac{1}{T-1}\sum_{i=2}^{T}\frac1i\sum_{j\le i} a_{ij} - a_{jj}`.

    Unlike GEM's it averages over every step, and its inner mean counts the experience just
    trained, whose difference is 0. Undefined where GEM's is. Yan et al. (2021), who refit the
    classifier on all data before each test; here the accuracies are taken as given.
    """  # noqa: E501 - one formula
    a = filled(matrix)
    if not _has_transfer(a):
        return math.nan
    own = np.diag(a)
    return float(np.mean([(a[i, : i + 1] - own[: i + 1]).mean() for i in range(1, len(a))]))


def forward_transfer_gem(matrix: Matrix, initial: Sequence[float]) -> float:
    r"""What earlier training did for an experience ahead, :math:`\frac{1}{T-1}\sum_{i\ge2} a_{i-1,i} - b_i`.

    ``nan`` where GEM's backward transfer is, and where nothing ahead of training was tested. With
    a head that cannot name classes before it saw them, it is near 0 by construction.

    Args:
        matrix: The accuracy matrix.
        initial: b, the accuracies before any training.

    Lopez-Paz and Ranzato (2017), Eq. 4.
    """  # noqa: E501 - one formula
    a = filled(matrix)
    if not _has_transfer(a):
        return math.nan
    b = _one_each("initial", initial, len(a))
    return float(np.mean([a[i - 1, i] - b[i] for i in range(1, len(a))]))


def forward_transfer_expandable_der(matrix: Matrix, alone: Sequence[float]) -> float:
    r"""What earlier training did for learning, :math:`\frac{1}{T-1}\sum_{i\ge2} a_{ii} - \bar a_{ii}`.

    Args:
        matrix: The accuracy matrix.
        alone: The accuracy on each experience of a network that began from random weights, trained
            on that experience and its memory with cross-entropy alone.

    Undefined where GEM's backward transfer is. Yan et al. (2021).
    """  # noqa: E501 - one formula
    a = filled(matrix)
    if not _has_transfer(a):
        return math.nan
    return float(np.mean((np.diag(a) - _one_each("alone", alone, len(a)))[1:]))


def intransigence(matrix: Matrix, joint: Sequence[float]) -> float:
    r"""What could not be learnt, :math:`\frac1T\sum_t a^*_{tt} - a_{tt}`; below 0 it was learnt better.

    Args:
        matrix: The accuracy matrix.
        joint: a*, the accuracy on each experience of a network trained on all data so far.

    ``nan`` for one test experience. Chaudhry et al. (2018), Sec. 3.2.
    """  # noqa: E501 - one formula
    a = filled(matrix)
    if a.shape[1] == 1 and len(a) > 1:
        return math.nan
    return float(np.mean(_one_each("joint", joint, len(a)) - np.diag(a)))


def matrix_metrics(
    matrix: Matrix,
    *,
    samples: Sequence[int] | None = None,
    initial: Sequence[float] | None = None,
    alone: Sequence[float] | None = None,
    joint: Sequence[float] | None = None,
) -> dict[str, float]:
    """Every metric that the matrix and the references define, under its function's name.

    Args:
        matrix: The accuracy matrix.
        samples: Test samples per experience; adds ``average_incremental_accuracy_samples``.
        initial: For ``forward_transfer_gem``.
        alone: For ``forward_transfer_expandable_der``.
        joint: For ``intransigence``.
    """
    values = {
        "average_accuracy": average_accuracy(matrix),
        "average_incremental_accuracy": average_incremental_accuracy(matrix),
        "forgetting": forgetting(matrix),
        "backward_transfer_gem": backward_transfer_gem(matrix),
        "backward_transfer_expandable_der": backward_transfer_expandable_der(matrix),
    }
    if samples is not None:
        values["average_incremental_accuracy_samples"] = average_incremental_accuracy(
            matrix, samples
        )
    if initial is not None:
        values["forward_transfer_gem"] = forward_transfer_gem(matrix, initial)
    if alone is not None:
        values["forward_transfer_expandable_der"] = forward_transfer_expandable_der(matrix, alone)
    if joint is not None:
        values["intransigence"] = intransigence(matrix, joint)
    return {name: value for name, value in values.items() if math.isfinite(value)}


def draw_accuracy_matrix(matrix: Matrix, title: str) -> Any:
    """A heat map as a matplotlib figure; what lies ahead of training is greyed out."""
    from matplotlib.figure import Figure

    a = filled(matrix)
    n, columns = a.shape
    figure = Figure(figsize=(1.9 + 0.55 * columns, 1.6 + 0.5 * n), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(a, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    if n <= 12:
        for i in range(n):
            for j in range(columns):
                if math.isnan(a[i, j]):
                    continue
                seen = j <= i or columns == 1
                axes.text(
                    j, i, f"{100 * a[i, j]:.0f}", ha="center", va="center", fontsize=9,
                    color="black" if a[i, j] > 0.6 else "white", alpha=1.0 if seen else 0.45,
                )  # fmt: skip
        axes.set_xticks(range(columns), [str(j + 1) for j in range(columns)])
        axes.set_yticks(range(n), [str(i + 1) for i in range(n)])
    axes.set_xlabel("test experience")
    axes.set_ylabel("after training on")
    axes.set_title(title, fontsize=10)
    figure.colorbar(image, ax=axes, label="accuracy")
    return figure


def filled(matrix: Matrix) -> np.ndarray:
    """The matrix as an array, what is ahead of a triangular one as ``nan``.

    Raises:
        ValueError: If it is no accuracy matrix.
    """
    widths = [len(row) for row in matrix]
    n = len(widths)
    if n and widths in ([n] * n, [1] * n):
        return np.asarray(matrix, dtype=np.float64)
    if n and widths == list(range(1, n + 1)):
        return np.array([[*row, *[math.nan] * (n - len(row))] for row in matrix])
    shape = f"({n}, {widths[0]})" if len(set(widths)) == 1 else f"{n} rows of {widths} numbers"
    raise ValueError(
        f"an accuracy matrix has one row and one column per experience (or the part up to the "
        f"diagonal, or one column for one test experience); got {shape}."
    )


def _has_transfer(a: np.ndarray) -> bool:
    return len(a) > 1 and a.shape[1] > 1


def _one_each(name: str, values: Sequence[float], n: int) -> np.ndarray:
    if len(values) != n:
        raise ValueError(f"{name} expects one accuracy per experience, {n}; got {len(values)}.")
    return np.asarray(values, dtype=np.float64)
