"""Remove channels from a network for good, and make what is left quick: surgery, folding.

What comes out is a plain network of the same class, with narrower layers: no masks, no hooks.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from avalanche_ext.models.channel_groups import ChannelGroups, GroupedLayer, find_channel_groups
from avalanche_ext.models.channel_trace import trace_channels
from avalanche_ext.models.modes import evaluating

__all__ = [
    "PrunedNetwork",
    "build_from_manifest",
    "fold_batch_norms",
    "prune_channels",
    "recalibrate_batch_norms",
]


class PrunedNetwork(NamedTuple):
    """A network after surgery, and how to do the same to a fresh one.

    Attributes:
        network: The plain, narrower network.
        manifest: Plain data (JSON): ``residual``, ``prune_output``, ``channel_multiple``, and per
            group its size and the indices kept.
        kept: Per group the indices of the channels that ``network`` has, those that
            ``channel_multiple`` added included; sorted.
    """

    network: nn.Module
    manifest: dict[str, Any]
    kept: list[Tensor]


def prune_channels(
    network: nn.Module,
    groups: ChannelGroups,
    keep: Sequence[Tensor | Sequence[int]],
    *,
    channel_multiple: int = 1,
) -> PrunedNetwork:
    """Copy a network without some of its channels.

    The result gives what the network gives with hard masks, at the kept features.

    Args:
        network: The dense network; it is left as it was.
        groups: What ``find_channel_groups`` found for it.
        keep: Indices of the channels to keep, for each group, in any order.
        channel_multiple: Round the number of kept channels up to a multiple of this (8 suits
            tensor cores), as far as there are any. The channels added give 0.

    Returns:
        The network, its manifest, and the indices of its channels.

    Raises:
        ValueError: If the indices do not fit the groups, a group would be left empty, or
            ``channel_multiple`` is not positive.
    """
    if channel_multiple < 1:
        raise ValueError(f"channel_multiple must be >= 1; got {channel_multiple}.")
    kept = _checked(groups, keep)
    widened = [_widen(k, n, channel_multiple) for k, n in zip(kept, groups.sizes, strict=True)]
    pruned = copy.deepcopy(network)
    for layer in groups.layers:
        module = pruned.get_submodule(layer.name)
        rows = None if layer.writes is None else widened[layer.writes]
        columns = None if layer.reads is None else widened[layer.reads]
        _cut(module, layer, rows, columns)
        if layer.gated and layer.writes is not None and channel_multiple > 1:
            _close(module, layer, ~torch.isin(widened[layer.writes], kept[layer.writes]))
    if groups.output is not None:
        _set_features(pruned, groups.sizes[groups.output], len(widened[groups.output]))
    manifest = {
        "residual": groups.residual,
        "prune_output": groups.prune_output,
        "channel_multiple": channel_multiple,
        "sizes": {group.name: group.size for group in groups.groups},
        "kept": {g.name: k.tolist() for g, k in zip(groups.groups, kept, strict=True)},
    }
    return PrunedNetwork(pruned, manifest, widened)


def build_from_manifest(
    network: nn.Module, manifest: Mapping[str, Any], *, folded: bool = False
) -> nn.Module:
    """Narrow a fresh dense network as another one was, so that its state dictionary loads.

    Args:
        network: The dense network, of any weights; it is left as it was.
        manifest: From ``prune_channels``, or read back from JSON.
        folded: Whether the state dictionary is from after ``fold_batch_norms``.

    Raises:
        ValueError: If the manifest is of another network.
    """
    groups = find_channel_groups(
        network, residual=manifest["residual"], prune_output=manifest["prune_output"]
    )
    sizes = {group.name: group.size for group in groups.groups}
    if sizes != manifest["sizes"]:
        raise ValueError(
            f"the manifest is of a network with channels {manifest['sizes']}; this one has {sizes}."
        )
    pruned = prune_channels(
        network,
        groups,
        [manifest["kept"][name] for name in sizes],
        channel_multiple=manifest["channel_multiple"],
    ).network
    return fold_batch_norms(pruned) if folded else pruned


def fold_batch_norms(network: nn.Module) -> nn.Module:
    r"""Copy a network in evaluation mode, its batch norms drawn into the layers before them.

    .. math::
        W' = \frac{\gamma}{\sqrt{v + \epsilon}} W, \qquad
        b' = \frac{\gamma}{\sqrt{v + \epsilon}} (b - \mu) + \beta

    A batch norm whose input something else reads too, as in pre-activation networks, stays.

    Raises:
        ValueError: If the network has an operation through which channels cannot be followed, or
            a batch norm to fold keeps no running statistics.
    """
    folded = copy.deepcopy(network).eval()
    for layer in trace_channels(folded, prune_output=False).layers:
        if layer.folds_into is None:
            continue
        norm = cast(_BatchNorm, folded.get_submodule(layer.name))
        if norm.running_mean is None:
            raise ValueError(
                f"batch norm {layer.name!r} keeps no running statistics and cannot be folded."
            )
        before: Any = folded.get_submodule(layer.folds_into)
        fuse: Any = fuse_linear_bn_eval if isinstance(before, nn.Linear) else fuse_conv_bn_eval
        folded.set_submodule(layer.folds_into, fuse(before, norm))
        # timm's batch norm also holds the dropout and the activation that follow.
        rest = [m for m in (getattr(norm, "drop", None), getattr(norm, "act", None)) if m]
        rest = [m for m in rest if not isinstance(m, nn.Identity)]
        folded.set_submodule(layer.name, nn.Sequential(*rest) if rest else nn.Identity())
    return folded


@torch.no_grad()
def recalibrate_batch_norms(network: nn.Module, batches: Iterable[Tensor]) -> int:
    """Replace the running statistics of all batch norms by means over some batches.

    Each batch counts the same. Everything but the batch norms runs in evaluation mode; modes and
    momenta are put back.

    Args:
        network: The network, masked or pruned.
        batches: Inputs, more than one sample each.

    Returns:
        Number of batches used; 0, and nothing read, for a network without running statistics.

    Raises:
        ValueError: If there is no batch.
    """
    norms = [m for m in network.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return 0
    momenta = [norm.momentum for norm in norms]
    count = 0
    try:
        with evaluating(network):
            for norm in norms:
                norm.train()
                norm.momentum = None  # a cumulative mean
            for count, x in enumerate(batches, 1):
                if count == 1:  # not before: without a batch the statistics stay as they were
                    for norm in norms:
                        norm.reset_running_stats()
                network(x)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    if not count:
        raise ValueError("recalibrate_batch_norms expects at least one batch; got none.")
    return count


def _checked(groups: ChannelGroups, keep: Sequence[Tensor | Sequence[int]]) -> list[Tensor]:
    if len(keep) != len(groups.groups):
        raise ValueError(
            f"keep expects indices for each of the {len(groups.groups)} groups; got {len(keep)}."
        )
    kept = [torch.as_tensor(k, dtype=torch.int64).cpu() for k in keep]
    for group, k in zip(groups.groups, kept, strict=True):
        if k.ndim != 1 or not len(k):
            raise ValueError(f"keep leaves no channel of {group.name!r}; keep at least one.")
        if k.min() < 0 or k.max() >= group.size or len(k.unique()) < len(k):
            raise ValueError(
                f"keep expects different indices from 0 to {group.size - 1} for {group.name!r}; "
                f"got {k.tolist()}."
            )
    return [k.sort().values for k in kept]


def _widen(kept: Tensor, size: int, multiple: int) -> Tensor:
    """Indices with the first ones that are not kept, up to a multiple of ``multiple``."""
    wanted = min(size, math.ceil(len(kept) / multiple) * multiple)
    others = torch.ones(size, dtype=torch.bool).index_fill(0, kept, False).nonzero().flatten()
    return torch.cat([kept, others[: wanted - len(kept)]]).sort().values


def _cut(module: Any, layer: GroupedLayer, rows: Tensor | None, columns: Tensor | None) -> None:
    """Keep some of the channels that a layer writes and reads."""
    if layer.kind in ("norm", "depthwise"):
        columns = None  # they write what they read
    if layer.pixels > 1:
        rows = rows if layer.kind == "linear" else _spread(rows, layer.pixels)
        columns = _spread(columns, layer.pixels)
    for name, parameter in module.named_parameters(recurse=False):
        data = _select(parameter.data, rows, columns if parameter.ndim > 1 else None)
        setattr(module, name, nn.Parameter(data, requires_grad=parameter.requires_grad))
    for name, buffer in module.named_buffers(recurse=False):
        if buffer.ndim:
            setattr(module, name, _select(buffer, rows, None))
    if layer.kind == "norm":
        module.num_features = module.num_features if rows is None else len(rows)
    elif layer.kind == "linear":
        module.out_features, module.in_features = module.weight.shape
    else:
        module.out_channels = len(module.weight)
        if layer.kind == "depthwise":
            module.groups = module.in_channels = module.out_channels
        elif columns is not None:
            module.in_channels = len(columns)


def _spread(channels: Tensor | None, pixels: int) -> Tensor | None:
    """Columns of the channels of a flattened map."""
    if channels is None:
        return None
    return (channels[:, None] * pixels + torch.arange(pixels)).flatten()


def _select(tensor: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    result = tensor
    for axis, index in enumerate((rows, columns)):
        if index is not None:
            result = result.index_select(axis, index.to(tensor.device))
    last = tensor.ndim == 4 and not tensor.is_contiguous()
    return result.contiguous(memory_format=torch.channels_last) if last else result


def _close(module: nn.Module, layer: GroupedLayer, closed: Tensor) -> None:
    """Let a layer write 0 in some channels."""
    if layer.kind == "norm":
        closed = closed.repeat_interleave(layer.pixels)
    with torch.no_grad():
        for parameter in module.parameters(recurse=False):
            parameter[closed.to(parameter.device)] = 0


def _set_features(network: Any, before: int, after: int) -> None:
    """Correct what the network says of its own width, where it says so."""
    for name in ("num_features", "out_dim", "head_hidden_size"):
        if getattr(network, name, None) == before:
            setattr(network, name, after)
