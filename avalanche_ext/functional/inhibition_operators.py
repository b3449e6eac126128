"""Multiply by the weights of inhibition: as a matrix, by Fourier transforms, or at low rank.

Notation as in ``avalanche_ext.functional.inhibition``: ``W`` is symmetric with a zero diagonal,
``N`` is the width of a layer, ``B`` the batch.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Combine",
    "DenseInhibition",
    "FourierInhibition",
    "LowRankInhibition",
    "Method",
    "Operator",
    "check_choice",
    "inhibition_operator",
]

Combine = Literal["product", "min"]
Method = Literal["auto", "dense", "fft", "low_rank"]

# Up to this width one product with W itself takes the least time; a higher rank takes longer than
# the Fourier transforms do. Both measured by tests/perf/inhibition.py.
_DENSE_MAX_WIDTH = 128
_MAX_RANK = 96


class _Product:
    """The quadratic form and its gradient from ``H W``, for operators that have nothing better."""

    def apply(self, h: Tensor) -> Tensor:
        """``H W``."""
        raise NotImplementedError

    def rows(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """``<h, h W>`` of each row, and what ``gradient`` needs of the way there."""
        product = self.apply(h)
        return (product * h).sum(1), product

    def gradient(self, h: Tensor, kept: Tensor, factor: Tensor) -> Tensor:
        """``factor`` times ``H W``."""
        return kept * factor


class _Dense(NamedTuple):
    weights: Tensor


class DenseInhibition(_Dense, _Product):
    """``W`` itself: ``O(B N^2)`` time, ``O(N^2)`` memory."""

    def apply(self, h: Tensor) -> Tensor:
        """``H W``."""
        return h @ self.weights


class _Fourier(NamedTuple):
    spectrum: Tensor
    discount: Tensor | None
    length: int  # no shorter than 2 N - 1, so that nothing wraps around


class FourierInhibition(_Fourier, _Product):
    """``W`` as a convolution between two discounts: ``O(B N log N)`` time, exact."""

    def apply(self, h: Tensor) -> Tensor:
        """``H W``."""
        rows = h if self.discount is None else h * self.discount
        spectrum = torch.fft.rfft(rows, n=self.length) * self.spectrum
        product = torch.fft.irfft(spectrum, n=self.length)[:, : h.shape[1]]
        return product.contiguous() if self.discount is None else product * self.discount


class _LowRank(NamedTuple):
    factor: Tensor
    diagonal: Tensor


class LowRankInhibition(_LowRank, _Product):
    r"""``W`` as :math:`\Phi \Phi^\top` less its diagonal: ``O(B N r)`` time, ``O(N r)`` memory.

    The form needs :math:`H \Phi` alone, which is narrow: nothing of the size of the activations is
    kept for the backward pass.
    """

    def apply(self, h: Tensor) -> Tensor:
        """``H W``."""
        product = (h @ self.factor) @ self.factor.T
        return product.addcmul_(h, self.diagonal, value=-1)

    def rows(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """See ``_Product``."""
        narrow = h @ self.factor
        # In float64: for a single active unit the two are the same.
        own = h.square() @ self.diagonal
        return narrow.double().square().sum(1) - own.double(), narrow

    def gradient(self, h: Tensor, kept: Tensor, factor: Tensor) -> Tensor:
        """See ``_Product``."""
        return (h * (self.diagonal * -factor)).addmm_(kept * factor, self.factor.T)


Operator = DenseInhibition | FourierInhibition | LowRankInhibition


def inhibition_operator(
    width: int,
    sigma: float | None = None,
    importance: Tensor | None = None,
    *,
    combine: Combine = "product",
    method: Method = "auto",
    like: Tensor | None = None,
) -> Operator:
    r"""The weights ``W`` of a layer's pairs, in the form that multiplies fastest.

    :math:`W_{ij} = s_{ij} e^{-(i-j)^2 / 2\sigma^2}` and :math:`W_{ii} = 0`, with
    :math:`s_{ij} = e^{-\alpha_i} e^{-\alpha_j}` or the smaller of the two factors. Without
    locality ``W`` is of rank one, less its diagonal. A Gaussian of reach ``N/6`` has rank 16 at
    float32's precision, whatever ``N`` (pivoted Cholesky; the residual of an entry is at most 1e-7,
    so :math:`|R - R_r| \le 10^{-7} \sum_m \|h^m\|_1^2 / B`; 1e-13 in float64).

    Args:
        width: ``N``.
        sigma: See ``inhibition_loss``.
        importance: See ``inhibition_loss``.
        combine: See ``inhibition_loss``.
        method: ``"auto"``: dense up to 128 units and for ``combine="min"``; beyond, low rank while
            the rank stays below 96 (``sigma > N/48``); otherwise Fourier transforms.
        like: A tensor whose type and device the operator takes; float32 on the CPU by default.

    Raises:
        ValueError: For an argument out of range, or a method that cannot express it.
    """
    discount = _check(width, sigma, importance, combine, method)
    target = torch.empty(0) if like is None else like
    precise = target.dtype == torch.float64
    if method == "auto":
        method = _fastest(width, sigma, combine)
    if combine == "min" and discount is not None and method != "dense":
        raise ValueError(
            f'combine="min" does not separate: it needs method="dense"; got {method!r}.'
        )
    if method == "low_rank":
        factor = _factor(width, sigma, 1e-13 if precise else 1e-7)
        factor = factor if discount is None else factor * discount[:, None]
        return LowRankInhibition(factor.to(target), factor.square().sum(1).to(target))
    kernel = _kernel(width, sigma)
    kernel[0] = 0  # no unit inhibits itself
    if method == "fft":
        length = _smooth(2 * width - 1)
        around = torch.cat([kernel, kernel.new_zeros(length - 2 * width + 1), kernel[1:].flip(0)])
        spectrum = torch.fft.rfft(around).real
        return FourierInhibition(
            spectrum.to(target), None if discount is None else discount.to(target), length
        )
    weights = _toeplitz(kernel.to(target))
    if discount is not None:
        y = discount.to(target)
        pairs = torch.minimum(y[:, None], y) if combine == "min" else y[:, None] * y
        weights = weights * pairs
    return DenseInhibition(weights)


def _check(
    width: int, sigma: float | None, importance: Tensor | None, combine: str, method: str
) -> Tensor | None:
    """The discount of each unit in float64, once all arguments are in range."""
    if width < 1:
        raise ValueError(f"inhibition expects a width >= 1; got {width}.")
    if sigma is not None and not 0 < sigma < math.inf:
        raise ValueError(
            f"inhibition expects a finite sigma > 0 in units, or None for every pair alike; got "
            f"{sigma}."
        )
    check_choice("combine", combine, ("product", "min"))
    check_choice("method", method, ("auto", "dense", "fft", "low_rank"))
    if importance is None:
        return None
    if importance.shape != (width,):
        raise ValueError(
            f"inhibition expects importance of shape ({width},), one value for each unit; got "
            f"{tuple(importance.shape)}."
        )
    if not bool((importance >= 0).all()):
        raise ValueError("inhibition expects importance >= 0 for each unit; got less, or NaN.")
    return torch.exp(-importance.detach().double().cpu())  # built there, then moved


def check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"inhibition expects {name} to be one of {list(allowed)}; got {value!r}.")


def _fastest(width: int, sigma: float | None, combine: str) -> Method:
    if combine == "min":
        return "dense"
    if sigma is None:
        return "low_rank"
    if width <= _DENSE_MAX_WIDTH:
        return "dense"
    rank = 2 * width / sigma  # about what float32's precision takes
    return "low_rank" if rank < _MAX_RANK else "fft"


def _kernel(width: int, sigma: float | None) -> Tensor:
    """Inhibition by distance, in float64."""
    distance = torch.arange(width, dtype=torch.float64)
    return torch.ones_like(distance) if sigma is None else torch.exp(-0.5 * (distance / sigma) ** 2)


def _toeplitz(kernel: Tensor) -> Tensor:
    return torch.cat([kernel.flip(0), kernel[1:]]).unfold(0, len(kernel), 1).flip(0).contiguous()


def _factor(width: int, sigma: float | None, tolerance: float) -> Tensor:
    r"""Columns of :math:`\Phi` by pivoted Cholesky, until every entry is within ``tolerance``."""
    kernel = _kernel(width, sigma)
    around = torch.cat([kernel.flip(0), kernel[1:]])
    factor = kernel.new_zeros(width, min(width, 32))
    residual = torch.ones_like(kernel)
    for k in range(width):
        pivot = int(residual.argmax())
        if residual[pivot] <= tolerance:
            return factor[:, :k]
        if k == factor.shape[1]:
            factor = torch.cat([factor, torch.zeros_like(factor)], dim=1)
        column = around[width - 1 - pivot : 2 * width - 1 - pivot]
        column = column - factor[:, :k] @ factor[pivot, :k]
        factor[:, k] = column / residual[pivot].sqrt()
        residual = residual - factor[:, k].square()
    return factor[:, :width]


def _smooth(least: int) -> int:
    """The next length with no prime factor but 2, 3 and 5: fast to transform."""
    length = least
    while True:
        rest = length
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return length
        length += 1
