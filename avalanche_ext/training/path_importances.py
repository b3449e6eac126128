r"""How important parameters are, read off the steps that learnt an experience: SI's and RWalk's.

No further pass over the data: the gradients are those of the normal training steps, with the model
as training has it. Within a step there are two copies of the parameters.

A step's gradient is that of all the loss but the anchor's own term, as it leaves the backward pass:
replayed samples and other plugins' terms are part of it; clipping, projection and penalties that
are put on gradients come behind it. A step's way is what the parameters really went, whatever the
optimizer is. Both belong to the path, so that other batches give other values; a batch in which
every sample stands twice gives the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from avalanche_ext.functional.importance import (
    grown,
    largest_to_one,
    path_importance,
    path_score,
)
from avalanche_ext.training.checks import check_count, check_nonnegative
from avalanche_ext.training.importances import Importance, trainable

__all__ = ["FisherPath", "PathIntegral"]


class _AlongThePath(Importance):
    """What each parameter's steps take off the loss, and how far it goes."""

    def __init__(self, eps: float, merge: str | float) -> None:
        super().__init__(merge)
        owner = type(self).__name__
        check_nonnegative(owner, eps=eps)
        if eps == 0:
            raise ValueError(f"{owner} divides by eps and expects it > 0; got {eps}. Try 0.1.")
        self.eps = eps
        self._origin: dict[str, Tensor] = {}  # where the way began
        self._drop: dict[str, Tensor] = {}
        self._step: dict[str, tuple[Tensor, Tensor]] = {}  # place and gradient before it

    def start(self, parameters: dict[str, nn.Parameter]) -> None:
        """See ``Importance``."""
        self._origin = {name: p.detach().clone() for name, p in parameters.items()}
        self._drop = {}

    def before_step(self, parameters: dict[str, nn.Parameter]) -> None:
        """See ``Importance``."""
        self._step = {
            name: (p.detach().clone(), p.grad.clone())
            for name, p in parameters.items()
            if p.grad is not None
        }

    def after_step(self, parameters: dict[str, nn.Parameter]) -> None:
        """See ``Importance``."""
        for name, (before, gradient) in self._step.items():
            p = parameters[name].detach()
            drop = _as(self._drop, name, p)
            self._drop[name] = drop.addcmul(grown(gradient, p), _went(before, p), value=-1)
        self._step = {}

    def _way(self, name: str, p: Tensor) -> tuple[Tensor, Tensor]:
        """What ``p``'s steps have taken off the loss, and how far it went."""
        p = p.detach()
        return _as(self._drop, name, p), _went(self._origin.get(name, p), p)


class PathIntegral(_AlongThePath):
    r"""What a parameter's steps took off the loss, for the way it went.

    .. math:: \Omega_k = \frac{\max(0, \omega_k)}{\Delta_k^2 + \xi}, \quad
              \omega_k = -\sum_t g_k(t)\, \delta_k(t)

    Args:
        eps: :math:`\xi > 0`. SI: 0.1.
        merge: See ``Importance``.
    """

    label = "SI"

    def __init__(self, *, eps: float = 0.1, merge: str | float = "sum") -> None:
        super().__init__(eps, merge)

    def finish(self, strategy: Any) -> dict[str, Tensor]:
        """See ``Importance``."""
        parameters = trainable(strategy.model)
        found = {n: path_importance(*self._way(n, p), self.eps) for n, p in parameters.items()}
        self._origin, self._drop = {}, {}
        return found


class FisherPath(_AlongThePath):
    r"""A moving Fisher information, and what stretches of steps took off the loss in its metric.

    .. math:: \Omega = \frac{F}{\max F} + \frac{\bar s}{\max \bar s}, \quad
              F \leftarrow \alpha g^2 + (1 - \alpha) F, \quad
              s = \sum_{\text{stretches}} \frac{\max(0, \Delta L)}{\frac12 F \Delta^2 + \epsilon}

    :math:`\bar s` is the mean of the experience's score and :math:`\bar s` before it. The maxima
    are over all parameters, so that the batch size, a factor of :math:`F`, has no influence.

    Args:
        alpha: Weight of a step's squared gradient, > 0 to 1. RWalk: 0.9.
        delta_t: Steps of a stretch; one that the end of an experience cuts short counts too.
            RWalk: 10.
        eps: :math:`\epsilon > 0`.
    """

    label = "RWalk"

    def __init__(self, *, alpha: float = 0.9, delta_t: int = 10, eps: float = 1e-7) -> None:
        super().__init__(eps, merge=0.0)  # the Fisher and the scores run through by themselves
        check_nonnegative("FisherPath", alpha=alpha)
        check_count("FisherPath", delta_t=delta_t)
        if not 0 < alpha <= 1 or delta_t is None:
            raise ValueError(
                f"FisherPath expects alpha above 0 and up to 1, and a number of steps delta_t; got "
                f"alpha={alpha}, delta_t={delta_t}."
            )
        self.alpha = alpha
        self.delta_t = delta_t
        self._fisher: dict[str, Tensor] = {}
        self._scores: dict[str, Tensor] = {}  # of this experience
        self._mean_scores: dict[str, Tensor] | None = None  # over experiences
        self._steps = 0

    def start(self, parameters: dict[str, nn.Parameter]) -> None:
        """See ``Importance``."""
        super().start(parameters)
        self._scores, self._steps = {}, 0

    def before_step(self, parameters: dict[str, nn.Parameter]) -> None:
        """See ``Importance``."""
        super().before_step(parameters)
        for name, (_, gradient) in self._step.items():
            new, old = gradient.square(), self._fisher.get(name)
            self._fisher[name] = new if old is None else grown(old, new).lerp(new, self.alpha)

    def after_step(self, parameters: dict[str, nn.Parameter]) -> None:
        """See ``Importance``."""
        super().after_step(parameters)
        self._steps += 1
        if self._steps % self.delta_t == 0:
            self._end_stretch(parameters)

    def finish(self, strategy: Any) -> dict[str, Tensor]:
        """See ``Importance``."""
        parameters = trainable(strategy.model)
        self._end_stretch(parameters)
        scores = {n: _as(self._scores, n, p) for n, p in parameters.items()}
        before = self._mean_scores
        if before is not None:
            scores = {n: (_as(before, n, s) + s) / 2 for n, s in scores.items()}
        self._mean_scores = scores
        self._origin, self._scores = {}, {}
        fisher = largest_to_one({n: _as(self._fisher, n, p) for n, p in parameters.items()})
        return {n: fisher[n] + s for n, s in largest_to_one(scores).items()}

    def _end_stretch(self, parameters: dict[str, nn.Parameter]) -> None:
        """Add the stretch's scores, and begin another one."""
        for name, p in parameters.items():
            if name in self._drop:
                score = path_score(*self._way(name, p), _as(self._fisher, name, p), self.eps)
                self._scores[name] = _as(self._scores, name, p) + score
        self._origin = {name: p.detach().clone() for name, p in parameters.items()}
        self._drop = {}


def _went(start: Tensor, p: Tensor) -> Tensor:
    """How far a parameter went; the rows that a head has gained since the start, nowhere."""
    if start.shape == p.shape:
        return p - start
    before = p.clone()
    before[tuple(slice(n) for n in start.shape)] = start
    return p - before


def _as(values: dict[str, Tensor], name: str, p: Tensor) -> Tensor:
    """A value in the parameter's shape; 0 where there is none."""
    return grown(values[name], p) if name in values else torch.zeros_like(p)
