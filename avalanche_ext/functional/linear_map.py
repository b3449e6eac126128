r"""The affine map between two spaces that paired samples tell, and how well it fits.

Notation: ``N`` pairs, ``D`` numbers on the side that is mapped, ``E`` on the other.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["r_squared", "ridge"]


def ridge(
    x: Tensor, y: Tensor, lam: float = 1e-2, *, towards_identity: bool = False
) -> tuple[Tensor, Tensor]:
    r"""Ridge regression with an intercept that is not penalised, in closed form.

    .. math:: \min_{W, b} \sum_i \| W x_i + b - y_i \|_2^2 + \lambda \| W - W_0 \|_F^2

    In directions in which ``x`` does not vary, ``W`` is :math:`W_0`. Solved in float64.

    Args:
        x: What is mapped.
        y: Where to.
        lam: :math:`\lambda \ge 0`; with 0 the shortest solution is taken.
        towards_identity: :math:`W_0` is the identity, else 0: for two states of one space.

    Shapes:
        x ``(N, D)``, y ``(N, E)``, results ``(E, D)`` and ``(E,)`` of ``y``'s type.

    Raises:
        ValueError: If there are no pairs, or the identity does not fit the shapes.
    """
    if len(x) != len(y) or not len(x):
        raise ValueError(f"ridge expects pairs of samples; got {len(x)} and {len(y)}.")
    if towards_identity and x.shape[1] != y.shape[1]:
        raise ValueError(
            f"ridge with towards_identity=True expects spaces of one size; got {x.shape[1]} and "
            f"{y.shape[1]} numbers per sample."
        )
    a, target = x.double(), y.double()
    start = torch.eye(a.shape[1], dtype=a.dtype, device=a.device) if towards_identity else None
    middle, aim = a.mean(0), target.mean(0)
    centred, rest = a - middle, target - aim
    if start is not None:
        rest = rest - centred
    gram = centred.T @ centred
    if lam > 0:
        gram.diagonal().add_(lam)
        weight = torch.linalg.solve(gram, centred.T @ rest, left=True).T
    else:
        weight = (torch.linalg.pinv(gram, hermitian=True) @ (centred.T @ rest)).T
    if start is not None:
        weight = weight + start
    return weight.to(y.dtype), (aim - weight @ middle).to(y.dtype)


def r_squared(prediction: Tensor, y: Tensor) -> Tensor:
    r"""Share of the total variance of ``y`` that a prediction explains.

    .. math:: 1 - \frac{\sum_i \|\hat y_i - y_i\|^2}{\sum_i \|y_i - \bar y\|^2}

    1 is perfect, 0 is no better than the mean; it may be negative. Where ``y`` does not vary it is
    1 for a perfect prediction, else minus infinity.

    Shapes:
        both ``(N, E)``, result a number.
    """
    y = y.double()
    missed, total = (prediction.double() - y).square().sum(), (y - y.mean(0)).square().sum()
    return 1 - torch.where(missed == 0, torch.zeros_like(missed), missed / total)
