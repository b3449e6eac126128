"""Which samples a batch is made of.

A memory is seen as groups of slots (``GroupIndex``). A draw says, for one step, how many of the
current mini-batch's samples stay and which slots join them.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Generator, Tensor

__all__ = [
    "BalancedDraw",
    "Draw",
    "GroupIndex",
    "MergeDraw",
    "PerGroupDraw",
    "UniformDraw",
    "seeded",
]


@dataclass(frozen=True)
class GroupIndex:
    """The slots of a memory, ordered by group.

    Args:
        keys: One key per group (experience, class or task), in the order of first storage.
        slots: All slots, group by group, ``(N,)`` int64.
        counts: Slots per group, ``(G,)`` int64; none is 0.
    """

    keys: tuple[Hashable, ...]
    slots: Tensor
    counts: Tensor

    @functools.cached_property
    def starts(self) -> Tensor:
        """Position in ``slots`` at which each group begins."""
        return self.counts.cumsum(0) - self.counts

    def __len__(self) -> int:
        return len(self.slots)

    @classmethod
    def of(cls, groups: dict[Hashable, Sequence[int] | Tensor]) -> GroupIndex:
        """Build from ``{key: slots}``; empty groups are dropped."""
        kept = {k: torch.as_tensor(s, dtype=torch.int64) for k, s in groups.items() if len(s)}
        slots = torch.cat(list(kept.values())) if kept else torch.zeros(0, dtype=torch.int64)
        counts = torch.tensor([len(s) for s in kept.values()], dtype=torch.int64)
        return cls(tuple(kept), slots, counts)

    def without(self, key: Hashable) -> GroupIndex:
        """The same index less one group."""
        if key not in self.keys:
            return self
        parts = self.slots.split(self.counts.tolist())
        return GroupIndex.of({k: s for k, s in zip(self.keys, parts, strict=True) if k != key})


class Draw(Protocol):
    """How memory joins a mini-batch of the current experience."""

    @property
    def reshapes_current(self) -> bool:
        """Whether it also decides which current samples a batch has."""
        ...

    def current_batch_size(self, batch_size: int) -> int:
        """Current samples per step, for a strategy whose mini-batch size is ``batch_size``."""
        ...

    def step(self, n_current: int, index: GroupIndex, generator: Generator) -> tuple[int, Tensor]:
        """For one step with ``n_current`` current samples: how many stay, and the slots to add."""
        ...


@dataclass(frozen=True)
class UniformDraw:
    """``n`` slots from the whole memory, each equally likely, with replacement.

    ``share`` makes the total batch ``B``: ``B - B // 2`` current samples and ``B // 2`` slots.
    """

    n: int
    share: bool = False

    @property
    def reshapes_current(self) -> bool:
        """See ``Draw``."""
        return self.share

    def current_batch_size(self, batch_size: int) -> int:
        """See ``Draw``."""
        return batch_size - batch_size // 2 if self.share else batch_size

    def step(self, n_current: int, index: GroupIndex, generator: Generator) -> tuple[int, Tensor]:
        """See ``Draw``."""
        at = torch.randint(len(index), (self.n,), generator=generator)
        return n_current, index.slots[at]


@dataclass(frozen=True)
class PerGroupDraw:
    """``n`` slots from each group with replacement (Alg. 1), or from ``max_groups`` random ones."""

    n: int
    max_groups: int | None = None
    reshapes_current = False

    def current_batch_size(self, batch_size: int) -> int:
        """See ``Draw``."""
        return batch_size

    def step(self, n_current: int, index: GroupIndex, generator: Generator) -> tuple[int, Tensor]:
        """See ``Draw``."""
        counts, starts = index.counts, index.starts
        if self.max_groups is not None and self.max_groups < len(counts):
            chosen = torch.randperm(len(counts), generator=generator)[: self.max_groups]
            counts, starts = counts[chosen], starts[chosen]
        at = _within(counts[:, None].expand(-1, self.n), generator) + starts[:, None]
        return n_current, index.slots[at.reshape(-1)]


@dataclass(frozen=True)
class BalancedDraw:
    """A batch of ``n`` in all, spread evenly over the current groups and the memory's groups.

    With fewer places than groups, random groups get one sample each; at least one sample is
    always a current one. ``current_groups`` is how many groups the current data counts for.
    """

    n: int
    current_groups: int = 1
    reshapes_current = True

    def current_batch_size(self, batch_size: int) -> int:
        """See ``Draw``."""
        return batch_size

    def step(self, n_current: int, index: GroupIndex, generator: Generator) -> tuple[int, Tensor]:
        """See ``Draw``."""
        past = len(index.counts)
        share, rest = divmod(self.n, past + self.current_groups)
        lucky = torch.randperm(past + self.current_groups, generator=generator)[:rest]
        quota = torch.full((past + self.current_groups,), share)
        quota[lucky] += 1
        keep = int(quota[past:].sum())
        if keep == 0:
            keep = 1
            quota[lucky[0]] -= 1  # share is 0 here, so every place belongs to a lucky past group
        group = torch.repeat_interleave(torch.arange(past), quota[:past])
        at = _within(index.counts[group], generator) + index.starts[group]
        return min(keep, n_current), index.slots[at]


@dataclass(frozen=True)
class MergeDraw:
    """The whole memory joins the current data, and both are shuffled together."""

    reshapes_current = True

    def current_batch_size(self, batch_size: int) -> int:
        """See ``Draw``."""
        return batch_size

    def step(self, n_current: int, index: GroupIndex, generator: Generator) -> tuple[int, Tensor]:
        """See ``Draw``: nothing joins a single step."""
        return n_current, index.slots[:0]


def _within(counts: Tensor, generator: Generator) -> Tensor:
    """A uniform integer in ``[0, count)`` for every entry of ``counts``."""
    draw = torch.rand(counts.shape, generator=generator, dtype=torch.float64)
    return (draw * counts).long()


def seeded(*numbers: int) -> Generator:
    """A generator whose stream is a function of ``numbers`` alone."""
    state = 0x9E3779B97F4A7C15
    for number in numbers:  # splitmix64: neighbouring seeds give unrelated streams
        state = (state ^ (number & 0xFFFFFFFFFFFFFFFF)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return Generator().manual_seed(state & 0x7FFFFFFFFFFFFFFF)
