r"""Local neural inhibition: units of one layer that are active together inhibit each other.

Reference:
    Aljundi, Rohrbach, Tuytelaars (2018), Selfless Sequential Learning, NeurIPS workshop on
    continual learning, Eqs. 2 to 6.

Notation: ``h_i^m`` is the activation of unit ``i`` for sample ``m``, ``N`` the width of the layer,
``alpha_i >= 0`` the importance of unit ``i`` to earlier experiences, ``sigma`` the reach of
inhibition in units. With the symmetric weights ``W`` (zero diagonal) the regulariser is the
quadratic form ``tr(H W H^T) / B``, so all that a faster evaluation has to do is to multiply by
``W``: as a matrix, by Fourier transforms, or as a matrix of low rank less its diagonal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from avalanche_ext.functional.inhibition_operators import (
    Combine,
    DenseInhibition,
    Method,
    Operator,
    check_choice,
    inhibition_operator,
)

__all__ = [
    "FORMS",
    "InhibitionForm",
    "inhibition_loss",
    "inhibition_operator",
    "neuron_sensitivity",
]

Reduction = Literal["paper", "pair_mean"]
Signed = Literal["error", "product", "abs_moment"]


@dataclass(frozen=True)
class InhibitionForm:
    """Which of the four regularisers, and how it is evaluated (see ``inhibition_loss``).

    Attributes:
        local: Whether inhibition fades with the distance of units.
        discount: Whether units that are important to earlier experiences are spared.
        combine: Discount of a pair.
        reduction: Divisor.
        signed: What to do with negative activations.
        method: How to multiply by the weights of pairs.
    """

    local: bool
    discount: bool
    combine: Combine = "product"
    reduction: Reduction = "paper"
    signed: Signed = "error"
    method: Method = "auto"

    def __post_init__(self) -> None:
        check_choice("combine", self.combine, ("product", "min"))
        check_choice("reduction", self.reduction, ("paper", "pair_mean"))
        check_choice("signed", self.signed, ("error", "product", "abs_moment"))
        check_choice("method", self.method, ("auto", "dense", "fft", "low_rank"))


FORMS: dict[str, InhibitionForm] = {
    "sni": InhibitionForm(local=False, discount=False),  # Eq. 2
    "slni": InhibitionForm(local=True, discount=False),  # Eq. 4
    "snid": InhibitionForm(local=False, discount=True),
    "slnid": InhibitionForm(local=True, discount=True),  # Eq. 6, there called SLNI as well
    "released": InhibitionForm(local=True, discount=True, combine="min"),  # the authors' code
}


def inhibition_loss(
    h: Tensor,
    sigma: float | None = None,
    importance: Tensor | None = None,
    *,
    combine: Combine = "product",
    reduction: Reduction = "paper",
    signed: Signed = "error",
    method: Method = "auto",
    operator: Operator | None = None,
) -> Tensor:
    r"""Sparse coding through local neural inhibition, of one layer and one batch.

    .. math::
        R(H) = \frac{1}{B} \sum_{i \ne j} e^{-(\alpha_i + \alpha_j)}\,
               e^{-(i-j)^2 / 2\sigma^2} \sum_m h_i^m h_j^m

    over ordered pairs: each pair of units counts twice. Without ``sigma`` the Gaussian is 1
    (Eq. 2), without ``importance`` the discount is (Eq. 4); with both it is Eq. 6. The gradient is
    :math:`\partial R / \partial H = (2/B)\, H W`; Eq. 3 as printed lacks the factor 2.

    Args:
        h: Activations of one layer.
        sigma: Reach of inhibition in units, > 0; ``None`` for every pair alike. Paper: ``N / 6``.
        importance: ``alpha``, >= 0 for each unit; infinity takes a unit out.
        combine: Discount of a pair: ``"product"`` (Eq. 6) or ``"min"`` of the two units' (the
            released code; dense only).
        reduction: ``"paper"`` divides by ``B``; ``"pair_mean"`` by ``B N (N - 1)``, so that one
            weight suits layers of any width.
        signed: For negative activations: ``"error"`` refuses them; ``"product"`` takes the formula
            as it stands, which then rewards opposite signs and has no lower bound;
            ``"abs_moment"`` takes the absolute value of each pair's batch moment, as the released
            code does (dense only).
        method: ``"dense"``, ``"fft"``, ``"low_rank"``, or ``"auto"``, the fastest for the width.
        operator: ``W`` from ``inhibition_operator``, instead of building it for each call; then
            ``sigma``, ``importance``, ``combine`` and ``method`` are the operator's.

    Shapes:
        h ``(B, N)``, importance ``(N,)``, result ``()``.

    Returns:
        The value in float32 (float64 for float64 input), also under autocast: sums over pairs
        overflow half precision. An exact 0 for one unit.

    Raises:
        ValueError: For a shape or an argument out of range, or negative activations.

    References:
        Aljundi et al. (2018), Eqs. 2, 4 and 6.
    """
    if h.ndim != 2 or 0 in h.shape:
        raise ValueError(f"inhibition expects activations (B, N), B, N >= 1; got {tuple(h.shape)}.")
    check_choice("reduction", reduction, ("paper", "pair_mean"))
    check_choice("signed", signed, ("error", "product", "abs_moment"))
    h = h if h.dtype == torch.float64 else h.float()
    if signed == "error" and bool(h.detach().amin() < 0):
        raise ValueError(
            f"inhibition expects activations >= 0 (behind a ReLU); got {float(h.amin()):.3g}. "
            f'Choose such layers, or signed="abs_moment" for tanh, maxout or winner-take-all units.'
        )
    with torch.autocast(h.device.type, enabled=False):
        if operator is None:
            if signed == "abs_moment" and method == "auto":
                method = "dense"
            operator = inhibition_operator(
                h.shape[1], sigma, importance, combine=combine, method=method, like=h
            )
        elif sigma is not None or importance is not None:
            raise ValueError("inhibition expects sigma and importance, or an operator; got both.")
        if signed == "abs_moment":
            operator = _with_signs_of_moments(h.detach(), operator)
        pairs = max(1, h.shape[1] * (h.shape[1] - 1)) if reduction == "pair_mean" else 1
        value = _Quadratic.apply(h, operator, 1.0 / (len(h) * pairs))
    assert isinstance(value, Tensor)
    return value


def neuron_sensitivity(
    objective: Tensor, activations: Sequence[Tensor], *, at: str = "pre"
) -> list[Tensor]:
    r"""Sum over samples of the magnitude of an objective's gradient at each unit.

    .. math:: n\, \alpha_i = \sum_m \Big| \frac{\partial \mathcal{L}_m}{\partial n_i^m} \Big|

    Samples must not interact (evaluation mode), so one backward pass of the sum of all samples'
    objectives gives each sample's own gradient. The graph is freed.

    Args:
        objective: :math:`\sum_m \mathcal{L}_m`, a sum over the batch, not a mean.
        activations: Outputs of layers that the objective was computed from; one through which no
            gradient flows (a frozen extractor's) counts 0. Of a feature map the gradients over its
            positions are added up: the unit is the channel.
        at: ``"pre"``: at the input of the ReLU, as the released code has it: an inactive unit
            counts 0. ``"post"``: at its output.

    Shapes:
        objective ``()``, activations ``(B, N)`` or ``(B, N, H, W)``, results ``(N,)`` each.

    Raises:
        ValueError: For an unknown ``at`` or another shape.

    References:
        Aljundi et al. (2018), Eq. 5.
    """
    check_choice("at", at, ("pre", "post"))
    for h in activations:
        if h.ndim not in (2, 4):
            raise ValueError(f"sensitivity expects (B, N) or (B, N, H, W); got {tuple(h.shape)}.")
    reached = [h for h in activations if h.requires_grad]
    gradients = dict(
        zip(reached, torch.autograd.grad(objective, reached, allow_unused=True), strict=True)
    )
    sums = []
    for h in activations:
        gradient = gradients.get(h)
        if gradient is None:
            sums.append(h.new_zeros(h.shape[1], dtype=torch.float64))
            continue
        if at == "pre":
            gradient = gradient * (h.detach() > 0)
        gradient = gradient.flatten(2).sum(2) if gradient.ndim == 4 else gradient
        sums.append(gradient.abs().sum(0, dtype=torch.float64))
    return sums


class _Quadratic(torch.autograd.Function):
    """``scale <H, H W>``: what the forward pass works out, the backward pass does not again."""

    @staticmethod
    def forward(ctx, h: Tensor, operator: Operator, scale: float) -> Tensor:
        rows, kept = operator.rows(h)  # added up in float64
        ctx.save_for_backward(h, kept)
        ctx.operator, ctx.scale = operator, scale
        return (rows.double().sum() * scale).to(h.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        h, kept = ctx.saved_tensors
        factor = 2 * ctx.scale * grad
        if torch.is_grad_enabled():  # for a second derivative autograd has to see the product grow
            with torch.autocast(h.device.type, enabled=False):
                return ctx.operator.apply(h) * factor, None, None
        return ctx.operator.gradient(h, kept, factor), None, None


def _with_signs_of_moments(h: Tensor, operator: Operator) -> DenseInhibition:
    """``W`` with the sign of each pair's batch moment, so that its quadratic form is positive."""
    if not isinstance(operator, DenseInhibition):
        raise ValueError(
            f'signed="abs_moment" needs every pair by itself: method="dense"; got '
            f"{type(operator).__name__}."
        )
    return DenseInhibition(operator.weights * (h.T @ h).sign())
