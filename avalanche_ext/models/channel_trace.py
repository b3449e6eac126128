"""Follow the channels of a network through its traced graph.

``find_channel_groups`` is the entrance; here is how each operation acts on channels.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import torch
from torch import fx, nn
from torch.fx.proxy import TraceError
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from avalanche_ext.models.modes import evaluating

__all__ = ["ChannelTrace", "TracedLayer", "trace_channels"]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
# A closed channel is 0 everywhere and has to stay so: these map 0 to 0, channel by channel.
PASSING = (
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.ReLU, nn.ReLU6,
    nn.LeakyReLU, nn.RReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish,
    nn.Tanh, nn.Softsign, nn.Tanhshrink, nn.Softshrink, nn.Hardshrink,
    nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d,
    nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d,
)  # fmt: skip
GLOBAL_POOLS = (
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
)  # fmt: skip
PASSING_FUNCTIONS = {
    F.relu, F.relu_, F.relu6, F.leaky_relu, F.elu, F.selu, F.celu, F.gelu, F.silu, F.mish,
    F.hardswish, F.tanh, F.softsign, F.dropout, F.dropout1d, F.dropout2d, F.dropout3d,
    F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.max_pool1d, F.max_pool2d, F.max_pool3d,
    torch.relu, torch.tanh, torch.dropout,
}  # fmt: skip
PASSING_METHODS = {"relu", "relu_", "tanh", "contiguous", "clone", "detach", "float"}
GLOBAL_POOL_FUNCTIONS = {
    F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d,
    F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d,
}  # fmt: skip
SUMS = {operator.add, operator.iadd, torch.add, operator.sub, operator.isub, torch.sub}


class _Channels(NamedTuple):
    """Where the channels of a tensor come from, and how it holds them."""

    origin: int
    form: Literal["input", "map", "rows"]  # not yet known, (B, C, ...), (B, C * pixels)
    pixels: int | None  # numbers per channel; None where only the image's size would tell


class TracedLayer(NamedTuple):
    """A layer, and the origins of the channels that it reads and writes."""

    name: str
    kind: Literal["conv", "depthwise", "linear", "norm"]
    reads: int
    writes: int
    channels_in: int
    channels_out: int
    area: int
    pixels: int
    gated: bool
    folds_into: str | None


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _BatchNorm) or super().is_leaf_module(m, module_qualified_name)


def trace_channels(network: nn.Module, *, prune_output: bool) -> ChannelTrace:
    """Trace a network in evaluation mode (its modes are put back) and follow its channels."""
    try:
        with evaluating(network):
            graph = _Tracer().trace(network)
    except (TypeError, TraceError) as error:
        raise ValueError(
            f"the channels of {type(network).__name__} cannot be followed: torch.fx does not trace "
            f"it ({error}). Use a network whose forward does not branch on its input, or no masks."
        ) from error
    return ChannelTrace(network, graph, prune_output=prune_output)


class ChannelTrace:
    """Union-find over the channels that a graph creates.

    Args:
        network: The network.
        graph: Its traced graph.
        prune_output: Whether the output's channels may go.
    """

    def __init__(self, network: nn.Module, graph: fx.Graph, *, prune_output: bool) -> None:
        self.modules = dict(network.named_modules())
        self.prune_output = prune_output
        self.parent: list[int] = []
        self.names: list[str] = []
        self.counts: list[int | None] = []
        self.reasons: dict[int, str] = {}
        self.summed: list[int] = []
        self.layers: list[TracedLayer] = []
        self.output: int | None = None
        values: dict[fx.Node, _Channels | None] = {}
        for node in graph.nodes:
            values[node] = self._follow(node, values)

    # union-find -----------------------------------------------------------------------------

    def _new(self, name: str, count: int | None) -> int:
        self.parent.append(len(self.parent))
        self.names.append(name)
        self.counts.append(count)
        return self.parent[-1]

    def root(self, origin: int) -> int:
        """The origin that stands for a set of joined channels."""
        while self.parent[origin] != origin:
            origin = self.parent[origin]
        return origin

    def _join(self, a: int, b: int) -> int:
        first, second = sorted((self.root(a), self.root(b)))
        if first != second:
            self.parent[second] = first
            if self.counts[first] is None:
                self.counts[first] = self.counts[second]
            if second in self.reasons:
                self.reasons.setdefault(first, self.reasons[second])
        return first

    def _pin(self, origin: int, reason: str) -> None:
        self.reasons.setdefault(self.root(origin), reason)

    def _is_pinned(self, origin: int) -> bool:
        return self.root(origin) in self.reasons

    def pin_sums(self) -> None:
        """Keep the channels of every residual stage."""
        for origin in self.summed:
            self._pin(origin, "added to others")

    # operations -----------------------------------------------------------------------------

    def _follow(self, node: fx.Node, values: dict[fx.Node, _Channels | None]) -> _Channels | None:
        read = [values[n] for n in node.all_input_nodes]
        channels = [c for c in read if c is not None]
        if node.op == "placeholder":
            if self.parent:
                return None  # a further input, of which no channels are known
            origin = self._new("input", None)
            self._pin(origin, "the input")
            return _Channels(origin, "input", None)
        if node.op == "output":
            self._finish(node, channels)
            return None
        if not channels:
            return None  # sizes and constants; harmless until they meet channels
        if node.op == "call_module":
            return self._module(node, self.modules[str(node.target)], channels)
        if node.op == "call_function":
            return self._function(node, channels)
        return self._method(node, channels)

    def _module(self, node: fx.Node, module: nn.Module, read: list[_Channels]) -> _Channels:
        x = read[0]
        if type(module) in CONVOLUTIONS:
            return self._convolution(node, module, x)
        if type(module) is nn.Linear:
            return self._linear(node, module, x)
        if isinstance(module, _BatchNorm):
            return self._norm(node, module, x)
        if isinstance(module, GLOBAL_POOLS):
            return self._pool(node, x, module.output_size)
        if isinstance(module, nn.Flatten):
            return self._flatten(node, x, module.start_dim, module.end_dim)
        if type(module) in PASSING or (isinstance(module, nn.PReLU) and module.num_parameters == 1):
            return x
        raise self._refuse(node, type(module).__name__)

    def _function(self, node: fx.Node, read: list[_Channels]) -> _Channels | None:
        target, x = node.target, read[0]
        if target in SUMS and len(node.args) >= 2:
            return self._sum(node, read)
        if target in PASSING_FUNCTIONS:
            return x
        if target in GLOBAL_POOL_FUNCTIONS:
            return self._pool(node, x, _argument(node, 1, "output_size", None))
        if target is torch.flatten:
            return self._flatten(node, x, *_flatten_range(node))
        if target is torch.mean:
            return self._mean(node, x)
        if target in (operator.mul, operator.truediv) and _by_number(node):
            return x
        if target is getattr and _argument(node, 1, "name", "") in ("shape", "ndim"):
            return None
        raise self._refuse(node, getattr(target, "__name__", str(target)))

    def _method(self, node: fx.Node, read: list[_Channels]) -> _Channels | None:
        target, x = str(node.target), read[0]
        if target in ("size", "dim"):
            return None
        if target in PASSING_METHODS:
            return x
        if target in ("add", "add_", "sub", "sub_"):
            return self._sum(node, read)
        if target == "flatten":
            return self._flatten(node, x, *_flatten_range(node))
        if target == "mean":
            return self._mean(node, x)
        shape = node.args[1:] if len(node.args) > 2 else _argument(node, 1, "shape", ())
        if target in ("view", "reshape") and _is_rows(shape):
            return self._flatten(node, x, 1, -1)
        raise self._refuse(node, f"Tensor.{target}")

    def _convolution(self, node: fx.Node, module: Any, x: _Channels) -> _Channels:
        if x.form == "rows":
            raise self._refuse(node, "a convolution of flattened maps")
        n_in, n_out, groups = module.in_channels, module.out_channels, module.groups
        area = math.prod(module.kernel_size)
        self._check_count(node, x, n_in)
        if groups > 1 and groups == n_in == n_out:
            self._layer(node, "depthwise", x.origin, x.origin, n_in, n_out, area)
            return _Channels(x.origin, "map", None)
        origin = self._new(str(node.target), n_out)
        if groups > 1:
            self._pin(x.origin, f"read by the grouped convolution {node.target}")
            self._pin(origin, f"written by the grouped convolution {node.target}")
        # A grouped convolution reads 1 / groups of the channels for each that it writes.
        self._layer(node, "conv", x.origin, origin, n_in // groups, n_out, area)
        return _Channels(origin, "map", None)

    def _linear(self, node: fx.Node, module: nn.Linear, x: _Channels) -> _Channels:
        if x.form == "map":
            raise self._refuse(node, "a linear layer on maps that are not flattened")
        pixels = self._check_count(node, x, module.in_features)
        origin = self._new(str(node.target), module.out_features)
        n_in = module.in_features // pixels
        self._layer(node, "linear", x.origin, origin, n_in, module.out_features, 1, pixels)
        return _Channels(origin, "rows", 1)

    def _norm(self, node: fx.Node, module: _BatchNorm, x: _Channels) -> _Channels:
        own = (getattr(module, "drop", None), getattr(module, "act", None))  # timm joins them
        if type(module) not in NORMS and any(type(m) not in PASSING for m in own):
            raise self._refuse(node, type(module).__name__)
        pixels = self._check_count(node, x, module.num_features)
        if not self._is_pinned(x.origin) and not module.affine:
            self._pin(x.origin, f"normalised by {node.target}, which has no weight to mask")
        before = node.all_input_nodes[0]
        makers = {layer.name for layer in self.layers if layer.kind != "norm"}
        follows = before.op == "call_module" and before.target in makers
        folds = str(before.target) if follows and len(before.users) == 1 else None
        count = module.num_features // pixels
        self._layer(node, "norm", x.origin, x.origin, count, count, 1, pixels, folds)
        return x

    def _sum(self, node: fx.Node, read: list[_Channels]) -> _Channels:
        operands = [a for a in node.args[:2] if isinstance(a, fx.Node)]
        if len(operands) < 2 or (len(read) < 2 and operands[0] is not operands[1]):
            raise self._refuse(node, "a sum with what is not a channel")
        first, second = read[0], read[-1]
        sizes = [self.counts[self.root(c.origin)] for c in (first, second)]
        if first.form != second.form or (None not in sizes and sizes[0] != sizes[1]):
            raise self._refuse(node, f"a sum of {sizes[0]} and {sizes[1]} channels")
        origin = self._join(first.origin, second.origin)
        self.summed.append(origin)
        return _Channels(origin, first.form, first.pixels)

    def _pool(self, node: fx.Node, x: _Channels, size: Any) -> _Channels:
        sizes = size if isinstance(size, Iterable) else [size]
        numbers = [n for n in sizes if isinstance(n, int)]
        known = math.prod(numbers) if numbers and numbers == list(sizes) else None
        if not isinstance(size, Iterable) and isinstance(size, int):
            known = 1 if size == 1 else None  # how many axes it has is not known here
        return _Channels(x.origin, "map" if x.form == "input" else x.form, known)

    def _mean(self, node: fx.Node, x: _Channels) -> _Channels:
        axes = _argument(node, 1, "dim", None)
        axes = [axes] if isinstance(axes, int) else list(axes or ())
        if sorted(axes) not in ([-2, -1], [2, 3], [2], [-1], [2, 3, 4]) or x.form == "rows":
            raise self._refuse(node, f"a mean over the axes {axes}")
        kept = _argument(node, 2, "keepdim", False)
        return _Channels(x.origin, "map" if kept else "rows", 1)

    def _flatten(self, node: fx.Node, x: _Channels, start: Any, end: Any) -> _Channels:
        if start != 1 or end != -1:
            raise self._refuse(node, f"flattening of the axes {start} to {end}")
        return x if x.form == "input" else _Channels(x.origin, "rows", x.pixels)

    # records --------------------------------------------------------------------------------

    def _check_count(self, node: fx.Node, x: _Channels, wanted: int) -> int:
        """How many of the numbers that a layer reads belong to one channel."""
        root = self.root(x.origin)
        if self.counts[root] is None:
            self.counts[root] = wanted
        count = self.counts[root]
        if root == 0 and self.names[root] == "input" and x.form == "input":
            return 1
        if not count or wanted % count:
            raise self._refuse(node, f"a layer of width {wanted} on {count} channels")
        return wanted // count

    def _layer(
        self, node: fx.Node, kind: Any, reads: int, writes: int, n_in: int, n_out: int, area: int,
        pixels: int = 1, folds_into: str | None = None,
    ) -> None:  # fmt: skip
        name = str(node.target)
        if any(layer.name == name for layer in self.layers):
            raise self._refuse(node, "a layer that is used twice")
        # Batch norm undoes a scale in front of it, so the mask goes behind it; what something
        # else reads, too, is masked where it is made.
        into_norms = all(
            user.op == "call_module" and isinstance(self.modules[str(user.target)], _BatchNorm)
            for user in node.users
        )
        gated = kind == "norm" or not into_norms
        self.layers.append(
            TracedLayer(name, kind, reads, writes, n_in, n_out, area, pixels, gated, folds_into)
        )

    def _finish(self, node: fx.Node, read: list[_Channels]) -> None:
        if len(read) != 1 or not isinstance(node.args[0], fx.Node):
            raise self._refuse(node, "anything but one tensor as output")
        self.output = read[0].origin
        if not self.prune_output:
            self._pin(self.output, "the output")
        elif read[0].form == "rows" and read[0].pixels != 1 and not self._is_pinned(self.output):
            raise self._refuse(
                node, "features that are flattened maps (end the network with global pooling)"
            )

    def _refuse(self, node: fx.Node, what: str) -> ValueError:
        stack = node.meta.get("nn_module_stack") or {}
        where = next(reversed(stack.values()))[0] if stack else ""
        if isinstance(where, str) and where:
            where = f" in module {where!r}"
        return ValueError(
            f"channels cannot be followed through node {node.name!r}{where or ''}: {what}. Masks "
            f"and pruning need a network of convolutions, linear layers, batch norms, pooling, "
            f"flattening, sums and activations that map 0 to 0; use another backbone or no masks."
        )

    def roots(self) -> list[int]:
        """One origin of each set of channels, in the order of execution."""
        return [origin for origin, parent in enumerate(self.parent) if origin == parent]


def _argument(node: fx.Node, place: int, name: str, default: Any) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def _flatten_range(node: fx.Node) -> tuple[Any, Any]:
    return _argument(node, 1, "start_dim", 0), _argument(node, 2, "end_dim", -1)


def _by_number(node: fx.Node) -> bool:
    return len(node.args) == 2 and isinstance(node.args[1], int | float)


def _is_rows(shape: Any) -> bool:
    return isinstance(shape, tuple | list) and len(shape) == 2 and shape[1] == -1
