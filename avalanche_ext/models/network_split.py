"""Cut a network at one layer: an encoder that ends with it, and a head behind it.

The network stays whole: the encoder alone is a forward pass that stops at the layer, the head alone
one whose layer gives other features. So it works for any network in which everything behind the
layer depends on the layer's output alone. What stands in front then sees a single sample of zeros,
whatever the number of features: that is the head's only extra cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from avalanche.models.dynamic_modules import MultiTaskModule
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from avalanche_ext.models.recording import select_layers

__all__ = ["NetworkSplit", "as_written"]


class _ReachedError(Exception):
    """The pass has come to the layer."""


class NetworkSplit:
    """A network, cut behind a layer or in front of it.

    Hooks stand only during a pass, so copies and pickles of the network never carry one.

    Args:
        model: The network; inside ``torch.compile`` or ``DistributedDataParallel`` the bare one.
        layer: Name of the layer.
        side: Cut at its ``"output"`` or at its ``"input"``.

    Attributes:
        outputs: Numbers per sample of the network's output; known after ``check``.

    Raises:
        ValueError: If the network has no such layer; near matches are listed.
    """

    def __init__(self, model: nn.Module, layer: str, side: str = "output") -> None:
        taps, _ = select_layers(model, [layer])
        if len(taps) != 1:
            raise ValueError(
                f"{layer!r} names {len(taps)} layers of {type(model).__name__}: "
                f"{[name for name, _ in taps][:8]}. A network is cut at one of them."
            )
        self.model = model
        self.layer = taps[0][0]
        self.side = side
        self.outputs = 0

    # passes ---------------------------------------------------------------------------------

    def features(self, x: Tensor, task: int = 0) -> Tensor:
        """What the encoder makes of ``x``; the head does not run.

        Args:
            x: Inputs.
            task: Task label, for a network with one head per task.

        Raises:
            ValueError: If the pass ends without a tensor there.
        """
        found: list[Any] = []

        def stop(value: Any) -> None:
            found.append(value)
            raise _ReachedError

        with self._hook(stop), as_written(self.model), suppress(_ReachedError):
            self._call(x, task)
        value = found[0] if found else None
        if not isinstance(value, Tensor) or value.shape[:1] != x.shape[:1]:
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise ValueError(
                f"layer {self.layer!r} gives {got} for a batch of {len(x)} samples; cut the "
                f"network at a layer that is called, with one row per sample."
            )
        return value

    @contextmanager
    def replaced(self, features: Tensor) -> Iterator[None]:
        """Inside, the head is given ``features``, whatever the encoder makes of its input."""
        # A layer behind may work in place.
        with self._hook(lambda value: features.clone()), as_written(self.model):
            yield

    def head(self, features: Tensor, x: Tensor, task: int = 0) -> Tensor:
        """What the head makes of features; ``x`` is any batch, of which only the form counts."""
        with self.replaced(features):
            return self._call(torch.zeros_like(x[:1]), task)

    def listen(self, keep: Callable[[Tensor], None]) -> RemovableHandle:
        """Give ``keep`` a copy of what the encoder makes of every batch, until it is removed."""
        return self._register(lambda value: keep(value.clone()))

    # what belongs to the encoder ------------------------------------------------------------

    def encoder_parts(
        self, x: Tensor, task: int = 0
    ) -> tuple[dict[str, nn.Parameter], list[nn.Module]]:
        """What the features depend on: trainable parameters by name, and modules that have run.

        Args:
            x: A few samples.
            task: Task label, for a network with one head per task.
        """
        ran: list[nn.Module] = []
        handles = [
            module.register_forward_hook(lambda m, args, output: ran.append(m))
            for module in self.model.modules()
        ]
        named = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        try:
            with torch.enable_grad():
                u = self.features(x, task)
        finally:
            for handle in handles:
                handle.remove()
        if not named or not u.requires_grad:
            return {}, ran
        slopes = torch.autograd.grad(u.float().sum(), list(named.values()), allow_unused=True)
        used = [name for name, slope in zip(named, slopes, strict=True) if slope is not None]
        return {name: named[name] for name in used}, ran

    @torch.no_grad()
    def check(self, x: Tensor, task: int = 0) -> None:
        """Raise unless the head gives the network's output from the features alone.

        Args:
            x: A few samples, in the modes that the modules have; evaluation mode is meant.
            task: Task label, for a network with one head per task.

        Raises:
            ValueError: If a connection leads past the layer; if the output is not finite.
        """
        whole: Any = self._call(x, task)
        if not bool(torch.isfinite(whole).all()):
            raise ValueError(
                f"the output of {type(self.model).__name__} is not finite: training has diverged. "
                f"Lower the learning rate."
            )
        try:
            alone: Any = self.head(self.features(x, task), x, task)
            same = alone.shape == whole.shape and torch.allclose(alone, whole, 1e-3, 1e-4)
        except (RuntimeError, IndexError):
            same = False  # what leads past the layer has one row, the features have several
        self.outputs = int(whole.shape[-1])
        if not same:
            raise ValueError(
                f"what stands behind layer {self.layer!r} of {type(self.model).__name__} does not "
                f"depend on its output alone: a connection leads past it, or it is called several "
                f"times. Cut the network at the end of a block."
            )

    # parts ----------------------------------------------------------------------------------

    def _call(self, x: Tensor, task: int) -> Any:
        return self.model(x, task) if isinstance(self.model, MultiTaskModule) else self.model(x)

    @contextmanager
    def _hook(self, change: Callable[[Any], Any]) -> Iterator[None]:
        handle = self._register(change)
        try:
            yield
        finally:
            handle.remove()

    def _register(self, change: Callable[[Any], Any]) -> RemovableHandle:
        """Let ``change`` see what passes the cut, and replace it unless it returns ``None``."""
        module = self.model.get_submodule(self.layer)
        if self.side == "output":
            return module.register_forward_hook(lambda m, args, output: change(output))

        def on_input(m: nn.Module, args: tuple[Any, ...]) -> Any:
            value = change(args[0])
            return None if value is None else (value, *args[1:])

        return module.register_forward_pre_hook(on_input)


@contextmanager
def as_written(model: nn.Module) -> Iterator[None]:
    """Modules that were compiled in place run uncompiled: a pass that stops is no graph."""
    compiled = {m: m._compiled_call_impl for m in model.modules() if m._compiled_call_impl}
    for module in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, call in compiled.items():
            module._compiled_call_impl = call
