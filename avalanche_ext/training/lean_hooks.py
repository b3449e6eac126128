"""Call only the hooks that do something.

At every step Avalanche asks every plugin, metric and logger about a dozen events, nearly all of
which nobody listens to, and asks the experience twice whether it has task labels. On small models
that takes as long as the model. ``install`` looks once who listens to what and puts that short list
in place; ``remove`` takes it away. What is called, in which order, with which arguments, stays the
same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from avalanche.logging import BaseLogger
from avalanche.models.utils import is_multi_task_module
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.templates.base_sgd import BaseSGDTemplate
from avalanche.training.templates.problem_type.supervised_problem import SupervisedProblem

from avalanche_ext.training.wrapping import can_wrap, unwrap, wrap

__all__ = ["EVAL_EVENTS", "TRAIN_EVENTS", "install", "remove"]

TRAIN_EVENTS = (
    "before_training_iteration",
    "before_forward",
    "after_forward",
    "before_backward",
    "after_backward",
    "before_update",
    "after_update",
    "after_training_iteration",
)
EVAL_EVENTS = (
    "before_eval_iteration",
    "before_eval_forward",
    "after_eval_forward",
    "after_eval_iteration",
)
# Avalanche's base classes, whose hooks are empty.
_EMPTY = {
    "BasePlugin",
    "BaseSGDPlugin",
    "SupervisedPlugin",
    "SupervisedMetaLearningPlugin",
    "PluginMetric",
}


class _Trigger:
    """Stands in a strategy's instance in place of a ``_before_*`` or ``_after_*`` method."""

    def __init__(self, strategy: Any, callbacks: list[Callable[..., Any]]) -> None:
        self.strategy = strategy
        self.callbacks = callbacks

    def __call__(self, **kwargs: Any) -> None:
        for callback in self.callbacks:
            callback(self.strategy, **kwargs)


class _Published:
    """An evaluator that no metric or logger follows at ``event``: hand on what plugins publish."""

    def __init__(self, evaluator: EvaluationPlugin, event: str) -> None:
        self.evaluator = evaluator
        self.event = event

    def __call__(self, strategy: Any, **kwargs: Any) -> None:
        # EvaluationPlugin looks attributes up in Python; this runs at every step.
        if object.__getattribute__(self.evaluator, "_metric_values"):
            getattr(self.evaluator, self.event)(strategy, **kwargs)


class _Evaluator(_Published):
    """An evaluator with something to do at ``event``; it makes its hooks on the fly."""

    def __call__(self, strategy: Any, **kwargs: Any) -> None:
        getattr(self.evaluator, self.event)(strategy, **kwargs)


def install(strategy: Any, events: tuple[str, ...]) -> None:
    """Make ``strategy`` call only the plugins, metrics and loggers that follow ``events``.

    A strategy that overrides the method behind an event keeps its own. The lists are picked
    once: a plugin that is added afterwards is not called until the next ``install``.
    """
    for event in events:
        name = f"_{event}"
        if getattr(type(strategy), name) is not getattr(BaseSGDTemplate, name):
            continue
        if not isinstance(vars(strategy).get(name), _Trigger | None):
            continue
        found = (_callback(plugin, event) for plugin in strategy.plugins)
        setattr(strategy, name, _Trigger(strategy, [c for c in found if c is not None]))
    if type(strategy).forward is SupervisedProblem.forward and can_wrap(strategy, "forward"):
        wrap(strategy, "forward", _forward, order=-1)


def _forward(strategy: Any, inner: Callable[[], Any]) -> Any:
    """Avalanche's forward; only a multi-task model needs to be told of task labels."""
    if is_multi_task_module(strategy.model):
        return inner()
    return strategy.model(strategy.mbatch[0])


def remove(strategy: Any, events: tuple[str, ...]) -> None:
    """Undo ``install``."""
    for event in events:
        if isinstance(vars(strategy).get(f"_{event}"), _Trigger):
            delattr(strategy, f"_{event}")
    if not any(isinstance(value, _Trigger) for value in vars(strategy).values()):
        unwrap(strategy, "forward", _forward)


def _callback(plugin: Any, event: str) -> Callable[..., Any] | None:
    if isinstance(plugin, EvaluationPlugin):
        listeners = [*plugin.metrics, *plugin.loggers]
        listens = (
            type(plugin) is not EvaluationPlugin
            or any(follows(one, event) for one in listeners)
            or any(_logs_in_its_own_way(one) for one in plugin.loggers)
        )
        return (_Evaluator if listens else _Published)(plugin, event)
    return getattr(plugin, event) if follows(plugin, event) else None


def _logs_in_its_own_way(logger: Any) -> bool:
    """Whether ``logger`` notices that it is called without any values."""
    return getattr(type(logger), "log_metrics", None) is not BaseLogger.log_metrics


def follows(listener: Any, event: str) -> bool:
    """Whether ``listener`` has a hook for ``event`` other than the empty ones it inherits."""
    if not hasattr(listener, event):
        return False
    hook = getattr(type(listener), event, None)
    owner, _, _ = getattr(hook, "__qualname__", "").partition(".")
    empty = owner in _EMPTY and getattr(hook, "__module__", "").startswith("avalanche.")
    dynamic = type(listener).__getattribute__ is not object.__getattribute__
    return not empty or dynamic or event in vars(listener)
