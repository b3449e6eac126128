"""Checks that turn a mistake in the set-up into a clear error before the first update."""

from __future__ import annotations

import math
import warnings
from numbers import Real
from typing import Any

from avalanche.training.plugins import SupervisedPlugin
from torch import nn

__all__ = [
    "CheckedPlugin",
    "check_count",
    "check_experience",
    "check_labels_fit",
    "check_nonnegative",
    "check_one_of",
]


def check_nonnegative(owner: str, **values: Any) -> None:
    """Raise unless every value is a finite number >= 0 (booleans and NaN are not)."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{owner} expects a number {name} >= 0; got {value!r}.")
        if not 0 <= float(value) < math.inf:
            raise ValueError(f"{owner} expects a finite {name} >= 0; got {name}={value}.")


def check_count(owner: str, **values: Any) -> None:
    """Raise unless every value is ``None`` or a whole number >= 1."""
    for name, value in values.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise TypeError(f"{owner} expects a whole number {name} >= 1 or None; got {value!r}.")
        if value is not None and value < 1:
            raise ValueError(f"{owner} expects {name} >= 1 or None; got {name}={value}.")


def check_one_of(owner: str, name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Raise unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{owner} expects {name} to be one of {list(allowed)}; got {value!r}.")


class CheckedPlugin(SupervisedPlugin):
    """Base of plugins: a mistake in the data is an error before the first update."""

    _clock: Any = None  # of the strategy that it learns with

    def before_train_dataset_adaptation(self, strategy: Any, **kwargs: Any) -> None:
        """Refuse an empty experience before a loader is built for it; warn of a second strategy."""
        check_experience(strategy)
        if self._clock is not None and self._clock is not strategy.clock:
            name = type(self).__name__
            warnings.warn(
                f"this {name} has been trained with another strategy, and goes on with what it "
                f"remembers from there. For a run of its own give each strategy a new {name}.",
                stacklevel=2,
            )
        self._clock = strategy.clock

    def after_forward(self, strategy: Any, **kwargs: Any) -> None:
        """Before the first loss of an experience: do the labels fit the head?"""
        first = strategy.clock.train_exp_iterations == 0
        if first and isinstance(getattr(strategy, "_criterion", None), nn.CrossEntropyLoss):
            check_labels_fit(strategy)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_clock": None}  # a copy is meant to go on elsewhere


def check_experience(strategy: Any) -> None:
    """Raise if the experience that is about to be trained on has no samples."""
    experience = strategy.experience
    if len(experience.dataset) == 0:
        index = getattr(experience, "current_experience", "?")
        raise ValueError(
            f"experience {index} of the training stream is empty; every experience needs at least "
            f"one sample. Drop it from the stream or check how the benchmark was split."
        )


def check_labels_fit(strategy: Any) -> None:
    """Raise if a label of the current batch has no output in the model's head.

    Called between the forward pass and the loss, where the width of the head is known whatever
    the model, and nothing has been updated yet.
    """
    output = strategy.mb_output
    if getattr(output, "ndim", 0) != 2:
        return
    labels = getattr(strategy.experience, "classes_in_this_experience", None)
    low, high = (
        (min(labels), max(labels))
        if labels
        else (int(strategy.mb_y.min()), int(strategy.mb_y.max()))
    )
    if low < 0 or high >= output.shape[1]:
        raise ValueError(
            f"the experience has labels {low} to {high}, but the model's output has "
            f"{output.shape[1]} units (labels 0 to {output.shape[1] - 1}). Give the model a wider "
            f"or a growing head, or map the labels to 0, 1, 2, ..."
        )
