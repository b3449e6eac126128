"""A network with a mask on each of its channels: the masked layers of HAT and ExpandableDER."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from avalanche_ext.functional.channel_mask import (
    COMPENSATIONS,
    Compensation,
    ambiguous_share,
    anneal,
    gate,
    hard_gate,
    hat_gradient_mask,
    sparsity_loss,
)
from avalanche_ext.models.channel_groups import ChannelGroups, find_channel_groups

__all__ = ["EMBEDDING_LIMIT", "GatedNetwork"]

# Beyond this an embedding's own gradient has all but vanished; HAT's limit.
EMBEDDING_LIMIT = 6.0


# A parameter of the network that a mask multiplies row by row, its group, and rows per channel.
_Carrier = tuple[str, int, int]


class GatedNetwork(nn.Module):
    r"""A network and the embeddings of its channel masks :math:`m = \sigma(s e)`.

    The masks multiply weight and bias of the batch norm behind each convolution (a mask before it
    would be normalised away), and the rows and bias of layers without batch norm. So a closed
    channel is 0 everywhere, no activation is touched twice, and the network itself stays as it was
    made: its classes, names and parameters are those of the plain one.

    In training mode ``forward`` uses soft masks, in evaluation mode hard ones; ``masks=`` passes
    others, such as ``masks(hard=False)`` or those of an earlier task.

    Args:
        network: What ``find_channel_groups`` can follow; held, not copied.
        groups: Its groups; ``None`` finds them with ``prune_output=False``.
        s_max: Scale of the gates in the last batch of an epoch, > 0.
        compensation: See ``gate``; ``"hat"`` includes HAT's factor ``s_max``.
        min_share: Share of each group's channels that hard masks leave open at least, rounded up
            to one channel or more.
        generator: Draws the embeddings, uniformly from 0 to 2: all channels open.

    Shapes:
        Those of the network.

    Raises:
        ValueError: If a setting is out of range.
    """

    s: Tensor

    def __init__(
        self,
        network: nn.Module,
        *,
        groups: ChannelGroups | None = None,
        s_max: float = 100.0,
        compensation: Compensation = "exact",
        min_share: float = 0.02,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if not 0 < s_max < math.inf:
            raise ValueError(f"GatedNetwork expects a finite s_max > 0; got {s_max}.")
        if compensation not in COMPENSATIONS:
            raise ValueError(
                f"GatedNetwork expects compensation to be one of {list(COMPENSATIONS)}; "
                f"got {compensation!r}."
            )
        if not 0 <= min_share <= 1:
            raise ValueError(f"GatedNetwork expects min_share from 0 to 1; got {min_share}.")
        self.network = network
        self.groups = find_channel_groups(network) if groups is None else groups
        self.s_max = float(s_max)
        self.compensation: Compensation = compensation
        self.min_share = min_share
        self.embeddings = nn.ParameterList()
        self.register_buffer("s", torch.tensor(self.s_max))
        self._carriers = _carriers(network, self.groups)
        self.add_task(generator)

    # embeddings and scale -------------------------------------------------------------------

    def add_task(
        self, generator: torch.Generator | None = None, low: float = 0.0, high: float = 2.0
    ) -> nn.Parameter:
        """Append embeddings for another task, drawn uniformly from ``low`` to ``high``."""
        drawn = torch.rand(sum(self.groups.sizes), generator=generator) * (high - low) + low
        self.embeddings.append(nn.Parameter(drawn.to(self.s.device)))
        return self.embeddings[-1]

    def anneal(self, batch: int, batches: int) -> None:
        """Set the scale for batch 1, 2, ..., ``batches`` of an epoch, in place."""
        self.s.fill_(anneal(batch, batches, self.s_max))

    @torch.no_grad()
    def clamp_embeddings(self, limit: float = EMBEDDING_LIMIT) -> None:
        """Bring every embedding into ``-limit .. limit``; after each step of the optimizer."""
        for e in self.embeddings:
            e.clamp_(-limit, limit)

    @property
    def least(self) -> list[int]:
        """Channels of each group that hard masks leave open at least."""
        return [max(1, math.ceil(self.min_share * n)) for n in self.groups.sizes]

    # masks ----------------------------------------------------------------------------------

    def masks(self, task: int = -1, *, hard: bool | None = None) -> list[Tensor]:
        """Masks of a task, ``(channels,)`` per group; hard ones by default in evaluation mode."""
        e = self.embeddings[task]
        if not self.training if hard is None else hard:
            parts = e.split(self.groups.sizes)
            return [hard_gate(part, n) for part, n in zip(parts, self.least, strict=True)]
        # One sigmoid for all groups.
        m = gate(e, self.s, self.compensation, s_max=self.s_max)
        return list(m.split(self.groups.sizes))

    def forward(
        self,
        x: Tensor,
        masks: Sequence[Tensor] | None = None,
        buffers: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """The network's output under masks, by default those of the last task.

        ``buffers``: by name, what stands in for buffers of the network (batch statistics).
        """
        if masks is None:
            masks = self.masks()
        self.groups.check(masks)
        gated = dict(buffers or {})
        for name, group, pixels in self._carriers:
            parameter, m = _held(self.network, name), masks[group]
            if pixels > 1:
                m = m.repeat_interleave(pixels)
            m = m.view(-1, *[1] * (parameter.ndim - 1))
            gated[name] = (parameter * m).to(parameter.dtype)
        return functional_call(self.network, gated, (x,), tie_weights=False)

    def sparsity_loss(self, masks: Sequence[Tensor] | None = None) -> Tensor:
        """Share of the weights that masks keep, ``()``; by default those ``forward`` uses."""
        return sparsity_loss(self.groups.sparsity_terms(self.masks() if masks is None else masks))

    def gradient_masks(self, masks_before: Sequence[Tensor]) -> dict[str, Tensor | float]:
        """What to multiply the gradients of the network with, for HAT to keep earlier tasks.

        Args:
            masks_before: Element-wise maxima over the earlier tasks' masks, one per group.

        Returns:
            By the parameter's name in ``network``; every layer's but those of a head, a linear
            layer that makes an output which is kept whole. Channels that no mask governs count
            as used.
        """
        self.groups.check(masks_before)
        found: dict[str, Tensor | float] = {}
        for layer in self.groups.layers:
            if layer.is_head:
                continue
            m_in = None if layer.reads is None else masks_before[layer.reads]
            m_out = None if layer.writes is None else masks_before[layer.writes]
            if layer.kind in ("norm", "depthwise"):
                m_in = None
                m_out = None if m_out is None else m_out.repeat_interleave(layer.pixels)
            module = self.network.get_submodule(layer.name)
            for name, parameter in module.named_parameters(recurse=False):
                reads = m_in if parameter.ndim > 1 else None
                found[f"{layer.name}.{name}"] = hat_gradient_mask(reads, m_out, parameter.shape)
        return found

    # what is kept ---------------------------------------------------------------------------

    def kept(self, task: int = -1) -> list[Tensor]:
        """Indices of the channels that the hard masks leave open, sorted, one tensor per group.

        Warns where ``min_share`` had to keep channels that the embeddings close.
        """
        own = [int((e >= 0).sum()) for e in self.embeddings[task].split(self.groups.sizes)]
        rescued = [
            f"{group.name} ({n} of {group.size} open, {least} kept)"
            for group, n, least in zip(self.groups.groups, own, self.least, strict=True)
            if n < least
        ]
        if rescued:
            warnings.warn(
                f"masks closed nearly all channels of {', '.join(rescued)}; those of largest "
                f"embedding were kept. Lower the weight of the sparsity loss.",
                stacklevel=2,
            )
        return [m.nonzero().flatten() for m in self.masks(task, hard=True)]

    def kept_share(self, task: int = -1) -> dict[str, float]:
        """Share of the weights of each convolution and linear layer that hard masks keep."""
        masks = self.masks(task, hard=True)
        open_ = [float(m.mean()) for m in masks]
        shares = {}
        for layer in self.groups.layers:
            if layer.has_weights:
                reads = layer.reads if layer.kind != "depthwise" else None
                ends = [open_[k] for k in (reads, layer.writes) if k is not None]
                shares[layer.name] = math.prod(ends)
        return shares

    def ambiguous_share(self, task: int = -1) -> float:
        """Share of gates that are neither open nor closed at the largest scale."""
        return float(ambiguous_share(self.embeddings[task], self.s_max))


def _held(network: nn.Module, name: str) -> Tensor:
    """A parameter by its name, or what stands in for it where a function is differentiated."""
    path, _, leaf = name.rpartition(".")
    return getattr(network.get_submodule(path), leaf)


def _carriers(network: nn.Module, groups: ChannelGroups) -> tuple[_Carrier, ...]:
    found: list[_Carrier] = []
    for layer in groups.layers:
        if not layer.gated or layer.writes is None:
            continue
        module = network.get_submodule(layer.name)
        pixels = layer.pixels if layer.kind == "norm" else 1  # of a linear layer: of its columns
        for name, _ in module.named_parameters(recurse=False):
            # A depthwise filter reads a masked channel: a mask on it would count twice.
            if name == "bias" or layer.kind != "depthwise":
                found.append((f"{layer.name}.{name}", layer.writes, pixels))
    return tuple(found)
