"""The loader in which index sampling and sources meet."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from avalanche_ext.training.loading.sampling import Draw, GroupIndex, MergeDraw, seeded
from avalanche_ext.training.loading.sources import Batch, JoinedSource, Source, join_batches

__all__ = ["LoaderOptions", "ReplayLoader", "ReplayPart"]


@dataclass(frozen=True)
class LoaderOptions:
    """What ``strategy.train`` was told about loading."""

    batch_size: int
    num_workers: int = 0
    shuffle: bool = True
    drop_last: bool = False
    pin_memory: bool = False
    persistent_workers: bool = False


@dataclass(frozen=True)
class ReplayPart:
    """One memory in a loader: its samples, its groups, how they are drawn, and the draws' seed."""

    name: str
    source: Source
    size: int
    index: GroupIndex
    draw: Draw
    seed: tuple[int, ...]


class ReplayLoader:
    """Mini-batches of the current experience with samples of one or more memories in them.

    Current data and memories form one concatenation; a batch sampler emits the numbers of each
    batch in it, a ``JoinedSource`` fetches them (with ``num_workers`` processes where asked for).
    On top of a loader of another plugin, memory rows are added to that loader's batches instead.

    The numbers depend only on the parts' seeds and on how often the loader has been iterated, so
    a run that starts again at the same epoch draws the same samples. The order in which plugins
    add their parts does not matter.

    Args:
        current: The current data: a source, or another plugin's loader.
        options: Batch size and loading.
        parts: The memories.
    """

    def __init__(
        self, current: Source | Iterable[Any], options: LoaderOptions, parts: Iterable[ReplayPart]
    ) -> None:
        self.current = current
        self.options = options
        self.parts = sorted(parts, key=lambda part: part.name)
        self.epoch = 0
        self._dataloader: DataLoader | None = None
        if not self.parts:
            raise ValueError("ReplayLoader needs at least one memory part.")
        choosy = [p.name for p in self.parts if p.draw.reshapes_current]
        if choosy and not self._owns_current:
            raise ValueError(
                f"{choosy} decide how many current samples a batch has, so they need the current "
                f"data itself, but another plugin has put a {type(current).__name__} in its "
                f"place. Use one of them, or a mode that only adds samples."
            )

    @property
    def _owns_current(self) -> bool:
        return hasattr(self.current, "gather")

    def with_part(self, part: ReplayPart) -> ReplayLoader:
        """A loader that has one part more."""
        return ReplayLoader(self.current, self.options, [*self.parts, part])

    def __len__(self) -> int:
        if not self._owns_current:
            assert isinstance(self.current, Sized)
            return len(self.current)
        return len(_Plan(self.current, self.options, self.parts, 0))

    def __iter__(self) -> Iterator[Batch]:
        self.epoch += 1
        kind = _Plan if self._owns_current else _MemoryPlan
        plan = kind(self.current, self.options, self.parts, self.epoch)
        if self._owns_current:
            yield from self._load(plan)
        else:
            memory = self._load(plan)
            # The current loader comes first in zip: it ends the epoch, before rows are drawn.
            for batch, rows in zip(self.current, memory, strict=False):  # type: ignore[arg-type]
                yield join_batches([list(batch), rows])

    def _load(self, plan: _Plan) -> Iterator[Batch]:
        options = self.options
        if options.num_workers == 0 and not options.pin_memory:
            for indices in plan:
                yield plan.source.__getitems__(indices)
            return
        if self._dataloader is None or not options.persistent_workers:
            self._dataloader = DataLoader(
                plan.source,
                batch_sampler=_Replaceable(plan),
                collate_fn=_identity,
                num_workers=options.num_workers,
                pin_memory=options.pin_memory,
                persistent_workers=options.persistent_workers and options.num_workers > 0,
                generator=seeded(*self.parts[0].seed, plan.epoch, -1),
            )
        self._dataloader.batch_sampler.plan = plan  # type: ignore[union-attr]
        yield from self._dataloader

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_dataloader": None}  # worker processes cannot be pickled


@dataclass
class _Plan:
    """The numbers of every batch of one epoch.

    It does not know its ``ReplayLoader``: in a cycle of references, worker processes would be
    collected in an order in which each one waits for a time-out.
    """

    current: Any
    options: LoaderOptions
    parts: list[ReplayPart]
    epoch: int
    source: JoinedSource = field(init=False)

    def __post_init__(self) -> None:
        parts = self.parts
        self.size = self._current_size()
        current = [self.current] if self.size else []
        sizes = [self.size] * len(current) + [p.size for p in parts]
        self.source = JoinedSource([*current, *(p.source for p in parts)], sizes)
        self.bases = self.source.bounds[len(current) : -1]
        self.generators = [seeded(*p.seed, self.epoch) for p in parts]

    def _current_size(self) -> int:
        return len(self.current)

    @property
    def batch_size(self) -> int:
        size = self.options.batch_size
        return min(part.draw.current_batch_size(size) for part in self.parts)

    def _pool(self) -> Tensor:
        pool = [torch.arange(self.size)]
        for part, base in zip(self.parts, self.bases, strict=True):
            if isinstance(part.draw, MergeDraw):
                pool.append(part.index.slots + base)
        joined = torch.cat(pool)
        if not self.options.shuffle:
            return joined
        order = seeded(*self.parts[0].seed, self.epoch, -2)
        return joined[torch.randperm(len(joined), generator=order)]

    def __len__(self) -> int:
        merged = sum(
            len(p.index) for p in self.parts if isinstance(p.draw, MergeDraw)
        )  # fmt: skip
        whole, rest = divmod(self.size + merged, self.batch_size)
        return whole + (rest > 0 and not self.options.drop_last)

    def __iter__(self) -> Iterator[Tensor]:
        pool = self._pool()
        for chunk in pool.split(self.batch_size)[: len(self)]:
            keep, joining = len(chunk), []
            for part, base, generator in zip(self.parts, self.bases, self.generators, strict=True):
                stay, slots = part.draw.step(len(chunk), part.index, generator)
                keep = min(keep, stay)
                joining.append(slots + base)
            yield torch.cat([chunk[:keep], *joining])


class _MemoryPlan(_Plan):
    """The memory rows alone, one lot after the other for as long as another loader has batches."""

    def _current_size(self) -> int:
        return 0

    def __len__(self) -> int:
        return len(self.current)

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            drawn = [
                part.draw.step(self.options.batch_size, part.index, generator)[1] + base
                for part, base, generator in zip(
                    self.parts, self.bases, self.generators, strict=True
                )
            ]
            yield torch.cat(drawn)


class _Replaceable(Sampler):
    """A batch sampler whose plan changes with the epoch, under one set of worker processes."""

    def __init__(self, plan: _Plan) -> None:
        self.plan = plan

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.plan)


def _identity(batch: Batch) -> Batch:
    return batch
