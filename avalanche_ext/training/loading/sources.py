"""Where samples live: a source turns sample numbers into a batch of tensors.

A batch is Avalanche's list of columns, ``[x, y, task label]`` or ``[x, y]``.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Protocol, cast

import numpy as np
import torch
from avalanche.benchmarks.utils.flat_data import ConstantSequence, FlatData
from avalanche.benchmarks.utils.transforms import TupleTransform
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

__all__ = [
    "DatasetSource",
    "JoinedSource",
    "Source",
    "TensorSource",
    "as_source",
    "attribute_values",
]

Batch = list[Tensor]
Located = list[tuple[Tensor, Tensor]]


class Source(Protocol):
    """Anything that turns sample numbers into a batch."""

    def __len__(self) -> int: ...

    def gather(self, indices: Tensor) -> Batch:
        """The samples ``indices`` (int64, on the CPU) as columns, in that order."""
        ...

    def locate(self, indices: Tensor) -> Located | None:
        """For each column the tensor and the rows that hold the samples; ``None`` if none do."""
        ...


class TensorSource:
    """Samples held as tensors: a batch is one ``index_select`` per column.

    Args:
        columns: ``x``, ``y`` and, where there are task labels, ``t``.
        rows: Row of ``columns[0]`` for each sample; by default sample ``i`` is row ``i``. The
            other columns are already in sample order.
    """

    def __init__(self, columns: Sequence[Tensor], rows: Tensor | None = None) -> None:
        self.columns = list(columns)
        self.rows = rows

    def __len__(self) -> int:
        return len(self.columns[1])

    def locate(self, indices: Tensor) -> Located:
        """See ``Source``."""
        rows = indices if self.rows is None else self.rows.index_select(0, indices)
        x, *rest = self.columns
        return [(x, rows), *((c, indices) for c in rest)]

    def gather(self, indices: Tensor) -> Batch:
        """See ``Source``."""
        return [column.index_select(0, rows) for column, rows in self.locate(indices)]


class DatasetSource:
    """Samples of any dataset, read one by one through its own transforms."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def gather(self, indices: Tensor) -> Batch:
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
        self._direct = None not in located and _alike(located)  # all in tensors of one kind

    def __len__(self) -> int:
        return self.bounds[-1]

    def __getitems__(self, indices: Sequence[Tensor]) -> Batch:
        """One batch; the name is the one that torch's fetcher looks for."""
        wanted = [(s, i) for s, i in zip(self.sources, indices, strict=True) if i.shape[0]]
        if not self._direct:
            return join_batches([source.gather(mine) for source, mine in wanted])
        located: list[Any] = [source.locate(mine) for source, mine in wanted]
        return [_select(parts) for parts in zip(*located, strict=True)]

    def split(self, numbers: Tensor) -> list[Tensor]:
        """Numbers in the whole row of sources as numbers in each source."""
        spans = itertools.pairwise(self.bounds)
        return [numbers[(numbers >= low) & (numbers < high)] - low for low, high in spans]


def _alike(located: Sequence[Any]) -> bool:
    if len({len(columns) for columns in located}) > 1:
        return False
    return all(
        c.dtype == first.dtype and c.shape[1:] == first.shape[1:]
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
    return [torch.cat(columns) for columns in zip(*parts, strict=True)]


def as_source(dataset: Any) -> Source:
    """The fastest source that gives exactly what ``dataset`` gives, sample by sample.

    A dataset whose leaf is a ``TensorDataset``, reached through subsets and concatenations without
    any transform of ``x``, becomes a ``TensorSource``; everything else is read through its own
    ``__getitem__``. The short cut is taken only if samples of every label come out the same.
    """
    source = _tensor_source(dataset)
    return DatasetSource(dataset) if source is None else source


def attribute_values(dataset: Any, name: str) -> Tensor | None:
    """An attribute such as ``targets`` as int64, without a Python call per sample."""
    attribute = getattr(dataset, name, None)
    if attribute is None:
        return None
    data = getattr(attribute, "data", attribute)
    return torch.from_numpy(_values(data, np.arange(len(dataset))))


def _values(node: Any, at: np.ndarray) -> np.ndarray:
    if isinstance(node, ConstantSequence):
        return np.full(len(at), int(node[0]) if len(node) else 0, dtype=np.int64)
    if isinstance(node, FlatData):
        result = np.empty(len(at), dtype=np.int64)
        for child, where, positions in _children(node, at):
            result[where] = _values(child, positions)
        return result
    if isinstance(node, Tensor | np.ndarray):
        return np.asarray(node, dtype=np.int64)[at]
    if len(at) * 4 < len(node):  # a few out of many: do not convert them all
        return np.fromiter((int(node[int(i)]) for i in at), np.int64, len(at))
    return np.fromiter((int(v) for v in node), np.int64, len(node))[at]


def _children(node: FlatData, at: np.ndarray) -> list[tuple[Any, Any, np.ndarray]]:
    """For each child that is touched: the child, where its samples go, their numbers in it.

    The private fields of Avalanche's ``FlatData`` are read in this file only.
    """
    if node._indices is not None:
        at = np.asarray(node._indices[:] if isinstance(node._indices, list) else _eager(node))[at]
    if len(node._datasets) == 1:
        return [(node._datasets[0], slice(None), at)]
    ends = np.asarray(node._cumulative_sizes)
    owner = np.searchsorted(ends, at, side="right")
    found = []
    for k in np.unique(owner):
        where = np.flatnonzero(owner == k)
        found.append((node._datasets[k], where, at[where] - (ends[k - 1] if k else 0)))
    return found


def _eager(node: FlatData) -> np.ndarray:
    indices = cast(Sequence[int], node._indices)
    return np.fromiter((int(indices[i]) for i in range(len(indices))), np.int64, len(indices))


def _tensor_source(dataset: Any) -> TensorSource | None:
    flat = getattr(dataset, "_flat_data", None)
    targets = attribute_values(dataset, "targets")
    if flat is None or targets is None or len(dataset) == 0:
        return None
    extra = [a.name for a in dataset._data_attributes.values() if a.use_in_getitem]
    if extra not in ([], ["targets_task_labels"]):
        return None
    leaf, rows = _single_leaf(flat, np.arange(len(dataset)))
    if not isinstance(leaf, TensorDataset) or len(leaf.tensors) != 2:
        return None
    columns = [leaf.tensors[0], targets]
    if extra:
        columns.append(cast(Tensor, attribute_values(dataset, "targets_task_labels")))
    source = TensorSource(columns, torch.from_numpy(rows))
    return source if _agrees(source, dataset, leaf.tensors[1]) else None


def _single_leaf(node: Any, at: np.ndarray) -> tuple[Any, np.ndarray]:
    """Follow subsets down to one leaf; ``(None, ...)`` at a branch or at a transform of ``x``."""
    while isinstance(node, FlatData):
        for groups in (
            getattr(node, "_transform_groups", None),
            getattr(node, "_frozen_transform_groups", None),
        ):
            if groups is not None and _changes_x(groups[groups.current_group]):
                return None, at
        children = _children(node, at)
        if len(children) != 1:
            return None, at
        node, where, positions = children[0]
        at = positions if isinstance(where, slice) else positions[np.argsort(where)]
    return node, at


def _changes_x(transform: Any) -> bool:
    if transform is None:
        return False
    return not (isinstance(transform, TupleTransform) and transform.transforms[0] is None)


def _agrees(source: TensorSource, dataset: Any, stored: Tensor) -> bool:
    """Compare one sample for each pair of stored label and target.

    Target transforms are functions of the stored label, so no other sample can differ in ``y``.
    """
    if stored.ndim != 1 or stored.is_floating_point():
        return False
    pairs = np.stack([stored[source.rows].cpu().numpy(), source.columns[1].numpy()])
    order = np.lexsort(pairs)
    new = np.append(True, (np.diff(pairs[:, order]) != 0).any(axis=0))
    probe = torch.from_numpy(np.union1d(order[new], [0, len(dataset) // 2, len(dataset) - 1]))
    mine, theirs = source.gather(probe), DatasetSource(dataset).gather(probe)
    return len(mine) == len(theirs) and all(
        a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(mine, theirs, strict=True)
    )
