"""What an episodic memory keeps its samples in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from avalanche_ext.training.loading.flat_data import attribute_values
from avalanche_ext.training.loading.sources import (
    Batch,
    DatasetSource,
    Located,
    Source,
    TensorSource,
    on_one_device,
    transformed,
)

__all__ = ["ReferenceStore", "TensorStore", "raw_sample", "sample_bytes", "store_for"]


class TensorStore:
    """Samples copied into tensors, one row per slot, whatever type ``x`` has (uint8 stays uint8).

    Nothing of the experience's data set stays alive. ``capacity`` slots are allocated at once if
    it is known; otherwise the tensors grow by half when they are full, so that storing stays
    cheap on long streams. The tensors live where the samples come from: exemplars of data that a
    plugin keeps on the device stay on the device.
    """

    def __init__(self, like: TensorSource, capacity: int | None = None) -> None:
        self._capacity = capacity
        self._columns = [c.new_empty((capacity or 0, *c.shape[1:])) for c in like.columns]
        self.transform = like.transform

    def accepts(self, source: Source) -> bool:
        """Whether samples of ``source`` fit the tensors, and are to be transformed alike."""
        return (
            isinstance(source, TensorSource)
            and source.transform == self.transform
            and [(c.dtype, c.shape[1:]) for c in source.columns]
            == [(c.dtype, c.shape[1:]) for c in self._columns]
        )

    def to(self, device: torch.device) -> None:
        """Move the samples."""
        self._columns = [c.to(device) for c in self._columns]

    def write(self, slots: Tensor, source: Source, indices: Tensor) -> None:
        """Copy the samples ``indices`` of ``source`` into ``slots``."""
        if not len(slots):
            return
        located = source.locate(indices)
        assert located is not None  # see accepts
        self.to(located[0][0].device)
        needed, room = int(slots.max()) + 1, len(self._columns[0])
        if needed > room:
            rows = max(needed, room + room // 2)
            if self._capacity is not None:
                rows = max(needed, min(rows, self._capacity))
            self._columns = [_grown(c, rows) for c in self._columns]
        slots = slots.to(self._columns[0].device)
        for column, (values, rows) in zip(self._columns, located, strict=True):
            column[slots] = values.index_select(0, rows)

    def locate(self, indices: Tensor) -> Located:
        """See ``Source``."""
        device = self._columns[0].device
        if indices.device != device:
            indices = indices.to(device, non_blocking=True)
        return [(column, indices) for column in self._columns]

    def gather(self, indices: Tensor, generator: Generator | None = None) -> Batch:
        """See ``Source``."""
        batch = [c.index_select(0, rows) for c, rows in self.locate(indices)]
        return transformed(batch, self.transform, generator)

    def labels(self, indices: Tensor) -> Batch:
        """The columns behind ``x``, on the CPU: labels, and task labels where there are any."""
        return [c.index_select(0, rows).cpu() for c, rows in self.locate(indices)[1:]]

    def __len__(self) -> int:
        return len(self._columns[0])

    def bytes_per_sample(self) -> int:
        """Bytes of one row over all columns."""
        return sum(c[:1].numel() // max(1, len(c[:1])) * c.element_size() for c in self._columns)

    def trim(self, used: int) -> None:
        """Give back the rows behind ``used``, before pickling."""
        self._columns = [c[:used].clone() for c in self._columns]


class ReferenceStore:
    """Samples kept as ``(data set, index)``, read again through the data set's own transforms.

    For data on disk and for augmented data: nothing pre-processed is kept, and random transforms
    are drawn anew at every replay. The data sets stay alive as long as the memory does.
    """

    transform = None

    def __init__(self) -> None:
        self._sources: list[Source] = []
        self._source_of = np.zeros(0, dtype=np.int64)
        self._index_of = np.zeros(0, dtype=np.int64)
        self._labels: list[np.ndarray] = []
        self._bytes = 0

    def accepts(self, source: Source) -> bool:
        """Any source can be referred to."""
        return True

    def write(self, slots: Tensor, source: Source, indices: Tensor) -> None:
        """Point ``slots`` at the samples ``indices`` of ``source``."""
        if not len(slots):
            return
        needed, labels = int(slots.max()) + 1, _labels(source, indices)
        if not self._labels:
            self._labels = [np.zeros(0, np.int64) for _ in labels]
        if needed > len(self):
            rows = max(needed, len(self) + len(self) // 2)
            self._source_of, self._index_of, *self._labels = (
                np.concatenate([a, np.zeros(rows - len(a), np.int64)])
                for a in (self._source_of, self._index_of, *self._labels)
            )
        for stored, values in zip(self._labels, labels, strict=True):
            stored[slots.numpy()] = values.numpy()
        self._source_of[slots.numpy()] = len(self._sources)
        self._index_of[slots.numpy()] = indices.numpy()
        self._sources.append(source)
        self._drop_unused()
        self._bytes = max(self._bytes, sample_bytes(source, int(indices[0])))

    def _drop_unused(self) -> None:
        used, self._source_of = np.unique(self._source_of, return_inverse=True)
        self._sources = [self._sources[k] for k in used]

    def gather(self, indices: Tensor, generator: Generator | None = None) -> Batch:
        """See ``Source``."""
        at = indices.numpy()
        owner = self._source_of[at]
        order = np.argsort(owner, kind="stable")
        runs = np.split(order, np.flatnonzero(np.diff(owner[order])) + 1)
        read = [
            self._sources[owner[run[0]]].gather(
                torch.from_numpy(self._index_of[at[run]]), generator
            )
            for run in runs
        ]
        back = torch.from_numpy(np.argsort(order))
        joined = [torch.cat(on_one_device(c)) for c in zip(*read, strict=True)]
        return [c.index_select(0, back.to(c.device)) for c in joined]

    def locate(self, indices: Tensor) -> None:
        """See ``Source``."""
        return

    def labels(self, indices: Tensor) -> Batch:
        """Labels, and task labels where there are any, without reading a sample."""
        return [torch.from_numpy(a[indices.numpy()]) for a in self._labels]

    def __len__(self) -> int:
        return len(self._source_of)

    def bytes_per_sample(self) -> int:
        """Bytes of one sample as the data set holds it, before transforms (largest seen)."""
        return self._bytes

    def trim(self, used: int) -> None:
        """Give back the rows behind ``used``."""
        self._source_of, self._index_of = self._source_of[:used], self._index_of[:used]
        self._labels = [a[:used] for a in self._labels]


def store_for(source: Source, capacity: int | None) -> TensorStore | ReferenceStore:
    """Copies for samples in tensors, references for everything else."""
    return TensorStore(source, capacity) if isinstance(source, TensorSource) else ReferenceStore()


def sample_bytes(source: Source, index: int) -> int:
    """Bytes of one sample before any transform: image planes, tensors, arrays, 8 per number."""
    if isinstance(source, DatasetSource):
        return sum(_bytes(part) for part in raw_sample(source.dataset, index))
    located = source.locate(torch.tensor([index])) or []
    return sum(c[:1].nbytes for c, _ in located)


def raw_sample(dataset: Any, index: int) -> Sequence[Any]:
    """One sample as the data set gives it before its current transforms."""
    if hasattr(dataset, "remove_current_transform_group"):
        dataset = dataset.remove_current_transform_group()
    return dataset[index]


def _bytes(part: Any) -> int:
    if isinstance(part, Tensor | np.ndarray):
        return int(part.nbytes)
    if hasattr(part, "getbands"):  # a PIL image
        return part.width * part.height * len(part.getbands())
    return 8


def _labels(source: Any, indices: Tensor) -> Batch:
    if hasattr(source, "labels"):
        return source.labels(indices)
    if isinstance(source, TensorSource):
        return [c.cpu()[indices] for c in source.columns[1:]]
    names = ("targets", "targets_task_labels")
    values = [attribute_values(source.dataset, name) for name in names]
    return [v[indices] for v in values if v is not None]


def _grown(column: Tensor, rows: int) -> Tensor:
    bigger = column.new_empty((rows, *column.shape[1:]))
    bigger[: len(column)] = column
    return bigger
