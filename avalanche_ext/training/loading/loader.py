"""The loader in which index sampling and sources meet."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from avalanche_ext.training.distributed import rank_and_world, share
from avalanche_ext.training.loading.sampling import Draw, GroupIndex, MergeDraw, seeded
from avalanche_ext.training.loading.sources import Batch, JoinedSource, Source, join_batches

__all__ = ["LoaderOptions", "ReplayLoader", "ReplayPart", "options_for"]


@dataclass(frozen=True)
class LoaderOptions:
    """What ``strategy.train`` was told about loading, and which share of a batch is wanted.

    ``shard``: the rank of this process and how many share each batch; alone by default.
    """

    batch_size: int
    num_workers: int = 0
    shuffle: bool = True
    drop_last: bool = False
    pin_memory: bool = False
    persistent_workers: bool = False
    shard: tuple[int, int] = (0, 1)


def options_for(
    strategy: Any,
    num_workers: int = 0,
    shuffle: bool = True,
    drop_last: bool = False,
    pin_memory: bool | None = None,
    persistent_workers: bool = False,
    **kwargs: Any,
) -> LoaderOptions:
    """The options of a strategy's training loader, from what ``strategy.train`` was told.

    A plugin that keeps data on the device says (by ``fallback_workers``) how many processes read
    the data that it cannot keep, unless the user has said so.
    """
    asked = [getattr(p, "fallback_workers", 0) for p in strategy.plugins]
    return LoaderOptions(
        strategy.train_mb_size, num_workers or max(asked), shuffle, drop_last, bool(pin_memory),
        persistent_workers or any(asked), rank_and_world(strategy),
    )  # fmt: skip


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

    Current data and memories are one ``JoinedSource``; a batch sampler emits the numbers of each
    batch in it, the source fetches them (with ``num_workers`` processes where asked for).
    On top of a loader of another plugin, memory rows are added to that loader's batches instead.
    With several ranks, each takes its share of every batch (``global_rows`` counts all of it).

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
        # Whoever cuts another loader's batches cuts the memory rows in them too.
        self.options = options if self.sharded else replace(options, shard=(0, 1))
        self.parts = sorted(parts, key=lambda part: part.name)
        self.epoch = 0
        self.global_rows = 0
        self._dataloader: DataLoader | None = None
        if not self.parts:
            raise ValueError("ReplayLoader needs at least one memory part.")
        choosy = [p.name for p in self.parts if p.draw.reshapes_current]
        if choosy and not self._owns_current:
            theirs = getattr(current, "loader", current)  # seen through a ResidentLoader
            raise ValueError(
                f"{choosy} decide how many current samples a batch has, so they need the current "
                f"data itself, but another plugin has put a {type(theirs).__name__} in its "
                f"place. Use one of them, or a mode that only adds samples."
            )

    @property
    def _owns_current(self) -> bool:
        return hasattr(self.current, "gather")

    @property
    def sharded(self) -> bool:
        """Whether batches hold this rank's share only; they do not on top of another loader."""
        return self._owns_current

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
        asked = options.num_workers > 0 or options.pin_memory
        if not (asked and plan.source.for_workers):
            generator = seeded(*self.parts[0].seed, plan.epoch, -3, options.shard[0])
            for indices in plan.shares():
                self.global_rows = plan.rows.popleft()
                yield plan.source.batch(indices, generator)
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
        for batch in self._dataloader:
            self.global_rows = plan.rows.popleft()
            yield batch

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
    rows: deque[int] = field(init=False, default_factory=deque)  # of batches under way, all ranks

    def __post_init__(self) -> None:
        self.generators = [seeded(*part.seed, self.epoch) for part in self.parts]
        self.source = self._joined()

    def _joined(self) -> JoinedSource:
        sizes = [len(self.current), *(part.size for part in self.parts)]
        return JoinedSource([self.current, *(part.source for part in self.parts)], sizes)

    @property
    def batch_size(self) -> int:
        size = self.options.batch_size
        return min(part.draw.current_batch_size(size) for part in self.parts)

    @property
    def merged(self) -> list[int]:
        """Which parts join the current data as a whole."""
        return [k for k, part in enumerate(self.parts) if isinstance(part.draw, MergeDraw)]

    def __len__(self) -> int:
        samples = len(self.current) + sum(len(self.parts[k].index) for k in self.merged)
        whole, rest = divmod(samples, self.batch_size)
        return whole + (rest > 0 and not self.options.drop_last)

    def shares(self) -> Iterator[list[Tensor]]:
        """This rank's share of every batch."""
        rank, world = self.options.shard
        for indices in self:
            self.rows.append(sum(i.shape[0] for i in indices))
            yield indices if world == 1 else share(indices, rank, world)

    def __iter__(self) -> Iterator[list[Tensor]]:
        merged, nothing = self.merged, [torch.zeros(0, dtype=torch.int64)] * len(self.parts)
        for chunk in self._pool(merged).split(self.batch_size)[: len(self)]:
            # With nothing merged the pool is the current data, and numbers need no sorting out.
            own, *joining = self.source.split(chunk) if merged else [chunk, *nothing]
            keep, n = own.shape[0], chunk.shape[0]
            for k, (part, generator) in enumerate(zip(self.parts, self.generators, strict=True)):
                if k not in merged:
                    stay, joining[k] = part.draw.step(n, part.index, generator)
                    keep = min(keep, stay)
            yield [own[:keep], *joining]

    def _pool(self, merged: list[int]) -> Tensor:
        bases = self.source.bounds[1:]
        pool = [torch.arange(len(self.current))]
        joined = torch.cat(pool + [self.parts[k].index.slots + bases[k] for k in merged])
        if not self.options.shuffle:
            return joined
        order = seeded(*self.parts[0].seed, self.epoch, -2)
        return joined[torch.randperm(len(joined), generator=order)]


class _MemoryPlan(_Plan):
    """The memory rows alone, one lot after the other for as long as another loader has batches."""

    def _joined(self) -> JoinedSource:
        return JoinedSource([p.source for p in self.parts], [p.size for p in self.parts])

    def __len__(self) -> int:
        return len(self.current)

    def __iter__(self) -> Iterator[list[Tensor]]:
        size = self.options.batch_size
        while True:
            yield [
                part.draw.step(size, part.index, generator)[1]
                for part, generator in zip(self.parts, self.generators, strict=True)
            ]


class _Replaceable(Sampler):
    """A batch sampler whose plan changes with the epoch, under one set of worker processes."""

    def __init__(self, plan: _Plan) -> None:
        self.plan = plan

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[list[Tensor]]:
        return self.plan.shares()


def _identity(batch: Batch) -> Batch:
    return batch
