"""Where samples live: a source turns sample numbers into a batch of tensors.

A batch is Avalanche's list of columns, ``[x, y, task label]`` or ``[x, y]``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import numpy as np
import torch
from avalanche.benchmarks.utils.transforms import TupleTransform
from torch import Generator, Tensor
from torch.utils.data import Dataset, TensorDataset

from avalanche_ext.training.loading.flat_data import (
    Leaf,
    attribute_values,
    extra_columns,
    leaves_of,
)

__all__ = [
    "DatasetSource",
    "JoinedSource",
    "Source",
    "TensorSource",
    "as_source",
    "join_batches",
    "source_for",
]

Batch = list[Tensor]
Located = list[tuple[Tensor, Tensor]]
BatchTransform = Callable[[Tensor, Generator | None], Tensor]


class Source(Protocol):
    """Anything that turns sample numbers into a batch."""

    def __len__(self) -> int: ...

    @property
    def transform(self) -> BatchTransform | None:
        """What ``gather`` still does to the rows that ``locate`` finds; ``None`` for nothing."""
        ...

    def gather(self, indices: Tensor, generator: Generator | None = None) -> Batch:
        """The samples ``indices`` (int64, on the CPU) as columns, in that order.

        ``generator`` is for random transforms of the batch; by default torch's global one.
        """
        ...

    def locate(self, indices: Tensor) -> Located | None:
        """For each column the tensor and the rows that hold the samples; ``None`` if none do."""
        ...


class TensorSource:
    """Samples held as tensors: a batch is one ``index_select`` per column.

    Args:
        columns: ``x``, ``y`` and, where there are task labels, ``t``, all on one device.
        rows: Row of ``columns[0]`` for each sample; by default sample ``i`` is row ``i``. The
            other columns are already in sample order.
        transform: Applied to the gathered rows of ``x``.
    """

    def __init__(
        self,
        columns: Sequence[Tensor],
        rows: Tensor | None = None,
        transform: BatchTransform | None = None,
    ) -> None:
        self.columns = list(columns)
        self.rows = rows
        self.transform = transform

    def __len__(self) -> int:
        return len(self.columns[1])

    def locate(self, indices: Tensor) -> Located:
        """See ``Source``."""
        x, *rest = self.columns
        if indices.device != x.device:
            indices = indices.to(x.device, non_blocking=True)
        rows = indices if self.rows is None else self.rows.index_select(0, indices)
        return [(x, rows), *((c, indices) for c in rest)]

    def gather(self, indices: Tensor, generator: Generator | None = None) -> Batch:
        """See ``Source``."""
        batch = [column.index_select(0, rows) for column, rows in self.locate(indices)]
        return transformed(batch, self.transform, generator)


class DatasetSource:
    """Samples of any dataset, read one by one through its own transforms."""

    transform = None

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def gather(self, indices: Tensor, generator: Generator | None = None) -> Batch:
        """See ``Source``."""
        return list(self.dataset.collate_fn([self.dataset[i] for i in indices.tolist()]))

    def locate(self, indices: Tensor) -> None:
        """See ``Source``."""
        return


class JoinedSource(Dataset):
    """Several sources behind one another, as one dataset whose items are whole batches.

    A batch is asked for by one tensor of sample numbers for each source; its rows come in the order
    of the sources.
    """

    def __init__(self, sources: Sequence[Source], sizes: Sequence[int]) -> None:
        self.sources = list(sources)
        self.bounds = np.concatenate([[0], np.cumsum(sizes)]).tolist()
        nothing = torch.zeros(0, dtype=torch.int64)
        located = [source.locate(nothing) for source in self.sources]
        self._transform = self.sources[0].transform if self.sources else None
        # All in tensors of one kind, treated in one way.
        self.direct = (
            None not in located
            and _alike(located)
            and all(source.transform == self._transform for source in self.sources)
        )

    def __len__(self) -> int:
        return self.bounds[-1]

    @property
    def for_workers(self) -> bool:
        """Whether worker processes should read it: tensors are gathered faster than sent.

        Memory of an accelerator cannot be read in another process.
        """
        held = [_devices(source) for source in self.sources]
        return None in held and not any(device.type != "cpu" for d in held for device in d or ())

    def __getitems__(self, indices: Sequence[Tensor]) -> Batch:
        """One batch; the name is the one that torch's fetcher looks for."""
        return self.batch(indices)

    def batch(self, indices: Sequence[Tensor], generator: Generator | None = None) -> Batch:
        """One batch, with the generator of its random transforms."""
        wanted = [(s, i) for s, i in zip(self.sources, indices, strict=True) if i.shape[0]]
        if not self.direct:
            return join_batches([source.gather(mine, generator) for source, mine in wanted])
        located: list[Any] = [source.locate(mine) for source, mine in wanted]
        batch = [_select(parts) for parts in zip(*located, strict=True)]
        return transformed(batch, self._transform, generator)

    def split(self, numbers: Tensor) -> list[Tensor]:
        """Numbers in the whole row of sources as numbers in each source."""
        spans = itertools.pairwise(self.bounds)
        return [numbers[(numbers >= low) & (numbers < high)] - low for low, high in spans]


def _devices(source: Source) -> set[torch.device] | None:
    """Where a source's tensors are; ``None`` if it reads samples one by one."""
    inner = getattr(source, "joined", None)
    if isinstance(inner, JoinedSource):
        found = [_devices(part) for part in inner.sources]
        return None if None in found else {device for part in found for device in part or ()}
    located = source.locate(torch.zeros(0, dtype=torch.int64))
    return None if located is None else {column.device for column, _ in located}


def transformed(
    batch: Batch, transform: BatchTransform | None, generator: Generator | None
) -> Batch:
    """The batch with its ``x`` transformed."""
    if transform is not None:
        batch[0] = transform(batch[0], generator)
    return batch


def _alike(located: Sequence[Any]) -> bool:
    if len({len(columns) for columns in located}) > 1:
        return False
    return all(
        c.dtype == first.dtype and c.shape[1:] == first.shape[1:] and c.device == first.device
        for columns in located[1:]
        for (c, _), (first, _) in zip(columns, located[0], strict=True)
    )


def _select(parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Rows of several tensors into one, each written once: no copy to join them."""
    first, rows = parts[0]
    if len(parts) == 1:
        return first.index_select(0, rows)
    if first.ndim == 1:
        return torch.cat([column.index_select(0, rows) for column, rows in parts])
    out = first.new_empty((sum(r.shape[0] for _, r in parts), *first.shape[1:]))
    at = 0
    for column, rows in parts:
        end = at + rows.shape[0]
        torch.index_select(column, 0, rows, out=out[at:end])
        at = end
    return out


def join_batches(parts: Sequence[Batch]) -> Batch:
    """Concatenate batches column by column.

    Raises:
        ValueError: If they differ in the number of columns (task labels on one side only).
    """
    if len({len(p) for p in parts}) > 1:
        raise ValueError(
            f"current data and memory have batches of {[len(p) for p in parts]} columns; both need "
            f"the same: give every experience task labels, or none of them."
        )
    if len(parts) == 1:
        return list(parts[0])
    return [torch.cat(on_one_device(columns)) for columns in zip(*parts, strict=True)]


def on_one_device(columns: Sequence[Tensor]) -> list[Tensor]:
    """The tensors on the accelerator that one of them is on, or as they are."""
    devices = {c.device for c in columns}
    if len(devices) == 1:
        return list(columns)
    there = next(device for device in devices if device.type != "cpu")
    return [c.to(there, non_blocking=True) for c in columns]


def source_for(strategy: Any, dataset: Any) -> Source:
    """The source of a data set that ``strategy`` trains on or replays.

    A plugin that keeps data on the device (one with ``resident_source``) is asked first.
    """
    for plugin in getattr(strategy, "plugins", ()):
        ask = getattr(plugin, "resident_source", None)
        if ask is not None and (source := ask(strategy, dataset)) is not None:
            return source
    return as_source(dataset)


def as_source(dataset: Any) -> Source:
    """The fastest source that gives exactly what ``dataset`` gives, sample by sample.

    A dataset whose leaf is a ``TensorDataset``, reached through subsets and concatenations without
    any transform of ``x``, becomes a ``TensorSource``; everything else is read through its own
    ``__getitem__``. The short cut is taken only if samples of every label come out the same.
    """
    source = _tensor_source(dataset)
    return DatasetSource(dataset) if source is None else source


def _tensor_source(dataset: Any) -> TensorSource | None:
    leaves = leaves_of(dataset)
    if len(leaves) != 1 or any(_changes_x(t) for t in leaves[0].transforms):
        return None
    source = tensor_source(dataset, leaves[0])
    return source if source is not None and agrees(source, dataset) else None


def tensor_source(dataset: Any, leaf: Leaf) -> TensorSource | None:
    """The rows of ``leaf``, before any transform of ``x``, if it is a ``TensorDataset``.

    Args:
        dataset: The whole data set, of which ``leaf`` is the only one.
        leaf: See ``leaves_of``.
    """
    targets = attribute_values(dataset, "targets")
    tensors = getattr(leaf.dataset, "tensors", ())
    extra = extra_columns(dataset)
    if targets is None or extra not in ([], ["targets_task_labels"]):
        return None
    if not isinstance(leaf.dataset, TensorDataset) or len(tensors) != 2:
        return None
    if tensors[1].ndim != 1 or tensors[1].is_floating_point():
        return None
    rows = leaf.rows if isinstance(leaf.where, slice) else leaf.rows[np.argsort(leaf.where)]
    columns = [tensors[0], targets]
    if extra:
        columns.append(cast(Tensor, attribute_values(dataset, "targets_task_labels")))
    return TensorSource(columns, torch.from_numpy(rows))


def _changes_x(transform: Any) -> bool:
    if transform is None:
        return False
    return not (isinstance(transform, TupleTransform) and transform.transforms[0] is None)


def agrees(source: TensorSource, dataset: Any, *, compare_x: bool = True) -> bool:
    """Compare one sample for each pair of stored label and target.

    Target transforms are functions of the stored label, so no other sample can differ in ``y``.
    With random transforms only the type and shape of ``x`` can be compared.
    """
    leaf = leaves_of(dataset)[0]
    stored = leaf.dataset.tensors[1][torch.from_numpy(leaf.rows)]
    pairs = np.stack([stored.cpu().numpy(), source.columns[1].cpu().numpy()])
    order = np.lexsort(pairs)
    new = np.append(True, (np.diff(pairs[:, order]) != 0).any(axis=0))
    probe = torch.from_numpy(np.union1d(order[new], [0, len(dataset) // 2, len(dataset) - 1]))
    with torch.random.fork_rng(devices=[]):
        mine, theirs = source.gather(probe), DatasetSource(dataset).gather(probe)
    return len(mine) == len(theirs) and all(
        a.dtype == b.dtype
        and a.shape == b.shape
        and (torch.equal(a.cpu(), b) or not (k or compare_x))
        for k, (a, b) in enumerate(zip(mine, theirs, strict=True))
    )
