"""Channel groups: which channels of a network live and die together.

The network is traced once, symbolically, and its channels followed from the input to the output.
Channels that are added to each other (a residual stage), or that a depthwise convolution reads and
writes, form one group, which one mask governs. Convolutions and linear layers start new channels;
batch norm, zero-preserving activations, pooling and flattening pass them on.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from avalanche_ext.functional.channel_mask import SparsityTerm
from avalanche_ext.models.channel_trace import ChannelTrace, TracedLayer, trace_channels

__all__ = ["RESIDUALS", "ChannelGroup", "ChannelGroups", "GroupedLayer", "find_channel_groups"]

Residual = Literal["shared", "inner"]
RESIDUALS = ("shared", "inner")


@dataclass(frozen=True)
class ChannelGroup:
    """Channels under one mask: named after the layer that makes them first."""

    name: str
    size: int


@dataclass(frozen=True)
class GroupedLayer:
    """A layer, and the groups whose channels it reads and writes.

    Attributes:
        name: The module's name in the network.
        kind: ``"conv"``, ``"depthwise"``, ``"linear"`` or ``"norm"``.
        reads: Index of the group that it reads; ``None`` where no mask acts.
        writes: Index of the group that it writes; ``None`` where no mask acts.
        channels_in: Channels that it reads.
        channels_out: Channels that it writes.
        area: Weights per pair of channels.
        pixels: Columns per channel, more than 1 behind a flattened map.
        gated: Whether its weight and bias carry the mask of the group that it writes.
        folds_into: For a norm: the layer before it, if nothing else reads that layer.
        is_head: Whether it is a linear layer that makes the network's output, kept whole.
    """

    name: str
    kind: Literal["conv", "depthwise", "linear", "norm"]
    reads: int | None
    writes: int | None
    channels_in: int
    channels_out: int
    area: int
    pixels: int
    gated: bool
    folds_into: str | None
    is_head: bool

    @property
    def has_weights(self) -> bool:
        """Whether it counts in the sparsity loss: convolutions and linear layers but the head."""
        return self.kind != "norm" and not self.is_head


@dataclass(frozen=True)
class ChannelGroups:
    """The groups of a network that may be pruned, and its layers, in the order of execution.

    Attributes:
        groups: One per mask.
        layers: Convolutions, linear layers and batch norms.
        output: Index of the group that the network returns; ``None`` where that is kept whole.
        pinned: Name to reason, for channels that no mask governs.
        residual: As given to ``find_channel_groups``.
        prune_output: As given to ``find_channel_groups``.
    """

    groups: tuple[ChannelGroup, ...]
    layers: tuple[GroupedLayer, ...]
    output: int | None
    pinned: dict[str, str]
    residual: Residual
    prune_output: bool

    @property
    def sizes(self) -> list[int]:
        """Channels of each group."""
        return [group.size for group in self.groups]

    def index(self, name: str) -> int:
        """Index of the group of that name.

        Raises:
            ValueError: If there is none; near matches are listed.
        """
        names = [group.name for group in self.groups]
        if name not in names:
            near = difflib.get_close_matches(name, names, n=4, cutoff=0.3) or names[:8]
            raise ValueError(f"there is no channel group {name!r}; near: {near}.")
        return names.index(name)

    def check(self, masks: Sequence[Tensor]) -> None:
        """Raise unless there is one mask ``(channels,)`` per group."""
        if [tuple(m.shape) for m in masks] != [(n,) for n in self.sizes]:
            raise ValueError(
                f"expected one mask of shape (channels,) per group, of sizes {self.sizes}; got "
                f"shapes {[tuple(m.shape) for m in masks]}."
            )

    def sparsity_terms(self, masks: Sequence[Tensor]) -> list[SparsityTerm]:
        """What ``sparsity_loss`` sums: all convolutions and linear layers, but no head."""
        self.check(masks)
        return [_term(layer, masks) for layer in self.layers if layer.has_weights]


def _term(layer: GroupedLayer, masks: Sequence[Tensor]) -> SparsityTerm:
    mask_in = None if layer.reads is None else masks[layer.reads]
    mask_out = layer.channels_out if layer.writes is None else masks[layer.writes]
    if layer.kind == "depthwise":  # one filter per channel: no pairs
        return SparsityTerm(layer.area, 1, mask_out)
    if mask_in is None:
        return SparsityTerm(layer.area, layer.channels_in * layer.pixels, mask_out)
    return SparsityTerm(layer.area * layer.pixels, mask_in, mask_out)


def find_channel_groups(
    network: nn.Module, *, residual: Residual = "shared", prune_output: bool = False
) -> ChannelGroups:
    """Find the groups of channels that masks may close and surgery may remove.

    The channels of the input are never among them.

    Args:
        network: Convolutions, linear layers, batch norms, activations that keep 0, pooling,
            flattening and sums, in any arrangement that ``torch.fx`` can trace.
        residual: ``"shared"``: everything added in one residual stage is one group; ``"inner"``:
            such channels stay, only those inside the blocks form groups.
        prune_output: Whether the network's output is features, whose number may shrink.

    Raises:
        ValueError: If the network has an operation through which channels cannot be followed (it
            is named), or nothing can be pruned, or ``residual`` is unknown.
    """
    if residual not in RESIDUALS:
        raise ValueError(f"residual must be one of {list(RESIDUALS)}; got {residual!r}.")
    trace = trace_channels(network, prune_output=prune_output)
    if residual == "inner":
        trace.pin_sums()
    roots = trace.roots()
    free = [root for root in roots if root not in trace.reasons]
    pinned = {trace.names[root]: trace.reasons[root] for root in roots if root in trace.reasons}
    if not free:
        raise ValueError(f"no channel of the network may be pruned: {pinned}.")
    index = {root: k for k, root in enumerate(free)}
    assert trace.output is not None
    return ChannelGroups(
        groups=tuple(ChannelGroup(trace.names[root], trace.counts[root] or 0) for root in free),
        layers=tuple(_grouped(layer, trace, index) for layer in trace.layers),
        output=index.get(trace.root(trace.output)),
        pinned=pinned,
        residual=residual,
        prune_output=prune_output,
    )


def _grouped(layer: TracedLayer, trace: ChannelTrace, index: dict[int, int]) -> GroupedLayer:
    reads, writes = (index.get(trace.root(origin)) for origin in (layer.reads, layer.writes))
    kept_whole = layer.writes == trace.output and not trace.prune_output
    return GroupedLayer(
        **{
            **layer._asdict(),
            "reads": reads,
            "writes": writes,
            "gated": layer.gated and writes is not None,
        },
        is_head=layer.kind == "linear" and kept_whole,
    )
