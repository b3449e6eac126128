"""The state of a strategy as tensors and plain values, and back.

A strategy is a graph of objects: model, optimizer, plugins, memories, metrics. ``capture`` writes
down what their attributes hold, ``restore`` puts it into a strategy that was built in the same way:
objects that exist are filled in place, so that references between them stay right; others are made
without running their code, and only if their class is one of torch's layers, Avalanche's, this
package's, or occurs in the strategy that is being filled. So a file can set values, but not run
code. Data sets of the benchmark are written as numbers of their samples.

What cannot be written so (an iterator, an object of a foreign class that a plugin keeps) raises
``UnsupportedStateError``; such a plugin can be pickled by the caller.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
import importlib
import io
import pathlib
import threading
import types
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from avalanche.benchmarks.scenarios.generic_scenario import CLExperience
from avalanche.benchmarks.utils.data import AvalancheDataset
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from avalanche_ext.experiments.data_index import DataIndex, UnsupportedStateError

__all__ = ["capture", "restore"]

_TRUSTED = ("avalanche_ext.", "avalanche.", "torch.nn.", "torch.optim.", "torch.amp.")
# Kinds that are put into what exists, where it fits.
_FILLED = ("object", "list", "deque", "dict", "ordered", "default", "parameter", "generator")
_PLAIN = (type(None), bool, int, float, str, Tensor)
# Belongs to the process, not to the run: what the strategy has stays.
_KEPT = (
    types.FunctionType,
    types.BuiltinFunctionType,
    types.ModuleType,
    type,
    io.IOBase,
    SummaryWriter,
    tqdm,
    type(threading.Lock()),
)


def capture(
    root: Any, data: DataIndex, *, leave_out: Iterable[str] = (), keep: Iterable[Any] = ()
) -> Any:
    """What the attributes of ``root`` hold, as tensors and plain values.

    Args:
        root: A strategy, or any object that is a graph of the kinds above.
        data: Names for the data sets.
        leave_out: Attributes of ``root`` itself that are not written.
        keep: Objects that are not written; on the way back they stay what they are.
    """
    return _Writer(data, {id(value) for value in keep}).attributes(root, set(leave_out))


def restore(root: Any, state: Any, data: DataIndex) -> None:
    """Put ``state`` into ``root``, which was built in the same way as the captured one.

    Raises:
        UnsupportedStateError: If the state names a class that is neither trusted nor in ``root``.
    """
    _Reader(data, _classes_in(root)).fill(root, state)


class _Writer:
    def __init__(self, data: DataIndex, keep: set[int]) -> None:
        self.data = data
        self.keep = keep
        self.seen: dict[int, int] = {}
        self.alive: list[Any] = []  # so that no id is used twice

    def attributes(self, value: Any, leave_out: set[str]) -> dict[str, Any]:
        number = self._number(value)
        found = {k: v for k, v in _state_of(value).items() if k not in leave_out}
        return self._object(value, number, found)

    def write(self, value: Any, path: str) -> Any:
        if isinstance(value, nn.Parameter) or not isinstance(value, _PLAIN):
            return self._write_tagged(value, path)
        if isinstance(value, Tensor):
            if id(value) in self.seen:
                return {"!": "same", "n": self.seen[id(value)]}
            number = self._number(value)
            return {"!": "tensor", "n": number, "v": value.detach().clone()}
        return value

    def _number(self, value: Any) -> int:
        self.alive.append(value)
        return self.seen.setdefault(id(value), len(self.seen))

    def _object(self, value: Any, number: int, state: dict[str, Any]) -> dict[str, Any]:
        name = _name(type(value))
        return {
            "!": "object", "n": number, "class": name,
            "v": {str(k): self.write(v, f"{name}.{k}") for k, v in state.items()},
        }  # fmt: skip

    def _write_tagged(self, value: Any, path: str) -> Any:
        if isinstance(value, _KEPT) or id(value) in self.keep:
            named = isinstance(value, types.FunctionType | type)
            return {"!": "keep", "name": _name(value) if named else None}
        if isinstance(value, types.MethodType):
            return {"!": "method", "of": self.write(value.__self__, path), "v": value.__name__}
        if id(value) in self.seen:
            return {"!": "same", "n": self.seen[id(value)]}
        number = self._number(value)
        for kind, (test, encode) in _ENCODERS.items():
            if test(value):
                return {"!": kind, "n": number, "v": encode(self, value, path)}
        if not hasattr(value, "__dict__"):
            raise UnsupportedStateError(
                f"{path} is a {_name(type(value))}, which cannot be written as tensors and values"
            )
        return self._object(value, number, _state_of(value))

    def sequence(self, values: Iterable[Any], path: str) -> list[Any]:
        return [self.write(v, f"{path}[{k}]") for k, v in enumerate(values)]

    def pairs(self, mapping: Any, path: str) -> list[Any]:
        return [
            [self.write(k, path), self.write(v, f"{path}[{k!r:.40}]")] for k, v in mapping.items()
        ]


_Encoder = tuple[Callable[[Any], bool], Callable[[_Writer, Any, str], Any]]
_ENCODERS: dict[str, _Encoder] = {
    "parameter": (
        lambda v: isinstance(v, nn.Parameter),
        lambda w, v, p: {"v": v.detach().clone(), "requires_grad": v.requires_grad},
    ),
    "dataset": (
        lambda v: isinstance(v, AvalancheDataset),
        lambda w, v, p: w.data.name(v),
    ),
    "experience": (
        lambda v: isinstance(v, CLExperience),
        lambda w, v, p: [v.origin_stream.name, v.current_experience],
    ),
    "array": (
        lambda v: isinstance(v, np.ndarray | np.generic) and v.dtype != object,
        lambda w, v, p: [torch.from_numpy(np.array(v)), v.dtype.str, isinstance(v, np.generic)],
    ),
    "generator": (lambda v: isinstance(v, torch.Generator), lambda w, v, p: v.get_state()),
    "device": (lambda v: isinstance(v, torch.device), lambda w, v, p: str(v)),
    "dtype": (lambda v: isinstance(v, torch.dtype), lambda w, v, p: str(v).rpartition(".")[2]),
    "size": (lambda v: isinstance(v, torch.Size), lambda w, v, p: list(v)),
    "path": (lambda v: isinstance(v, pathlib.PurePath), lambda w, v, p: str(v)),
    "enum": (
        lambda v: isinstance(v, enum.Enum),
        lambda w, v, p: [_name(type(v)), v.name],
    ),
    "slice": (lambda v: isinstance(v, slice), lambda w, v, p: [v.start, v.stop, v.step]),
    "list": (lambda v: type(v) is list, lambda w, v, p: w.sequence(v, p)),
    "tuple": (lambda v: type(v) is tuple, lambda w, v, p: w.sequence(v, p)),
    "set": (lambda v: type(v) is set, lambda w, v, p: w.sequence(sorted(v, key=repr), p)),
    "deque": (lambda v: type(v) is collections.deque, lambda w, v, p: w.sequence(v, p)),
    "ordered": (lambda v: type(v) is collections.OrderedDict, lambda w, v, p: w.pairs(v, p)),
    "default": (lambda v: type(v) is collections.defaultdict, lambda w, v, p: w.pairs(v, p)),
    "dict": (lambda v: type(v) is dict, lambda w, v, p: w.pairs(v, p)),
}


class _Reader:
    """Turns what ``_Writer`` wrote into objects, with what exists already as a pattern."""

    def __init__(self, data: DataIndex, classes: dict[str, type]) -> None:
        self.data = data
        self.classes = classes
        self.made: dict[int, Any] = {}
        self.taken: dict[int, Any] = {}  # objects that have been filled

    def fill(self, value: Any, state: dict[str, Any]) -> None:
        self.made[state["n"]] = value
        old = vars(value)
        new = {k: self.read(v, old.get(k)) for k, v in state["v"].items()}
        if isinstance(value, torch.optim.Optimizer):
            value.__setstate__(new)
            return
        old.update(new)  # what a __getstate__ leaves out stays

    def read(self, state: Any, old: Any) -> Any:
        if not isinstance(state, dict):
            return state
        kind = state["!"]
        if kind in _FILLED:
            old = self._take(old)
        if kind == "keep":
            return old if old is not None or state["name"] is None else self._find(state["name"])
        if kind == "same":
            return self.made[state["n"]]
        if kind == "method":
            return getattr(self.read(state["of"], getattr(old, "__self__", None)), state["v"])
        if kind == "object":
            return self._object(state, old)
        if kind == "tensor":
            value = state["v"]
        elif kind in ("list", "deque", "dict", "ordered", "default"):
            value = self._container(kind, state, old)
        else:
            value = getattr(self, f"_{kind}")(state["v"], old)
        self.made[state["n"]] = value
        return value

    def _take(self, old: Any) -> Any:
        """``old`` as something to fill, unless it has been filled with something else already."""
        if id(old) in self.taken:
            return None
        self.taken[id(old)] = old
        return old

    def _object(self, state: dict[str, Any], old: Any) -> Any:
        value = old
        if _name(type(old)) != state["class"]:
            cls = self._class(state["class"])
            value = object.__new__(cls)
        self.fill(value, state)
        return value

    def _class(self, name: str) -> type:
        found = self.classes[name] if name in self.classes else self._find(name)
        if not isinstance(found, type):
            raise UnsupportedStateError(f"{name} is not a class")
        return found

    def _find(self, name: str) -> Any:
        if not name.startswith(_TRUSTED):
            raise UnsupportedStateError(
                f"the checkpoint refers to {name}, which is not part of this strategy as it was "
                f"built; it is not loaded"
            )
        module, _, qualified = name.partition(":")
        found: Any = importlib.import_module(module)
        for part in qualified.split("."):
            found = getattr(found, part)
        return found

    def _container(self, kind: str, state: dict[str, Any], old: Any) -> Any:
        """Made first and filled after, since what it holds may refer to it."""
        if kind in ("list", "deque"):
            empty: Any = [] if kind == "list" else collections.deque()
            value = old if type(old) is type(empty) else empty
            before = list(value)
            self.made[state["n"]] = value
            value.clear()
            for k, item in enumerate(state["v"]):
                value.append(self.read(item, before[k] if k < len(before) else None))
            return value
        makers = {"dict": dict, "ordered": collections.OrderedDict}
        known = dict(old) if isinstance(old, dict) else {}
        value = makers.get(kind, dict)()
        if kind == "default":
            value = collections.defaultdict(getattr(old, "default_factory", None))
        if isinstance(old, dict) and type(old) is type(value):
            value = old
            value.clear()
        self.made[state["n"]] = value
        for key, item in state["v"]:
            found = self.read(key, None)
            value[found] = self.read(item, known.get(found))
        return value

    def _parameter(self, state: dict[str, Any], old: Any) -> nn.Parameter:
        if isinstance(old, nn.Parameter) and old.shape == state["v"].shape:
            with torch.no_grad():
                old.copy_(state["v"])
            old.requires_grad_(state["requires_grad"])
            return old
        device = old.device if isinstance(old, Tensor) else state["v"].device
        return nn.Parameter(state["v"].to(device), state["requires_grad"])

    def _dataset(self, state: dict[str, Any], old: Any) -> Any:
        return self.data.find(state)

    def _experience(self, state: list[Any], old: Any) -> Any:
        return self.data.benchmark.streams[state[0]][state[1]]

    def _array(self, state: list[Any], old: Any) -> Any:
        array = state[0].numpy().astype(state[1])
        return array[()] if state[2] else array

    def _generator(self, state: Tensor, old: Any) -> torch.Generator:
        generator = old if isinstance(old, torch.Generator) else torch.Generator()
        generator.set_state(state)
        return generator

    def _device(self, state: str, old: Any) -> torch.device:
        return old if isinstance(old, torch.device) else torch.device(state)

    def _dtype(self, state: str, old: Any) -> torch.dtype:
        return getattr(torch, state)

    def _size(self, state: list[int], old: Any) -> torch.Size:
        return torch.Size(state)

    def _path(self, state: str, old: Any) -> Any:
        return old if isinstance(old, pathlib.PurePath) else pathlib.Path(state)

    def _enum(self, state: list[str], old: Any) -> Any:
        return self._class(state[0])[state[1]]  # type: ignore[index]

    def _slice(self, state: list[Any], old: Any) -> slice:
        return slice(*state)

    def _tuple(self, state: list[Any], old: Any) -> tuple[Any, ...]:
        before = old if isinstance(old, tuple) else ()
        return tuple(
            self.read(v, before[k] if k < len(before) else None) for k, v in enumerate(state)
        )

    def _set(self, state: list[Any], old: Any) -> set[Any]:
        return {self.read(v, None) for v in state}


def _state_of(value: Any) -> dict[str, Any]:
    """The attributes to write: ``__getstate__``'s where the class leaves something out."""
    own = getattr(type(value), "__getstate__", None)
    if own is not None and own is not getattr(object, "__getstate__", None):
        found = value.__getstate__()
        if isinstance(found, dict):
            return found
    if dataclasses.is_dataclass(value) and not hasattr(value, "__dict__"):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    return dict(vars(value))


def _name(value: Any) -> str:
    """Module and name of a class or function."""
    return f"{value.__module__}:{value.__qualname__}"


def _classes_in(root: Any) -> dict[str, type]:
    """Classes of the modules and plugins of a strategy."""
    found = [root, *getattr(root, "plugins", ())]
    model = getattr(root, "model", None)
    if isinstance(model, nn.Module):
        found += list(model.modules())
    return {_name(type(item)): type(item) for item in found}
