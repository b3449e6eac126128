"""Put a layer around a method of a strategy, for as long as a plugin needs it.

Avalanche's hooks stand between the steps of the loop, not around them: mixed precision, loss
scaling and gradient reduction need to be around ``forward``, ``backward`` and ``optimizer_step``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

__all__ = ["can_wrap", "unwrap", "wrap"]

Layer = Callable[..., Any]


class _Wrapped:
    """What stands in the strategy's instance in place of its method."""

    def __init__(self, strategy: Any, name: str) -> None:
        self.strategy = strategy
        self.name = name
        self.layers: list[tuple[int, Layer]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = functools.partial(getattr(type(self.strategy), self.name), self.strategy)
        for _, layer in self.layers:
            call = functools.partial(layer, self.strategy, call)
        return call(*args, **kwargs)


def wrap(strategy: Any, name: str, layer: Layer, *, order: int = 0) -> None:
    """Run ``layer(strategy, inner)`` wherever ``strategy.<name>()`` is called.

    Args:
        strategy: The strategy; only this instance changes.
        name: A method, such as ``"forward"``.
        layer: Calls ``inner()`` where the method itself (or the next layer) should run. A bound
            method of a plugin, so that the strategy can be pickled. A layer that is there already
            is not added again.
        order: Layers of higher order are further out, whatever the order of the plugins.
    """
    wrapped = vars(strategy).get(name)
    if not can_wrap(strategy, name):
        raise ValueError(
            f"strategy.{name} has been replaced by {wrapped!r} on this instance; a layer "
            f"around it needs the method of the class. Override it in a subclass instead."
        )
    if wrapped is None:
        wrapped = _Wrapped(strategy, name)
        setattr(strategy, name, wrapped)
    if all(other != layer for _, other in wrapped.layers):
        wrapped.layers.append((order, layer))
        wrapped.layers.sort(key=lambda entry: entry[0])


def can_wrap(strategy: Any, name: str) -> bool:
    """Whether the method is still the class's own, but for layers."""
    return isinstance(vars(strategy).get(name), _Wrapped | None)


def unwrap(strategy: Any, name: str, layer: Layer) -> None:
    """Take a layer away again; the last one leaves the strategy as it was."""
    wrapped = vars(strategy).get(name)
    if not isinstance(wrapped, _Wrapped):
        return
    wrapped.layers = [entry for entry in wrapped.layers if entry[1] != layer]
    if not wrapped.layers:
        delattr(strategy, name)
