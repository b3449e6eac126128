"""A hidden layer that several tasks share, each through a mask and with a batch norm of its own."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from avalanche_ext.functional.channel_mask import gate, hard_gate, hat_gradient_mask

__all__ = ["Capacity", "MaskedLayer"]

_LIMIT = 6.0  # of an embedding: beyond, its gradient has all but vanished
_SPREAD = 0.01  # of new embeddings: half of the gates open


@dataclass(frozen=True)
class Capacity:
    """Gates of a layer when a task has ended: ``used`` is ``new`` and ``reused`` together."""

    used: int
    new: int  # used by no earlier task
    reused: int
    free: int  # used by no task


class MaskedLayer(nn.Module):
    """A linear layer or a transposed convolution, under masks, then batch norm and ReLU.

    A mask on channels multiplies what leaves the layer; one on weights the weights. There is no
    bias, which the norm would remove.

    Args:
        n_in: Channels that it reads.
        n_out: Channels that it writes.
        kernel: Height and width; ``()`` for a linear layer. A 5 x 5 kernel doubles the side, others
            make a map of a vector.
        by_weight: Whether gates are on weights instead of channels.

    Attributes:
        reserved: Gates that some task needs open, which is what later tasks may not change.
    """

    weight: nn.Parameter
    reserved: Tensor
    protected: Tensor

    def __init__(self, n_in: int, n_out: int, kernel: tuple[int, ...], *, by_weight: bool) -> None:
        super().__init__()
        self.by_weight = by_weight
        self.weight = nn.Parameter(_drawn((n_out, n_in, *kernel)))
        self.register_buffer("reserved", torch.zeros(self._gates, dtype=torch.bool))
        self.register_buffer("protected", torch.zeros(self.weight.shape, dtype=torch.bool))
        self.tasks = nn.ModuleList()

    @property
    def _gates(self) -> tuple[int, ...]:
        return tuple(self.weight.shape) if self.by_weight else (self.weight.shape[0],)

    @property
    def gates_per_channel(self) -> int:
        """Gates that one more channel has."""
        return math.prod(self._gates[1:])

    # tasks ----------------------------------------------------------------------------------

    def begin_task(self, reserved_before: Tensor | None) -> None:
        """Draw embeddings; find out which weights must stay as they are.

        ``reserved_before``: channels of the layer before that are reserved, where gates are on
        channels; ``None`` for the first layer, whose input all tasks read.
        """
        if self.by_weight:
            self.protected = self.reserved.clone()
        else:
            before = None if reserved_before is None else reserved_before.float()
            free = hat_gradient_mask(before, self.reserved.float(), self.weight.shape)
            self.protected = (torch.as_tensor(free) == 0).expand(self.weight.shape).clone()
        self.tasks.append(_Part(self._gates, self.weight).to(self.weight))

    def end_task(self) -> Capacity:
        """Make the mask binary and reserve what it uses."""
        part = self._newest
        part.close()
        new, reused = part.mask & ~self.reserved, part.mask & self.reserved
        self.reserved = self.reserved | part.mask
        counts = [int(m.sum()) for m in (part.mask, new, reused, ~self.reserved)]
        return Capacity(*counts)

    @torch.no_grad()
    def grow(self, more_out: int, more_in: int) -> None:
        """Append channels; what there is keeps every bit."""
        n_out, n_in, *kernel = self.weight.shape
        larger = _drawn((n_out + more_out, n_in + more_in, *kernel)).to(self.weight)
        larger[:n_out, :n_in] = self.weight
        reserved, old = self.reserved, self._gates
        self.weight = nn.Parameter(larger)
        self.reserved = torch.zeros(self._gates, dtype=torch.bool, device=larger.device)
        self.reserved[tuple(slice(n) for n in old)] = reserved

    # training -------------------------------------------------------------------------------

    @property
    def _newest(self) -> _Part:
        return self.tasks[-1]  # pyright: ignore[reportReturnType]

    def soft_mask(self, s: float) -> Tensor:
        """Mask of the newest task at the scale ``s``."""
        return gate(self._newest.embedding, s)

    def hold(self) -> None:
        """No gradient for weights that are protected."""
        if self.weight.grad is not None:
            self.weight.grad.masked_fill_(self.protected, 0.0)

    @torch.no_grad()
    def clamp_embeddings(self) -> None:
        """Bring the newest embeddings into the limits."""
        self._newest.embedding.clamp_(-_LIMIT, _LIMIT)

    def forward(self, x: Tensor, task: int, s: float) -> Tensor:
        """What a task makes of channels ``(B, C, ...)``.

        In training mode a task that has not ended has the mask ``soft_mask(s)``, else a binary one.
        """
        part: _Part = self.tasks[task]  # pyright: ignore[reportAssignmentType]
        # The shape of the task's own time: sums of other lengths may round otherwise.
        weight = self.weight[: part.shape[0], : part.shape[1]]
        mask = gate(part.embedding, s) if part.training else part.binary().to(x.dtype)
        if self.by_weight:
            return part.norm(_apply(x, weight * mask)).relu()
        h = part.norm(_apply(x, weight.contiguous())).relu()
        return h * mask.view(-1, *[1] * (h.ndim - 2))


class _Part(nn.Module):
    """What a task has of a layer: embeddings or in the end a mask, a norm, the layer's shape."""

    embedding: nn.Parameter
    mask: Tensor

    def __init__(self, gates: tuple[int, ...], weight: Tensor) -> None:
        super().__init__()
        self.shape = tuple(weight.shape)
        self.embedding = nn.Parameter(_SPREAD * torch.randn(gates))
        self.register_buffer("mask", torch.zeros(gates, dtype=torch.bool))
        self.norm = nn.BatchNorm1d(len(weight)) if weight.ndim == 2 else nn.BatchNorm2d(len(weight))
        self.closed = False

    def binary(self) -> Tensor:
        """The mask with a threshold; one gate is always open."""
        if self.closed:
            return self.mask
        return hard_gate(self.embedding.flatten(), 1).view(self.mask.shape).bool()

    def close(self) -> None:
        """The task has ended: nothing changes any more."""
        self.mask = self.binary()
        self.closed = True
        self.embedding = nn.Parameter(self.embedding.new_zeros(0))
        self.requires_grad_(False).zero_grad()
        self.eval()

    def train(self, mode: bool = True) -> _Part:
        """Stay in evaluation mode when the task has ended."""
        return super().train(mode and not self.closed)


def _drawn(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape) / math.sqrt(math.prod(shape[1:]))


def _apply(x: Tensor, weight: Tensor) -> Tensor:
    """The layer of a weight ``(out, in, ...)``."""
    if weight.ndim == 2:
        return F.linear(x, weight)
    weight = weight.transpose(0, 1)
    if x.shape[2:] == (1, 1):  # a vector becomes a map of the kernel's size
        return F.conv_transpose2d(x, weight)
    return F.conv_transpose2d(x, weight, stride=2, padding=2, output_padding=1)
