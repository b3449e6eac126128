r"""How important each parameter is to what has been learnt, and how a loss term holds it in place.

The term is quadratic in the way from the anchor :math:`\theta^*`, per parameter:

.. math:: R = \sum_k \Omega_k (\theta_k - \theta^*_k)^2

References:
    Kirkpatrick et al. (2017), Overcoming catastrophic forgetting in neural networks; Zenke, Poole,
    Ganguli (2017), Continual learning through synaptic intelligence; Aljundi et al. (2018), Memory
    aware synapses; Chaudhry et al. (2018), Riemannian walk for incremental learning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = [
    "anchor_term",
    "grown",
    "largest_to_one",
    "path_importance",
    "path_score",
    "per_sample_sums",
    "quantiles",
    "sampled_labels",
]

Objective = Callable[..., Tensor]


# the term ---------------------------------------------------------------------------------------


@torch.no_grad()
def anchor_term(
    parameters: Sequence[Tensor], anchors: Sequence[Tensor], importances: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    r"""The term and half its gradient, :math:`\Omega_k (\theta_k - \theta^*_k)`, in one go.

    Args:
        parameters: At least one tensor.
        anchors: Where each is held; same shapes.
        importances: Same shapes, >= 0.

    Returns:
        The value, a scalar, and one tensor per parameter. Nothing is recorded for autograd.
    """
    # All tensors in one kernel each; torch has no other name for it.
    moved = torch._foreach_sub(list(parameters), list(anchors))  # type: ignore
    pulls = torch._foreach_mul(moved, list(importances))  # type: ignore
    terms = [pull.flatten() @ way.flatten() for pull, way in zip(pulls, moved, strict=True)]
    return torch.stack(terms).sum(), list(pulls)


def grown(old: Tensor, like: Tensor) -> Tensor:
    """``old`` in the shape of ``like``: what a parameter has gained at its ends is 0.

    Raises:
        ValueError: If ``like`` is smaller along an axis, or has other axes.
    """
    old = old.to(like)
    if old.shape == like.shape:
        return old
    if old.ndim != like.ndim or any(o > n for o, n in zip(old.shape, like.shape, strict=True)):
        raise ValueError(
            f"expected a shape that contains {tuple(old.shape)}, since parameters may grow but not "
            f"shrink; got {tuple(like.shape)}."
        )
    result = torch.zeros_like(like)
    result[tuple(slice(n) for n in old.shape)] = old
    return result


def quantiles(values: Sequence[Tensor], q: Sequence[float]) -> list[float]:
    """Quantiles of all numbers together, linear between two of them; any amount of numbers.

    Args:
        values: Tensors of any shape; together at least one number.
        q: Each in [0, 1].
    """
    ordered = torch.cat([v.detach().flatten().float() for v in values]).sort().values
    at = torch.tensor([float(p) for p in q], dtype=torch.float64) * (len(ordered) - 1)
    below = at.floor().long()
    above = (below + 1).clamp(max=len(ordered) - 1)
    low, high = (ordered[k.to(ordered.device)].double().cpu() for k in (below, above))
    return torch.lerp(low, high, at - below).tolist()


# measured on data -------------------------------------------------------------------------------


def sampled_labels(logits: Tensor, uniform: Tensor) -> Tensor:
    """One label per sample from the softmax of its logits, by the inverse of the distribution.

    Args:
        logits: ``(B, C)``.
        uniform: ``(B,)``, numbers in [0, 1), float64.

    Returns:
        Labels ``(B,)``; one of probability 0 never comes.
    """
    below = torch.softmax(logits.double(), 1).cumsum(1)
    # Divided by the last, which rounding leaves next to 1, so that no number lies above it.
    return (below / below[:, -1:] <= uniform[:, None]).sum(1)


def per_sample_sums(
    objective: Objective,
    parameters: dict[str, Tensor],
    samples: Sequence[Tensor],
    *,
    of: Callable[[Tensor], Tensor],
    chunk: int = 0,
) -> dict[str, Tensor]:
    r"""Sum over samples of a function of each sample's own gradient, :math:`\sum_n f(g_n)`.

    The square for a Fisher information, the absolute value for memory aware synapses. A batch's
    mean gradient gives neither: it falls as the batch grows.

    Args:
        objective: ``f(parameters, *sample) -> scalar``.
        parameters: Leaves by name, that require a gradient.
        samples: Columns, first axis the sample.
        of: Function of a gradient, entry by entry.
        chunk: Samples whose gradients are held at the same time, by ``torch.func.vmap``; 0 for one
            backward pass per sample, which any network can do.

    Returns:
        A sum per parameter; 0 for one that the objective does not depend on.
    """
    sums = {name: torch.zeros_like(p) for name, p in parameters.items()}
    if chunk == 0:
        for sample in zip(*samples, strict=True):
            value = objective(parameters, *sample)
            gradients = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
            for total, gradient in zip(sums.values(), gradients, strict=True):
                if gradient is not None:
                    total.add_(of(gradient))
        return sums
    leaves = {name: p.detach() for name, p in parameters.items()}
    gradient_of = torch.func.vmap(torch.func.grad(objective), (None, *[0] * len(samples)))
    for part in zip(*(column.split(chunk) for column in samples), strict=True):
        for name, gradient in gradient_of(leaves, *part).items():
            sums[name].add_(of(gradient).sum(0))
    return sums


# measured along the way of training -------------------------------------------------------------


def path_importance(drop: Tensor, moved: Tensor, eps: float) -> Tensor:
    r"""Synaptic intelligence's :math:`\max(0, \omega) / (\Delta^2 + \xi)`.

    Args:
        drop: :math:`\omega = -\sum_t g_t \cdot \delta_t`: what the parameter's steps took off the
            loss.
        moved: :math:`\Delta`: its way over the experience.
        eps: :math:`\xi > 0`.
    """
    return drop.clamp(min=0) / (moved.square() + eps)


def path_score(drop: Tensor, moved: Tensor, fisher: Tensor, eps: float) -> Tensor:
    r"""Riemannian walk's :math:`\max(0, \Delta L) / (\frac12 F \Delta^2 + \epsilon)` of a stretch.

    Args:
        drop: :math:`\Delta L`: what the parameter's steps took off the loss over the stretch.
        moved: :math:`\Delta`: its way over the stretch.
        fisher: :math:`F`.
        eps: :math:`\epsilon > 0`.
    """
    return drop.clamp(min=0) / (0.5 * fisher * moved.square() + eps)


def largest_to_one(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """All values >= 0 divided by the largest of them; as they are if that is 0."""
    if not values:
        return {}
    largest = torch.stack([v.max() for v in values.values()]).max()
    largest = torch.where(largest > 0, largest, torch.ones_like(largest))
    return {name: v / largest for name, v in values.items()}
