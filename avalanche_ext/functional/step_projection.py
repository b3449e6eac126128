r"""The nearest step of a layer's weights that keeps its outputs for given inputs.

Reference:
    Skorokhodov (2019), Generative Memory for Continual Learning, "Online Generative Memory", third
    idea; the ridge form is that of Zeng et al. (2019), Continual Learning of Context-Dependent
    Processing in Neural Networks.

Notation: ``A`` holds a layer's ``N`` inputs of ``D`` numbers as rows, with a constant 1 at the end
where the layer has a bias; ``G`` ``(D, O)`` is the step that was planned for its weights, ``A G``
what that step does to its outputs. Leading axes are independent blocks (a convolution's groups).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["RowSpace", "conv_rows", "damped_step", "linear_rows", "project_step", "row_space"]

_ROWS_AT_ONCE = 8192
_NEWTON_STEPS = 200  # it takes about 10, and some 60 where sizes differ by 1e5


class RowSpace(NamedTuple):
    """The directions of the rows of ``A``: its singular values and right singular vectors.

    Shapes:
        directions ``(..., D, R)``, sizes ``(..., R)``, in float64. Where a block has a lower rank
        than ``R``, the rest is 0.
    """

    directions: Tensor
    sizes: Tensor


def linear_rows(x: Tensor, *, weight: bool = True, bias: bool = True) -> Tensor:
    """The inputs of a linear layer as ``A``.

    Args:
        x: Inputs; everything before the last axis counts as samples.
        weight: Whether the step has rows of the weight.
        bias: Whether it has one of the bias, the last.

    Shapes:
        x ``(..., D)``, result ``(1, N, D + 1)``.
    """
    return _with_ones(x.flatten(0, -2)[None], weight, bias)


def conv_rows(
    x: Tensor,
    kernel: Sequence[int],
    *,
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    weight: bool = True,
    bias: bool = True,
) -> Tensor:
    """The patches that a convolution multiplies with its filters as ``A``, one block per group.

    Args:
        x: Its input, padded as the layer pads it.
        kernel: Height and width of the filters; their ``stride`` and ``dilation`` likewise.
        stride: See ``kernel``.
        dilation: See ``kernel``.
        groups: Groups of channels.
        weight: Whether the step has rows of the weight.
        bias: Whether it has one of the bias, the last.

    Shapes:
        x ``(B, C, H, W)``, result ``(groups, B H' W', C / groups * kernel area + 1)``.
    """
    patches = F.unfold(x, tuple(kernel), tuple(dilation), 0, tuple(stride))  # (B, C area, H' W')
    blocks = patches.unflatten(1, (groups, -1)).permute(1, 0, 3, 2)
    return _with_ones(blocks.flatten(1, 2), weight, bias)


def row_space(rows: Tensor, cutoff: float = 1e-6) -> RowSpace:
    """The directions that the rows span.

    Args:
        rows: ``A``.
        cutoff: Directions whose singular value is below this part of the largest count as absent.

    Shapes:
        rows ``(..., N, D)``.

    Raises:
        ValueError: If there is no row, or a value is not finite.
    """
    if rows.ndim < 2 or 0 in rows.shape:
        raise ValueError(f"row_space expects rows (..., N, D); got {tuple(rows.shape)}.")
    n, d = rows.shape[-2:]
    with torch.autocast(rows.device.type, enabled=False):
        if n <= d:
            wide = rows.double()
            squares, left = _eigen(wide @ wide.mT)
            vectors = wide.mT @ left
        else:
            parts = (part.double() for part in rows.split(_ROWS_AT_ONCE, dim=-2))
            squares, vectors = _eigen(torch.stack([part.mT @ part for part in parts]).sum(0))
        sizes = squares.clamp(min=0).sqrt()
        present = sizes > cutoff * sizes.amax(-1, keepdim=True)
        # Of length 1 again: the product above has lengths of ``sizes`` up to rounding.
        vectors = F.normalize(vectors, dim=-2) * present[..., None, :]
    return RowSpace(vectors, sizes * present)


def damped_step(step: Tensor, space: RowSpace, mu: float) -> Tensor:
    r"""The ridge form: a step that pays for what it changes.

    .. math:: \Delta = (I + \mu A^\top A)^{-1} G

    Args:
        step: ``G``.
        space: ``row_space(A)``.
        mu: Price :math:`\mu \ge 0`; infinite for no change at all, :math:`(I - V V^\top) G`.

    Shapes:
        step ``(..., D, O)``, as the result.
    """
    return _without(step, space, _removed(space, mu), _coefficients(step, space))


def project_step(
    step: Tensor,
    space: RowSpace,
    eps: float,
    *,
    norm: Literal["frobenius", "spectral"] = "frobenius",
) -> Tensor:
    r"""The nearest step that changes the outputs by no more than ``eps``.

    .. math:: \arg\min_\Delta \|\Delta - G\|_F \quad \text{s.t.} \quad \|A \Delta\| \le \varepsilon

    Frobenius: ``damped_step`` with the price at which the bound is met. Spectral: the singular
    values of :math:`V^\top G` are cut at :math:`\varepsilon / \sigma_1(A)`, which keeps the bound
    but is not the nearest step. A step within the bound is returned as it is.

    Args:
        step: ``G``.
        space: ``row_space(A)``.
        eps: Bound >= 0; with 0 the outputs stay as they are, with infinity the step does.
        norm: ``"frobenius"``, over all blocks together, or ``"spectral"``.

    Shapes:
        step ``(..., D, O)``, as the result.

    Raises:
        ValueError: For a bad argument.
    """
    if not eps >= 0 or norm not in ("frobenius", "spectral"):
        raise ValueError(
            f"project_step expects eps >= 0 and norm 'frobenius' or 'spectral'; got {eps} and "
            f"{norm!r}."
        )
    if eps == math.inf:
        return step
    if eps == 0:
        return damped_step(step, space, math.inf)
    coefficients = _coefficients(step, space)
    change = space.sizes[..., None] * coefficients  # A G, turned
    if norm == "frobenius":
        lengths = torch.linalg.vector_norm(change, dim=-1).flatten()
        mu = _price(lengths.cpu(), space.sizes.flatten().square().cpu(), eps)
        return step if mu == 0 else _without(step, space, _removed(space, mu), coefficients)
    if float(torch.linalg.matrix_norm(change, 2).amax()) <= eps:
        return step
    left, values, right = torch.linalg.svd(coefficients, full_matrices=False)
    excess = (values - eps / space.sizes.amax(-1, keepdim=True)).clamp(min=0)
    cut = (left * excess[..., None, :]) @ right
    return step - (space.directions @ cut).to(step.dtype)


def _with_ones(rows: Tensor, weight: bool, bias: bool) -> Tensor:
    ones = [rows.new_ones((*rows.shape[:-1], 1))] if bias else []
    return torch.cat([*([rows] if weight else []), *ones], dim=-1)


def _eigen(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    if not bool(symmetric.isfinite().all()):
        raise ValueError("row_space expects finite inputs; some are infinite or not a number.")
    return torch.linalg.eigh(symmetric)


def _coefficients(step: Tensor, space: RowSpace) -> Tensor:
    with torch.autocast(step.device.type, enabled=False):
        return space.directions.mT @ step.double()


def _removed(space: RowSpace, mu: float) -> Tensor:
    """The part of each direction that is taken out of a step."""
    return torch.where(space.sizes > 0, 1 - 1 / (1 + mu * space.sizes.square()), 0.0)


def _without(step: Tensor, space: RowSpace, removed: Tensor, coefficients: Tensor) -> Tensor:
    with torch.autocast(step.device.type, enabled=False):
        taken = space.directions @ (removed[..., None] * coefficients)
        return step - taken.to(step.dtype)


def _price(lengths: Tensor, squares: Tensor, eps: float) -> float:
    """The ``mu`` at which the lengths ``l / (1 + mu s^2)`` have the norm ``eps``; 0 if below.

    Newton's method on the reciprocal of the norm, which is concave in ``mu``: from 0 it rises to
    the solution and never goes beyond it.
    """
    mu = 0.0
    for _ in range(_NEWTON_STEPS):
        damped = lengths / (1 + mu * squares)
        size = float(torch.linalg.vector_norm(damped))
        if size <= eps * (1 + 1e-10):
            break
        slope = float((damped.square() * squares / (1 + mu * squares)).sum()) / size
        mu += (size / eps - 1) * size / slope
    return mu
