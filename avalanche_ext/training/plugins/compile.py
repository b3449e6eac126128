"""Compile the model once, and keep the compiled code while classes arrive.

Purpose: ``torch.compile`` without a new compilation at every experience. What would cause one is
taken away: the head that grows gets a fixed size, the size of the batch is a variable of the
compiled code, and hooks are part of what the code is chosen by.

Decisions and limits:
    1. ``IncrementalClassifier`` modules become ``FixedSizeClassifier(max_classes)``, in place and
       under the same parameter names; the optimizer's entries follow. Losses, gradients and
       predictions stay those of the growing head, whose restart of the optimizer's state at each
       growth is copied. A plain linear head stays as it is. So does a multi-head classifier, which
       adds modules: it compiles again for every task.
    2. The model is compiled in place (``nn.Module.compile``): parameter names do not change.
       Copies and pickles of a module leave the compiled call behind, so teachers run uncompiled
       and a resumed run compiles again. The model stays compiled after training.
    3. One compilation per way the model is called: training; evaluation; each of them once more
       for a batch of exactly one sample (torch specialises sizes 0 and 1, so set ``eval_mb_size``,
       which is 1 by default), for a forward pass of another plugin in another mode (EWC's
       importances: evaluation mode with gradients) or with other hooks or autocast (GEM's
       reference gradients beside DRL or a precision plugin).
    4. Hooks (activation recording) are traced into the compiled code. By default torch does not
       notice a hook that was attached after compilation; here every call guards on them, so the
       code with hooks serves training and the code without serves evaluation, each compiled once.
    5. Compiled code is kept apart per model where torch can do that (``isolate_recompiles``);
       elsewhere all models of a process share torch's limit of 8 compilations.
    6. ``mode="reduce-overhead"`` reuses output memory between calls: not for methods that make
       several forward passes per step.
    7. Modules that another method adds or replaces in mid-stream are compiled when they come.
    8. Of a model with ``parts_to_compile()`` these parts are compiled, one by one, as each
       experience begins. ``ExpandableNet`` names the extractor that is trained.

Cost: the compilations, seconds to minutes each with inductor; about 20 microseconds per call; the
head's unused rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from avalanche.models import IncrementalClassifier, MultiHeadClassifier
from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor, nn

from avalanche_ext.models.heads import FixedSizeClassifier
from avalanche_ext.training.checks import check_count

__all__ = ["CompilePlugin"]


class CompilePlugin(SupervisedPlugin, supports_distributed=True):
    """Compile ``strategy.model`` in place, with a head that never changes its shape.

    Args:
        max_classes: Number of classes of the whole stream, test classes included; needed where the
            model has an ``IncrementalClassifier``.
        backend: A name in ``torch._dynamo.list_backends(None)``, or a function
            ``f(graph_module, example_inputs) -> callable`` (of a module, if the run is pickled).
        mode: A mode of inductor, such as ``"max-autotune-no-cudagraphs"``.

    Raises:
        ValueError: For a bad argument; at the first experience, for a growing head without
            ``max_classes``, a multi-head classifier with it, or a model that is compiled already.
    """

    def __init__(
        self,
        max_classes: int | None = None,
        *,
        backend: str | Callable[..., Any] = "inductor",
        mode: str | None = None,
    ) -> None:
        super().__init__()
        check_count("CompilePlugin", max_classes=max_classes)
        _check_backend(backend, mode)
        self.max_classes = max_classes
        self.backend = backend
        self.mode = mode
        self._units: dict[str, int] = {}  # in use when the optimizer last saw the head

    def before_train_dataset_adaptation(self, strategy: Any, **kwargs: Any) -> None:
        """Fix the heads, while adaptation and the optimizer's registration are still to come."""
        self._fix_heads(strategy)

    def before_eval(self, strategy: Any, **kwargs: Any) -> None:
        """Evaluation may come first, and adapts the model too."""
        self._fix_heads(strategy)

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Restart the optimizer's state of heads that have grown, as Avalanche does."""
        for name, module in strategy.model.named_modules():
            if isinstance(module, FixedSizeClassifier):
                units = int(module.units_in_use)
                if self._units.get(name, units) != units:
                    for parameter in module.classifier.parameters():
                        strategy.optimizer.state.pop(parameter, None)
                self._units[name] = units
        self._compile(strategy)

    def before_eval_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Compile, if nothing has been trained yet."""
        self._compile(strategy)

    # parts ----------------------------------------------------------------------------------

    def _fix_heads(self, strategy: Any) -> None:
        model = strategy.model
        multi = [m for m in model.modules() if isinstance(m, MultiHeadClassifier)]
        theirs = {id(child) for m in multi for child in m.modules()}
        growing = {
            name: m
            for name, m in model.named_modules()
            if isinstance(m, IncrementalClassifier) and id(m) not in theirs
        }
        if growing and self.max_classes is None:
            raise ValueError(
                f"CompilePlugin needs max_classes: {sorted(growing)} of {type(model).__name__} "
                f"grows with the classes (IncrementalClassifier), and each new shape would be "
                f"compiled again. Pass the number of classes of the whole stream."
            )
        if multi and not growing and self.max_classes is not None:
            raise ValueError(
                f"CompilePlugin got max_classes={self.max_classes}, but a MultiHeadClassifier "
                f"cannot be given a fixed size: it adds a head per task. Leave max_classes out."
            )
        for name, head in growing.items():
            fixed = FixedSizeClassifier.from_incremental(head, self.max_classes or 0)
            _follow(strategy, name, head, fixed)
            _replace(strategy, head, fixed)

    def _compile(self, strategy: Any) -> None:
        parts = getattr(strategy.model, "parts_to_compile", lambda: [strategy.model])
        for module in parts():
            self._compile_module(module)

    def _compile_module(self, model: nn.Module) -> None:
        call = getattr(model, "_compiled_call_impl", None)
        if isinstance(call, _CompiledCall) and call.settings == (self.backend, self.mode):
            return
        if hasattr(model, "_orig_mod") or not (call is None or isinstance(call, _CompiledCall)):
            raise ValueError(
                f"{type(model).__name__} is compiled already. Give the strategy the plain model; "
                f"CompilePlugin compiles it."
            )
        options: dict[str, Any] = {"backend": self.backend, "mode": self.mode}
        if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
            options["isolate_recompiles"] = True
        model.compile(**options)
        model._compiled_call_impl = _CompiledCall(
            model._compiled_call_impl, (self.backend, self.mode)
        )


class _CompiledCall:
    """Call the compiled model with a batch of any size, and with the hooks it has now."""

    def __init__(self, compiled: Any, settings: tuple[Any, Any]) -> None:
        self.compiled = compiled
        self.settings = settings

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from torch import _dynamo

        for value in args:
            if isinstance(value, Tensor) and value.ndim:
                _dynamo.maybe_mark_dynamic(value, 0)
        with _dynamo.config.patch(skip_nnmodule_hook_guards=False):
            return self.compiled(*args, **kwargs)


def _follow(strategy: Any, name: str, head: nn.Module, fixed: nn.Module) -> None:
    """Put the new head's parameters where the optimizer and Avalanche hold the old ones."""
    named = dict(fixed.named_parameters())
    new = {id(old): named[suffix] for suffix, old in head.named_parameters()}
    optimizer = strategy.optimizer
    for group in optimizer.param_groups:
        for index, parameter in enumerate(group["params"]):
            if id(parameter) in new:
                optimizer.state.pop(parameter, None)
                group["params"][index] = new[id(parameter)]
    if strategy.optimized_param_id is not None:
        prefix = f"{name}." if name else ""
        strategy.optimized_param_id.update({prefix + suffix: p for suffix, p in named.items()})


def _replace(strategy: Any, head: nn.Module, fixed: nn.Module) -> None:
    """Put the new head wherever the model has the old one."""
    if strategy.model is head:
        strategy.model = fixed
        return
    for module in list(strategy.model.modules()):
        for name, child in list(module.named_children()):
            if child is head:
                setattr(module, name, fixed)


def _check_backend(backend: Any, mode: Any) -> None:
    if callable(backend):
        known = True
    else:
        from torch import _dynamo

        known = backend in _dynamo.list_backends(None)
    if not known:
        raise ValueError(
            f"CompilePlugin expects a backend of torch.compile or a function; got {backend!r}. "
            f"There are {_dynamo.list_backends()}, and 'eager' and 'aot_eager' for debugging."
        )
    if mode is not None:
        from torch._inductor import list_mode_options

        if backend != "inductor" or mode not in list_mode_options():
            raise ValueError(
                f"CompilePlugin expects mode=None or, with backend='inductor', one of "
                f"{sorted(list_mode_options())}; got mode={mode!r} with backend={backend!r}."
            )
