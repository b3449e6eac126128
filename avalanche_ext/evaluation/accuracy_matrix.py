"""Numbers that follow from the accuracy matrix, and its picture.

``a[i][j]`` is the test accuracy on experience j after training on experience i, 0 to 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = [
    "average_accuracy",
    "average_incremental_accuracy",
    "draw_accuracy_matrix",
    "forgetting",
]

Matrix = Sequence[Sequence[float]]


def average_accuracy(matrix: Matrix) -> float:
    r"""Mean accuracy over all experiences at the end, :math:`\frac1T \sum_j a_{Tj}`."""
    return float(_square(matrix)[-1].mean())


def average_incremental_accuracy(matrix: Matrix) -> float:
    r"""Mean over training of the accuracy on what was seen, :math:`\frac1T\sum_i\frac1i\sum_{j\le i} a_{ij}`."""  # noqa: E501 - one formula
    a = _square(matrix)
    return float(np.mean([a[i, : i + 1].mean() for i in range(len(a))]))


def forgetting(matrix: Matrix) -> float:
    r"""How far accuracy fell from its best, :math:`\frac{1}{T-1}\sum_{j<T}\max_{j\le i<T} a_{ij} - a_{Tj}`.

    0 for a single experience. Chaudhry et al. (2018), Riemannian Walk, Eq. 3, counted from the
    experience's own training on.
    """  # noqa: E501 - one formula
    a = _square(matrix)
    last = len(a) - 1
    if last == 0:
        return 0.0
    return float(np.mean([a[j:last, j].max() - a[last, j] for j in range(last)]))


def draw_accuracy_matrix(matrix: Matrix, title: str) -> Any:
    """A heat map as a matplotlib figure; what lies ahead of training is greyed out."""
    from matplotlib.figure import Figure

    a = _square(matrix)
    n = len(a)
    figure = Figure(figsize=(1.9 + 0.55 * n, 1.6 + 0.5 * n), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(a, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    if n <= 12:
        for i in range(n):
            for j in range(n):
                seen = j <= i
                axes.text(
                    j, i, f"{100 * a[i, j]:.0f}", ha="center", va="center", fontsize=9,
                    color="black" if a[i, j] > 0.6 else "white", alpha=1.0 if seen else 0.45,
                )  # fmt: skip
        axes.set_xticks(range(n), [str(j + 1) for j in range(n)])
        axes.set_yticks(range(n), [str(i + 1) for i in range(n)])
    axes.set_xlabel("test experience")
    axes.set_ylabel("after training on")
    axes.set_title(title, fontsize=10)
    figure.colorbar(image, ax=axes, label="accuracy")
    return figure


def _square(matrix: Matrix) -> np.ndarray:
    a = np.asarray(matrix, dtype=np.float64)
    if a.ndim != 2 or a.shape[0] != a.shape[1] or not len(a):
        raise ValueError(
            f"an accuracy matrix has one row and one column per experience; got shape {a.shape}."
        )
    return a
