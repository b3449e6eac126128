r"""Online look-ahead: move to where the next step changes remembered outputs least, then take it.

Before each step of the optimizer, a few small steps make that step safe: they descend on what the
step *would* do to the outputs for a few inputs (as MAML descends on the loss behind a step). Then
training goes on as ever, from there.

Reference:
    Skorokhodov (2019), Generative Memory for Continual Learning, "Online Generative Memory", first
    idea: "MAML-like way".

Faithfulness:
    1. The source writes :math:`\|f_\theta(x) - f_{\theta - \nabla L(\theta)}(x)\|^2` and leaves
       open whether its first part may move. It is fixed here: the outputs before the ``steps``
       steps. ``form="moving"`` is the literal reading, which protects nothing: for a linear model
       under squared loss its gradient points where training goes, to where the loss is 0.
    2. ``form="second_order"`` differentiates the step (default); ``"first_order"`` takes the
       gradient of the current loss for a constant.
    3. The step looked at is plain gradient descent at the optimizer's rates on the criterion of the
       current mini-batch, replayed samples included. Momentum, moments, and other plugins' terms
       are no part of it. The step that is taken has them all: its gradient is computed after.
    4. "Perform k steps" has no rate: ``lam`` times the optimizer's.
    5. All passes use evaluation mode and float32: batch statistics and the random state stay.
    6. The steps are taken before the iteration's forward pass. HAT holds weights against the
       optimizer's steps alone, not against these.

Cost: per step a forward pass on ``n_inputs`` samples, and ``steps`` times a forward and a backward
pass on the mini-batch and on the inputs, differentiated once more in second order. Code of
``CompilePlugin`` cannot be differentiated twice: use ``"first_order"`` with it.
"""

from __future__ import annotations

from typing import Any

import torch
from avalanche.models import MultiTaskModule
from avalanche.training.templates.problem_type.supervised_problem import SupervisedProblem
from torch import Tensor
from torch.func import functional_call

from avalanche_ext.functional.kept_outputs import Parameters, lookahead_gradient
from avalanche_ext.training.checks import check_count, check_nonnegative, check_one_of
from avalanche_ext.training.online_memory import (
    OnlineMemory,
    descend,
    float32_evaluation,
    learning_rates,
)
from avalanche_ext.training.representation_penalty import bare

__all__ = ["OnlineLookaheadPlugin"]


class OnlineLookaheadPlugin(OnlineMemory):
    r"""Take ``steps`` steps that make the optimizer's next step safe for remembered outputs.

    .. math:: \theta \leftarrow \theta - \lambda \eta \nabla_\theta
              \frac1n \sum_x \| y_x - f_{\theta - \eta \nabla L(\theta)}(x) \|_2^2

    Logged per epoch as ``OnlineLookahead_Drift``: the distance before the first of these steps.

    Args:
        lam: Size of these steps over the optimizer's rate, >= 0; 0 is plain training, bit for bit.
            Useful: up to 0.1, beside replay to 0.01; larger ones diverge.
        steps: How many of them, >= 1.
        form: ``"second_order"``, ``"first_order"`` or ``"moving"``, see
            ``avalanche_ext.functional.kept_outputs``.
        source: Where inputs come from, see ``avalanche_ext.training.online_memory``.
        mem: Samples in the reservoir of ``source="memory"``, 200 by default.
        n_inputs: Inputs per step, >= 1.

    Raises:
        TypeError, ValueError: For a bad argument; in training, for an outcome that is no longer
            finite, or a strategy with a forward pass of its own.
    """

    label = "OnlineLookahead_Drift"

    def __init__(
        self,
        lam: float = 0.1,
        *,
        steps: int = 1,
        form: str = "second_order",
        source: Any = "memory",
        mem: int | None = None,
        n_inputs: int = 32,
    ) -> None:
        super().__init__(source, mem, n_inputs)
        owner = type(self).__name__
        check_nonnegative(owner, lam=lam)
        check_count(owner, steps=steps)
        check_one_of(owner, "form", form, ("second_order", "first_order", "moving"))
        if steps is None:
            raise TypeError(f"{owner} expects a whole number steps >= 1; got None.")
        self.lam = lam
        self.steps = steps
        self.form: Any = form

    @property
    def weighs_nothing(self) -> bool:
        """See ``OnlineMemory``."""
        return self.lam == 0

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Refuse a strategy whose loss cannot be worked out anew."""
        super().before_training_exp(strategy, **kwargs)
        if self.active and type(strategy).forward is not SupervisedProblem.forward:
            raise ValueError(
                f"{type(self).__name__} works out the mini-batch's loss at parameters that are yet "
                f"to come; that of {type(strategy).__name__} belongs to its own forward pass. Use "
                f"a strategy with Avalanche's forward pass, such as Naive, or "
                f"OnlineDistillationPlugin."
            )

    def before_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        """Take the steps; the mini-batch is there, and its forward pass still to come."""
        self._stepped = True
        inputs = self.draw(strategy)
        if inputs is not None:
            self._look_ahead(strategy, inputs)

    def _look_ahead(self, strategy: Any, inputs: tuple[Tensor, Tensor]) -> None:
        trained = learning_rates(strategy)
        parameters = {name: p for name, p, _ in trained}
        rates = {name: float(rate) for name, _, rate in trained}
        model = bare(strategy.model)
        multi_task = isinstance(model, MultiTaskModule)
        tasks = strategy.mbatch[-1]

        def call(values: Parameters, x: Tensor, labels: Tensor) -> Tensor:
            return functional_call(model, dict(values), (x, labels) if multi_task else (x,))

        def loss(values: Parameters) -> Tensor:
            return _criterion(strategy, call(values, strategy.mb_x, tasks))

        with float32_evaluation(strategy) as outputs:
            with torch.no_grad():
                target = outputs(*inputs)
            for k in range(self.steps):
                drift, slopes = lookahead_gradient(
                    loss, lambda values: call(values, *inputs), parameters, rates,
                    target=target, form=self.form,
                )  # fmt: skip
                descend(trained, slopes, self.lam)
                if k == 0:
                    self.keep(drift)


def _criterion(strategy: Any, output: Tensor) -> Tensor:
    """The strategy's own criterion, which reads what is scored from the strategy."""
    before, strategy.mb_output = strategy.mb_output, output
    try:
        return strategy.criterion()
    finally:
        strategy.mb_output = before
