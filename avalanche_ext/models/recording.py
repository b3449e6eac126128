"""Record what chosen layers put out during one forward pass.

Hooks are attached before a forward pass and removed after it, so that copies, pickles and compiled
versions of the model never carry one.
"""

from __future__ import annotations

import difflib
import fnmatch
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

__all__ = [
    "ActivationRecorder",
    "LayerSpec",
    "Tap",
    "identity",
    "mask_value",
    "select_layers",
    "unmasked",
]

LayerSpec = (
    str | type[nn.Module] | Sequence[str | type[nn.Module]] | Callable[[str, nn.Module], bool]
)

# (module name, record its "input" or its "output")
Tap = tuple[str, str]

_ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU,
    nn.Mish, nn.Hardswish, nn.Hardtanh, nn.Softplus, nn.Tanh, nn.Sigmoid,
)  # fmt: skip
_PRESETS = ("auto", "logits", "activations", "stages", "leaves")


def select_layers(model: nn.Module, layers: LayerSpec = "auto") -> tuple[list[Tap], bool]:
    """Find the layers of ``model`` that ``layers`` names.

    Args:
        model: The network.
        layers: One of

            * ``"auto"``: for a residual network with ``layer4`` and ``fc`` the map of the last
              stage, the pooled vector and the logits; for any other timm model the classifier's
              input and the logits; otherwise every activation module (ReLU, GELU, ...) and the
              logits;
            * ``"logits"``: the model's output alone;
            * ``"activations"``: every activation module, and the logits;
            * ``"stages"``: the stages of a residual network or of a timm model, and the logits;
            * ``"leaves"``: every module without children;
            * a module name, a pattern such as ``"features.*"``, a module type, or a list of these;
            * a predicate ``f(name, module) -> bool``.

    Returns:
        The taps ``(module name, "input" or "output")``, and whether the logits belong to the
        selection; the caller has the logits anyway, so no hook is spent on them.

    Raises:
        ValueError: If something named matches no module; near matches are listed.
    """
    model = _bare(model)
    modules = {name: m for name, m in model.named_modules() if name}
    if isinstance(layers, str) and layers in _PRESETS:
        return _preset(model, modules, layers)
    if callable(layers) and not isinstance(layers, type):
        found = [name for name, m in modules.items() if layers(name, m)]
        if not found:
            raise ValueError(f"layers={layers!r} accepts no module of {type(model).__name__}.")
        return [(name, "output") for name in found], False
    items = [layers] if isinstance(layers, str | type) else list(layers)
    if not items:
        raise ValueError("layers is empty; name at least one layer, or use 'auto' or 'logits'.")
    found, logits = [], False
    for item in items:
        if item == "logits" and "logits" not in modules:
            logits = True
            continue
        matches = _matches(modules, item)
        if not matches:
            raise ValueError(_unknown(model, modules, item))
        found += [name for name in matches if name not in found]
    return [(name, "output") for name in found], logits


def identity(tensor: Tensor) -> tuple[int, int, int]:
    """Equal for two outputs that are one tensor up to a flatten: memory, size and rows agree."""
    return tensor.data_ptr(), tensor.numel(), len(tensor) if tensor.ndim else 0


def _bare(model: nn.Module) -> nn.Module:
    """The network inside ``torch.compile`` and ``DistributedDataParallel``: its own names count."""
    model = getattr(model, "_orig_mod", model)
    return model.module if isinstance(model, DistributedDataParallel) else model


def _matches(modules: dict[str, nn.Module], item: str | type[nn.Module]) -> list[str]:
    if isinstance(item, type):
        return [name for name, m in modules.items() if isinstance(m, item)]
    if item in modules:
        return [item]
    return [name for name in modules if fnmatch.fnmatchcase(name, item)]


def _unknown(model: nn.Module, modules: dict[str, nn.Module], item: object) -> str:
    if isinstance(item, type):
        types = sorted({type(m).__name__ for m in modules.values()})
        return f"{type(model).__name__} has no module of type {item.__name__}; it has {types}."
    near = difflib.get_close_matches(str(item), [*modules, *_PRESETS], n=3, cutoff=0.4)
    hint = f"Close: {near}." if near else f"It has {list(modules)[:12]}."
    return (
        f"no module of {type(model).__name__} is named or matches {item!r}. {hint} Names are "
        f"those of model.named_modules(); the presets are {list(_PRESETS)}."
    )


def _preset(model: nn.Module, modules: dict[str, nn.Module], name: str) -> tuple[list[Tap], bool]:
    if name == "logits":
        return [], True
    if name == "leaves":
        return [(n, "output") for n, m in modules.items() if not any(m.children())], False
    if name == "stages":
        return _stages(model, modules), True
    if name == "auto":
        if "layer4" in modules and "fc" in modules:
            return [("layer4", "output"), ("fc", "input")], True
        if hasattr(model, "get_classifier"):
            classifier = model.get_classifier()  # type: ignore[operator]
            names = [n for n, m in modules.items() if m is classifier]
            return ([(names[0], "input")] if names else []), True
    found = [n for n, m in modules.items() if isinstance(m, _ACTIVATIONS)]
    if not found:
        found = [n for n, m in modules.items() if isinstance(m, nn.Linear | nn.Conv2d)]
        warnings.warn(
            f"{type(model).__name__} has no activation modules (functional activations cannot be "
            f"recorded); using the outputs of its {len(found)} linear and convolution layers. "
            f"Name the layers to be explicit.",
            stacklevel=4,
        )
    return [(n, "output") for n in found], True


def _stages(model: nn.Module, modules: dict[str, nn.Module]) -> list[Tap]:
    info = getattr(model, "feature_info", None)
    names = [entry["module"] for entry in info] if isinstance(info, list) else []
    names = names or ["maxpool", "layer1", "layer2", "layer3", "layer4"]
    missing = [n for n in names if n not in modules]
    if missing:
        raise ValueError(
            f"layers='stages' needs a residual network (maxpool, layer1..layer4) or a timm model "
            f"with feature_info; {type(model).__name__} lacks {missing}. Name its layers instead."
        )
    return [(n, "output") for n in names]


def mask_value(model: nn.Module) -> float | None:
    """The constant, such as -1000, that a growing or multi-head classifier gives unseen units."""
    values = (getattr(m, "mask_value", None) for m in model.modules())
    return next((v for v in values if v is not None), None)


def unmasked(logits: Tensor, constant: float | None) -> Tensor:
    """Logits with masked units at 0: products with the constant would drown everything else."""
    return logits if constant is None else logits.masked_fill(logits == constant, 0.0)


class ActivationRecorder:
    """Collect the tensors that the chosen layers produce in one forward pass.

    ``attach(model)`` before the forward, ``detach()`` after it, ``pop()`` to take the tensors, in
    the order of the forward pass. A module called several times contributes each time; a tensor
    that several layers share (an in-place ReLU behind a linear layer, a flatten, an identity)
    is returned once.

    Args:
        layers: See ``select_layers``.
    """

    def __init__(self, layers: LayerSpec = "auto") -> None:
        self.layers = layers
        self.silent: list[str] = []  # layers that gave no tensor before the last pop()
        self._names: list[str] = []
        self._handles: list[Any] = []
        self._tensors: list[tuple[str, Tensor]] = []

    def attach(self, model: nn.Module, taps: Sequence[Tap] | None = None) -> None:
        """Start to record; ``taps`` saves looking the layers up again."""
        self.detach()
        self._tensors = []
        if taps is None:
            taps, _ = select_layers(model, self.layers)
        self._names = [name for name, _ in taps]
        bare = _bare(model)
        for name, side in taps:
            module = bare.get_submodule(name)
            if side == "input":
                hook = functools.partial(self._record_input, name)
                self._handles.append(module.register_forward_pre_hook(hook))
            else:
                hook = functools.partial(self._record_output, name)
                self._handles.append(module.register_forward_hook(hook))

    def detach(self) -> None:
        """Stop to record: remove every hook."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def pop(self) -> list[tuple[str, Tensor]]:
        """The tensors recorded since ``attach``, each once, with the name of its layer."""
        tensors, self._tensors = self._tensors, []
        heard = {name for name, _ in tensors}
        self.silent = [name for name in self._names if name not in heard]
        seen: dict[Any, tuple[str, Tensor]] = {}
        for name, tensor in tensors:
            seen.setdefault(identity(tensor), (name, tensor))
        return list(seen.values())

    def _record_input(self, name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if inputs and isinstance(inputs[0], Tensor):
            self._tensors.append((name, inputs[0]))

    def _record_output(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            self._tensors.append((name, output))
