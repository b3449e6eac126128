"""A strategy's first steps, watched: one batch of the first two experiences, on copies.

Witnesses stand in front of, between and behind the plugins. At every hook they compare what the
loop works with (loader, data, mini-batch, gradients, weights), so that each change has an author,
whatever the plugin; two authors of one thing are what makes the order of plugins matter.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
from torch import Tensor

from avalanche_ext.experiments.benchmark_checks import FAILURES, Finding, first_line, name_of
from avalanche_ext.training.lean_hooks import EVAL_EVENTS, TRAIN_EVENTS, follows
from avalanche_ext.training.plugins.compile import CompilePlugin
from avalanche_ext.training.plugins.device_data import DeviceDataPlugin
from avalanche_ext.training.plugins.replay_template import ReplayTemplate

__all__ = ["HOOKS", "MicroSteps", "copy_of", "part_of", "take_micro_steps"]

HOOKS = (
    "before_training", "before_train_dataset_adaptation", "after_train_dataset_adaptation",
    "before_training_exp", "before_training_epoch", *TRAIN_EVENTS, "after_training_epoch",
    "after_training_exp", "after_training", "before_eval", "before_eval_dataset_adaptation",
    "after_eval_dataset_adaptation", "before_eval_exp", *EVAL_EVENTS, "after_eval_exp",
    "after_eval",
)  # fmt: skip
_GRADIENTS = ("after_backward", "before_update")
_WEIGHTS = ("before_training_exp", "before_training_epoch", "after_update", "after_training_exp")
# They build on each other's loaders, and refuse those that they cannot build on.
_COOPERATIVE = (ReplayTemplate, DeviceDataPlugin)
_SHOWN = 6


class MicroSteps:
    """What was seen.

    Attributes:
        hooks: How often each hook was called.
        losses: The loss of every step.
        authors: ``(hook, what, experience)`` -> plugins that changed it, in order.
        activation_bytes: Bytes that a step kept for its backward pass, for each of its rows.
        error: What stopped the steps, and where.
    """

    def __init__(self) -> None:
        self.hooks: dict[str, int] = defaultdict(int)
        self.losses: list[float] = []
        self.authors: dict[tuple[str, str, int], list[Any]] = defaultdict(list)
        self.activation_bytes = 0.0
        self.error: str | None = None
        self.at: tuple[str, int] = ("nothing", -1)
        self._state: dict[str, Any] = {}
        self._saved = 0
        self._before: dict[str, Tensor] = {}
        self._moved: dict[str, bool] = {}
        self._gradient: dict[str, bool | None] = {}
        self._optimized: dict[str, bool] = {}

    def see(self, strategy: Any, event: str, plugin: Any, last: bool) -> None:
        """Called behind every plugin; with ``plugin`` ``None`` in front of them all."""
        experience = self.at[1]
        state = _state_at(strategy, event)
        if plugin is None:
            self.at = (event, experience)
            self.hooks[event] += 1
        else:
            for what, value in state.items():
                if not _same(value, self._state.get(what)):
                    self.authors[event, what, experience].append(plugin)
        self._state = state
        if last:
            self._measure(strategy, event)

    def saved(self, tensor: Tensor) -> Tensor:
        """Count a tensor that is kept for the backward pass."""
        if not isinstance(tensor, torch.nn.Parameter):
            self._saved += tensor.nbytes
        return tensor

    def _measure(self, strategy: Any, event: str) -> None:
        if event == "before_training_exp":
            held = {id(p) for g in strategy.optimizer.param_groups if g["lr"] for p in g["params"]}
            for name, parameter in _trainable(strategy):
                self._before[name] = parameter.detach().clone()
                self._optimized[name] = id(parameter) in held
        elif event == "before_forward":
            self._saved = 0
        elif event == "before_backward":
            self.losses.append(float(strategy.loss))
            self.activation_bytes = max(self.activation_bytes, self._saved / len(strategy.mb_y))
        elif event == "after_backward":
            for name, parameter in _trainable(strategy):
                if parameter.grad is not None:
                    some = bool(parameter.grad.any())
                    self._gradient[name] = self._gradient.get(name) or some
        elif event == "after_training_iteration":
            for name, parameter in _trainable(strategy):
                before = self._before.get(name)
                moved = before is not None and not torch.equal(before, parameter.detach())
                self._moved[name] = self._moved.get(name, False) or moved

    # findings -------------------------------------------------------------------------------

    def findings(self, strategy: Any) -> Iterator[Finding]:
        """What the steps tell of ``strategy``."""
        if self.error is not None:
            yield Finding("error", "micro-step", self.error)
        yield from self._rivals()
        if self.losses and not all(map(math.isfinite, self.losses)):
            yield Finding(
                "error", "loss",
                f"expected finite losses; got {self.losses}: check inputs, learning rate and the "
                f"weights of added terms",
            )  # fmt: skip
        if self.error is None:
            yield from self._silent_hooks(strategy)
            yield from self._weights(strategy)

    def _rivals(self) -> Iterator[Finding]:
        seen = set()
        for (event, what, _), plugins in self.authors.items():
            if what == "loader":
                plugins = [p for p in plugins if not isinstance(p, _COOPERATIVE)]
            names = [name_of(p) for p in plugins]
            if len(names) < 2 or (event, what, *names) in seen:
                continue
            seen.add((event, what, *names))
            if what == "loader":
                yield Finding(
                    "error", "conflict",
                    f"one plugin is expected to decide the current data; {' and '.join(names)} all "
                    f"replace the loader in {event}, and only {names[-1]}'s batches come: use one",
                )  # fmt: skip
            else:
                yield Finding(
                    "warning", "order",
                    f"{' and '.join(names)} all change the {what} in {event}, in this order; "
                    f"another order gives other numbers: state it, or use one",
                )  # fmt: skip

    def _silent_hooks(self, strategy: Any) -> Iterator[Finding]:
        never = [hook for hook in HOOKS if not self.hooks[hook]]
        waiting = {
            name_of(p): hooks
            for p in strategy.plugins
            if (hooks := [h for h in never if follows(p, h)])
            and not isinstance(p, EvaluationPlugin)
        }
        for name, hooks in waiting.items():
            yield Finding(
                "warning", "hooks",
                f"{name} expects {', '.join(hooks)}, which {type(strategy).__name__} never calls: "
                f"that part of it does nothing; use a strategy with Avalanche's loop",
            )  # fmt: skip
        if not waiting:
            shown = ", ".join(f"{loss:.3g}" for loss in self.losses)
            yield Finding("ok", "hooks", f"{len(self.hooks)} hooks were called; losses {shown}")

    def _weights(self, strategy: Any) -> Iterator[Finding]:
        if self._moved and not any(self._moved.values()):
            yield Finding(
                "error", "weights",
                "expected a step to change the weights; none moved: check the learning rate, and "
                "that the optimizer was given the parameters of this model",
            )  # fmt: skip
            return
        given = {id(p) for g in strategy.optimizer.param_groups for p in g["params"]}
        added = [n for n, p in _trainable(strategy) if id(p) not in given and self._moved.get(n)]
        left = [name for name in self._moved if not self._optimized.get(name)]
        still = [n for n, moved in self._moved.items() if not moved and n not in left]
        stuck = [n for n in still if self._gradient.get(n)]
        unused = [n for n in still if n not in self._gradient]
        flat = [n for n in still if n in self._gradient and not self._gradient[n]]
        if stuck:
            yield Finding(
                "error", "weights",
                f"{_some(stuck)} expected to move with their gradients and did not: check what "
                f"masks or resets them, and their learning rate",
            )  # fmt: skip
        for names, reason in (
            (
                added,
                "not given to the optimizer: Avalanche adds them at the first experience, so they "
                "are trained; freeze them (requires_grad=False) if they are to stay",
            ),
            (left, "not trained by the optimizer: check its groups and their learning rates"),
            (unused, "are not reached by the loss: freeze them, or check the forward pass"),
            (flat, "have gradients of zero: dead units, or an input that is always 0"),
        ):
            if names:
                yield Finding("warning", "weights", f"trainable, but {_some(names)} {reason}")
        if not (stuck or added or left or still):
            yield Finding("ok", "weights", f"all {len(self._moved)} trainable tensors moved")


class _Witness(SupervisedPlugin, supports_distributed=True):
    """Stands behind ``plugin``, or in front of them all."""

    def __init__(self, report: MicroSteps, plugin: Any = None, last: bool = False) -> None:
        super().__init__()
        self.report, self.plugin, self.last = report, plugin, last


def _hook(event: str) -> Any:
    def see(self: _Witness, strategy: Any, **kwargs: Any) -> None:
        self.report.see(strategy, event, self.plugin, self.last)

    return see


for _event in HOOKS:
    setattr(_Witness, _event, _hook(_event))


def take_micro_steps(strategy: Any, benchmark: Any, experiences: int = 2) -> MicroSteps:
    """Train a copy of the strategy on a batch of each of the first experiences, then evaluate one.

    Args:
        strategy: Is left alone.
        benchmark: Likewise.
        experiences: How many.
    """
    report = MicroSteps()
    try:
        twin = copy_of(strategy)
        plugins = twin.plugins
        witnesses = [_Witness(report, p, last=p is plugins[-1]) for p in plugins]
        pairs = [x for pair in zip(plugins, witnesses, strict=True) for x in pair]
        plugins[:] = [_Witness(report), *pairs]
        compiled = any(isinstance(p, CompilePlugin) for p in strategy.plugins)
        for k, experience in enumerate(list(benchmark.train_stream)[:experiences]):
            report.at = ("before the first hook", k)
            batch = part_of(experience, strategy.train_mb_size)
            if compiled:
                twin.train(batch, eval_streams=[])
                continue
            with torch.autograd.graph.saved_tensors_hooks(report.saved, lambda tensor: tensor):
                twin.train(batch, eval_streams=[])
        twin.eval([part_of(benchmark.test_stream[0], strategy.train_mb_size)])
    except FAILURES as error:
        hook, k = report.at
        report.error = f"training experience {k}, after {hook}: {first_line(error)}"
    return report


def copy_of(strategy: Any) -> Any:
    """A copy that trains for one epoch and logs nowhere; the caller's loggers are not touched."""
    metrics = copy.deepcopy(strategy.evaluator.metrics)
    silent = EvaluationPlugin(*metrics, strict_checks=False)
    twin = copy.deepcopy(strategy, {id(strategy.evaluator): silent})
    twin.train_epochs = 1
    return twin


def part_of(experience: Any, n: int) -> Any:
    """The experience with ``n`` of its samples, evenly spaced."""
    size = len(experience.dataset)
    if size <= n:
        return experience
    part = copy.copy(experience)
    part._dataset = experience.dataset.subset([k * size // n for k in range(n)])
    return part


# parts ----------------------------------------------------------------------------------------


def _state_at(strategy: Any, event: str) -> dict[str, Any]:
    state: dict[str, Any] = {"loader": strategy.dataloader, "data set": strategy.adapted_dataset}
    batch = strategy.mbatch
    if event == "before_training_iteration" and batch is not None:
        state["mini-batch"] = [(column, column._version) for column in batch]
    if event in _GRADIENTS:
        grads = [p.grad for p in strategy.model.parameters() if p.grad is not None]
        state["gradients"] = _fingerprint(grads)
    if event in _WEIGHTS:
        state["weights"] = _fingerprint([p.detach() for p in strategy.model.parameters()])
    return state


def _fingerprint(tensors: list[Tensor]) -> tuple[float, ...]:
    """Two sums of every tensor: cheap, and no rewriting leaves both."""
    sums = [torch.stack([t.double().sum(), t.double().square().sum()]) for t in tensors]
    return tuple(torch.cat(sums).nan_to_num().tolist()) if sums else ()


def _same(new: Any, old: Any) -> bool:
    if isinstance(new, list) and isinstance(old, list):
        return len(new) == len(old) and all(
            a is b and v == w for (a, v), (b, w) in zip(new, old, strict=True)
        )
    return new == old if isinstance(new, tuple) else new is old


def _trainable(strategy: Any) -> Iterator[tuple[str, Any]]:
    return ((n, p) for n, p in strategy.model.named_parameters() if p.requires_grad)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
