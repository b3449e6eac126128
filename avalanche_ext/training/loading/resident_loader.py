"""Avalanche's own loaders, with the samples gathered from tensors on the device.

The numbers of every batch come from the loader's own samplers, through a ``DataLoader`` of numbers
in place of samples. So batches hold the same samples in the same order, and torch's global random
state moves on exactly as it would have: training gives the same weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from avalanche.benchmarks.utils.data_loader import MultiDatasetDataLoader, MultiDatasetSampler
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    default_collate,
)

from avalanche_ext.training.distributed import share
from avalanche_ext.training.loading.sampling import seeded
from avalanche_ext.training.loading.sources import Batch, JoinedSource, Source, TensorSource

__all__ = ["ResidentLoader", "datasets_of"]


def datasets_of(loader: Any) -> list[Any] | None:
    """The data sets that a loader of torch's or Avalanche's draws from; ``None`` for any other.

    Any other is also one that makes batches in a way of its own: by a subclass's ``__iter__``, a
    collate function that is not the data set's, an iterable data set.
    """
    if isinstance(loader, MultiDatasetDataLoader):
        own = type(loader).__iter__ is MultiDatasetDataLoader.__iter__
        datasets, collate = loader.datasets, loader.loader_kwargs["collate_fn"]
    elif type(loader) is DataLoader and loader.batch_sampler is not None:
        own = not isinstance(loader.dataset, IterableDataset)
        datasets, collate = [loader.dataset], loader.collate_fn
    else:
        return None
    known = (default_collate, getattr(datasets[0], "collate_fn", default_collate))
    return list(datasets) if own and collate in known else None


class ResidentLoader:
    """The batches of ``loader``, gathered from ``sources``.

    Args:
        loader: A loader of torch's or of Avalanche's.
        sources: One for each of its data sets (see ``datasets_of``), all in tensors.
        seed: Seed of the random transforms of the batches.
        shard: The rank of this process, and how many share each batch.
    """

    sharded = True

    def __init__(
        self,
        loader: Any,
        sources: Sequence[Source],
        *,
        seed: tuple[int, ...] = (0,),
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        self.loader = loader
        self.source = JoinedSource(sources, [len(s) for s in sources])
        self.seed = seed
        self.shard = shard
        self.epoch = 0
        self.global_rows = 0

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        self.epoch += 1
        sampler, generator = _batch_sampler(self.loader)
        if self.epoch > 1 and _keeps_workers(self.loader):
            generator = torch.Generator()  # workers that stay are not seeded again
        rank, world = self.shard
        draws = seeded(*self.seed, self.epoch, rank)
        if world == 1 and _draws_at_once(sampler):
            yield from self._from_one(sampler, generator, draws)
            return
        for numbers in _through_dataloader(sampler, generator):
            self.global_rows = len(numbers)
            indices = self.source.split(torch.tensor(numbers))
            yield self.source.batch(share(indices, rank, world), draws)

    def _from_one(self, sampler: Any, generator: Any, draws: torch.Generator) -> Iterator[Batch]:
        """One data set: the whole epoch's numbers at once, labels gathered in one go."""
        (batches,) = _through_dataloader(_AtOnce(sampler), generator)
        source = self.source.sources[0]
        assert isinstance(source, TensorSource)
        order = torch.tensor([n for batch in batches for n in batch], dtype=torch.int64)
        (x, rows), *rest = source.locate(order)
        sizes = [len(batch) for batch in batches]
        labels = [column.index_select(0, at).split(sizes) for column, at in rest]
        for self.global_rows, mine, *others in zip(sizes, rows.split(sizes), *labels, strict=True):
            chosen = x.index_select(0, mine)
            if source.transform is not None:
                chosen = source.transform(chosen, draws)
            yield [chosen, *others]


class _AtOnce(Sampler):
    """All batches of a sampler as a single one, so that its random draws happen as always."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler

    def __iter__(self) -> Iterator[Any]:
        yield list(self.sampler)


def _draws_at_once(sampler: Any) -> bool:
    """Whether a batch sampler takes all its random numbers before the first batch."""
    inner = getattr(sampler, "sampler", None)
    return type(sampler) is BatchSampler and type(inner) in (RandomSampler, SequentialSampler)


def _keeps_workers(loader: Any) -> bool:
    if isinstance(loader, DataLoader):
        return loader.persistent_workers
    kwargs = loader.loader_kwargs
    return bool(kwargs.get("persistent_workers") and kwargs.get("num_workers"))


class _Numbers(Dataset):
    """A data set whose items are their own numbers."""

    def __getitems__(self, numbers: Any) -> Any:
        return numbers


def _through_dataloader(sampler: Any, generator: torch.Generator | None) -> DataLoader:
    return DataLoader(_Numbers(), batch_sampler=sampler, collate_fn=_same, generator=generator)


def _same(numbers: list[Any]) -> list[Any]:
    return numbers


def _batch_sampler(loader: Any) -> tuple[Any, torch.Generator | None]:
    """The sampler of a loader's numbers for one epoch, and the loader's generator."""
    if isinstance(loader, DataLoader):
        return loader.batch_sampler, loader.generator
    # What MultiDatasetDataLoader does at the start of an epoch, less its walk for FFCV support.
    generator = loader.loader_kwargs.get("generator")
    samplers = loader._create_samplers(
        loader.datasets, loader.batch_sizes, loader.distributed_sampling, loader.loader_kwargs
    )
    if len(samplers) == 1 and not loader.never_ending:
        return samplers[0], generator
    return MultiDatasetSampler(
        loader.datasets,
        samplers,
        termination_dataset_idx=loader.termination_dataset,
        oversample_small_datasets=loader.oversample_small_datasets,
        never_ending=loader.never_ending,
    ), generator
