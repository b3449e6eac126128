r"""How far a network's outputs have moved, and how to make the next step move them less.

Reference:
    Skorokhodov (2019), Generative Memory for Continual Learning, "Online Generative Memory", first
    and second idea.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["lookahead_gradient", "output_drift"]

Parameters = Mapping[str, Tensor]


def output_drift(outputs: Tensor, targets: Tensor, temperature: float | None = None) -> Tensor:
    r"""Distance of outputs from what they were, a mean over samples.

    .. math:: \frac1B \sum_b \|f_b - y_b\|_2^2 \qquad \text{or} \qquad
              \frac{T^2}{B} \sum_b KL\big(p_T(y_b) \,\|\, p_T(f_b)\big)

    Args:
        outputs: Outputs (logits) now.
        targets: Outputs before.
        temperature: :math:`T > 0` of the softmax; ``None`` for the squared distance.

    Shapes:
        outputs and targets ``(B, ...)``, classes last; result ``()``.

    Raises:
        ValueError: If the shapes differ.
    """
    if outputs.shape != targets.shape:
        raise ValueError(
            f"output_drift expects outputs and targets of one shape; got {tuple(outputs.shape)} "
            f"and {tuple(targets.shape)}."
        )
    if temperature is None:
        return (outputs - targets).square().flatten(1).sum(1).mean()
    now = F.log_softmax(outputs / temperature, -1)
    then = F.log_softmax(targets / temperature, -1)
    divergence = F.kl_div(now, then, reduction="none", log_target=True)
    return temperature**2 * divergence.flatten(1).sum(1).mean()


def lookahead_gradient(
    loss: Callable[[Parameters], Tensor],
    outputs: Callable[[Parameters], Tensor],
    parameters: Parameters,
    rates: Mapping[str, float],
    *,
    target: Tensor,
    form: Literal["second_order", "first_order", "moving"] = "second_order",
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""What the next step would do to the outputs, and its gradient.

    .. math:: J(\theta) = \frac1B \big\| y - f\big(\theta - \eta \nabla L(\theta)\big) \big\|_2^2

    Args:
        loss: :math:`L`, of the current data.
        outputs: :math:`f`, the outputs for the inputs whose outputs are to be kept.
        parameters: :math:`\theta`, by name; leaves that require a gradient.
        rates: :math:`\eta` of each.
        target: :math:`y`: outputs to stay near.
        form: ``"second_order"``: the gradient; ``"first_order"``: it leaves out that
            :math:`\nabla L` changes with :math:`\theta`; ``"moving"``: :math:`y = f(\theta)`
            instead of ``target``, with its gradient.

    Returns:
        :math:`J`, and its gradient by name, of what it depends on.
    """
    names, values = list(parameters), list(parameters.values())
    exact = form != "first_order"
    with torch.enable_grad():
        slopes = torch.autograd.grad(
            loss(parameters), values, create_graph=exact, allow_unused=True
        )
        ahead = {
            name: p if slope is None else p - rates[name] * slope
            for name, p, slope in zip(names, values, slopes, strict=True)
        }
        anchor = outputs(parameters) if form == "moving" else target
        value = output_drift(outputs(ahead), anchor)
        if not value.requires_grad:  # nothing that is trained has a part in these outputs
            return value, {}
        found = torch.autograd.grad(value, values, allow_unused=True)
    pairs = zip(names, found, strict=True)
    return value.detach(), {name: g for name, g in pairs if g is not None}
