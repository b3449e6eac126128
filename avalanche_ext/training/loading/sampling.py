"""Which samples a batch is made of.

A memory is seen as groups of slots (``GroupIndex``). A draw says, for one step, how many of the
current mini-batch's samples stay and which slots join them.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
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
    def spans(self) -> tuple[np.ndarray, np.ndarray]:
        """For each group its position in ``slots`` and its length.

        As arrays: a draw is a dozen operations on a few numbers, at every step, and NumPy's cost
        a third of torch's.
        """
        counts = self.counts.numpy()
        return counts.cumsum() - counts, counts

    @functools.cached_property
    def _slots(self) -> np.ndarray:
        return self.slots.numpy()

    def pick(self, groups: np.ndarray | slice, shape: tuple[int, ...], g: Generator) -> Tensor:
        """Random slots, with replacement, of ``groups``, which broadcast to ``shape``."""
        starts, counts = (array[groups] for array in self.spans)
        draw = torch.rand(shape, generator=g, dtype=torch.float64).numpy()
        at = (draw * counts.reshape(-1, *(1,) * (draw.ndim - 1))).astype(np.int64)
        at += starts.reshape(-1, *(1,) * (draw.ndim - 1))
        return torch.from_numpy(self._slots[at.reshape(-1)])

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
        chosen, n_groups = slice(None), index.counts.shape[0]
        if self.max_groups is not None and self.max_groups < n_groups:
            chosen = torch.randperm(n_groups, generator=generator)[: self.max_groups].numpy()
            n_groups = self.max_groups
        return n_current, index.pick(chosen, (n_groups, self.n), generator)


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
        past = index.counts.shape[0]
        share, rest = divmod(self.n, past + self.current_groups)
        order = torch.randperm(past + self.current_groups, generator=generator)
        lucky = order[:rest].numpy()
        quota = np.full(past + self.current_groups, share)
        quota[lucky] += 1
        keep = int(quota[past:].sum())
        if keep == 0:
            keep = 1
            quota[lucky[0]] -= 1  # share is 0 here, so every place belongs to a lucky past group
        groups = np.repeat(np.arange(past), quota[:past])
        return min(keep, n_current), index.pick(groups, groups.shape, generator)


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


def seeded(*numbers: int) -> Generator:
    """A generator whose stream is a function of ``numbers`` alone."""
    state = 0x9E3779B97F4A7C15
    for number in numbers:  # splitmix64: neighbouring seeds give unrelated streams
        state = (state ^ (number & 0xFFFFFFFFFFFFFFFF)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return Generator().manual_seed(state & 0x7FFFFFFFFFFFFFFF)
