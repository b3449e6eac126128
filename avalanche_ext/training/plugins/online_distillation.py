r"""Online distillation: behind every step, pull the outputs for remembered inputs back.

Save what the model says for a few inputs, take the step, then take a few small steps towards what
it said. No labels and no frozen teacher: the teacher is the model itself, one step ago.

Reference:
    Skorokhodov (2019), Generative Memory for Continual Learning, "Online Generative Memory", second
    idea: teacher distillation with the previous batch.

Faithfulness:
    1. Targets are the outputs right before the optimizer's step, not those of an older model. What
       one step forgets and distillation does not bring back is lost: errors add up over a stream.
    2. "Previous batch" can be read as the batch saved before the step or as the mini-batch before
       this one: the default takes a reservoir's samples, ``source="previous_batch"`` the latter.
    3. The source names no distance. The squared one of logits is the default, a sum over outputs
       and a mean over samples; ``temperature=2`` takes distillation's divergence times its square.
    4. The steps are plain gradient descent at ``lam`` times the optimizer's rates: its momentum,
       moments and weight decay know nothing of them.
    5. Targets and steps use evaluation mode and float32: batch statistics and the random state stay
       as they are. Batch statistics that the current data move are not brought back.
    6. The steps follow the optimizer's at once, in front of other plugins' ``after_update``, so
       that what those hold (HAT) stays held.

Cost: per step one forward pass, and ``steps`` forward and backward passes, on ``n_inputs`` samples,
however long the stream.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from avalanche_ext.functional.kept_outputs import output_drift
from avalanche_ext.training.checks import check_count, check_nonnegative
from avalanche_ext.training.online_memory import (
    OnlineMemory,
    descend,
    float32_evaluation,
    learning_rates,
)
from avalanche_ext.training.wrapping import unwrap, wrap

__all__ = ["OnlineDistillationPlugin"]

_ORDER = 30  # outside loss scaling (20) and projection (25): around what they make of the step


class OnlineDistillationPlugin(OnlineMemory):
    r"""Take ``steps`` steps back towards the outputs before each step of the optimizer.

    .. math:: \theta \leftarrow \theta - \lambda \eta \nabla_\theta
              \frac1n \sum_x \| f_\theta(x) - y_x \|_2^2, \qquad y_x = f_{before}(x)

    Logged per epoch as ``OnlineDistillation_Drift``: the distance that a step of the optimizer
    leaves, before it is brought back.

    Args:
        lam: Size of these steps over the optimizer's rate, >= 0; 0 is plain training, bit for bit.
            Useful: 0.03 to 0.1, or about 1 with a temperature. Where a step of the optimizer moves
            outputs far, larger ones diverge.
        steps: How many of them, >= 1. One hardly helps; 10 to 30 do.
        temperature: Of the softmax, > 0; ``None`` for squared distances of logits.
        source: Where inputs come from, see ``avalanche_ext.training.online_memory``.
        mem: Samples in the reservoir of ``source="memory"``, 200 by default.
        n_inputs: Inputs per step, >= 1.

    Raises:
        TypeError, ValueError: For a bad argument; in training, for an outcome that is no longer
            finite, or a strategy that does not call ``optimizer_step()``.
    """

    label = "OnlineDistillation_Drift"

    def __init__(
        self,
        lam: float = 0.1,
        *,
        steps: int = 10,
        temperature: float | None = None,
        source: Any = "memory",
        mem: int | None = None,
        n_inputs: int = 32,
    ) -> None:
        super().__init__(source, mem, n_inputs)
        owner = type(self).__name__
        check_nonnegative(owner, lam=lam)
        check_count(owner, steps=steps)
        if temperature is not None:
            check_nonnegative(owner, temperature=temperature)
        if steps is None or temperature == 0:
            raise ValueError(
                f"{owner} expects steps >= 1, and temperature > 0 or None; got steps={steps}, "
                f"temperature={temperature}."
            )
        self.lam = lam
        self.steps = steps
        self.temperature = temperature

    @property
    def weighs_nothing(self) -> bool:
        """See ``OnlineMemory``."""
        return self.lam == 0

    def before_training(self, strategy: Any, **kwargs: Any) -> None:
        """Stand around the optimizer's step."""
        if self.active:
            wrap(strategy, "optimizer_step", self._optimizer_step, order=_ORDER)

    def after_training(self, strategy: Any, **kwargs: Any) -> None:
        """Leave the strategy as it was."""
        unwrap(strategy, "optimizer_step", self._optimizer_step)

    def _optimizer_step(self, strategy: Any, inner: Callable[[], Any]) -> Any:
        self._stepped = True
        inputs = self.draw(strategy)
        if inputs is None:
            return inner()
        with torch.no_grad(), float32_evaluation(strategy) as outputs:
            targets = outputs(*inputs)
        result = inner()
        self._distil(strategy, inputs, targets)
        return result

    def _distil(self, strategy: Any, inputs: tuple[Tensor, Tensor], targets: Tensor) -> None:
        trained = learning_rates(strategy)
        names, parameters = [name for name, _, _ in trained], [p for _, p, _ in trained]
        with torch.enable_grad(), float32_evaluation(strategy) as outputs:
            for k in range(self.steps):
                drift = output_drift(outputs(*inputs), targets, self.temperature)
                if not drift.requires_grad:
                    return  # nothing that these inputs pass is trained
                slopes = torch.autograd.grad(drift, parameters, allow_unused=True)
                descend(trained, dict(zip(names, slopes, strict=True)), self.lam)
                if k == 0:
                    self.keep(drift)
