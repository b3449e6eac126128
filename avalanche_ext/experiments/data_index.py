"""Names for samples: data sets as numbers of a benchmark's samples, and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from avalanche.benchmarks.utils.data import AvalancheDataset

from avalanche_ext.training.loading.flat_data import leaves_of

__all__ = ["DataIndex", "UnsupportedStateError"]


class UnsupportedStateError(TypeError):
    """An object that cannot be written as tensors and plain values."""


class DataIndex:
    """Names for the data sets of a benchmark: stream, experience, sample numbers.

    Args:
        benchmark: An Avalanche benchmark, built in the same way in every process.
    """

    def __init__(self, benchmark: Any) -> None:
        self.benchmark = benchmark
        self._places: dict[int, list[tuple[str, int, np.ndarray, np.ndarray]]] = {}
        for name, stream in benchmark.streams.items():
            for k, experience in enumerate(stream):
                for leaf in leaves_of(experience.dataset):
                    everything = np.arange(len(experience.dataset))
                    entry = (name, k, leaf.rows, everything[leaf.where])
                    self._places.setdefault(id(leaf.dataset), []).append(entry)

    def name(self, dataset: AvalancheDataset) -> dict[str, Any]:
        """Where each sample of ``dataset`` stands in the benchmark.

        Raises:
            UnsupportedStateError: If a sample stands nowhere in it.
        """
        numbers = np.full((len(dataset), 3), -1, dtype=np.int64)
        streams = list(self.benchmark.streams)
        for leaf in leaves_of(dataset):
            rows = np.asarray(leaf.rows)
            open_ = np.arange(len(dataset))[leaf.where]
            for name, k, theirs, where in self._places.get(id(leaf.dataset), []):
                order = np.argsort(theirs, kind="stable")
                at = np.searchsorted(theirs, rows, sorter=order).clip(max=len(theirs) - 1)
                found = (theirs[order[at]] == rows) & (numbers[open_, 0] < 0)
                numbers[open_[found]] = np.stack(
                    [
                        np.full(found.sum(), streams.index(name)),
                        np.full(found.sum(), k),
                        where[order[at[found]]],
                    ],
                    axis=1,
                )
        if (numbers < 0).any():
            raise UnsupportedStateError(
                "a data set with samples that are not the benchmark's own cannot be written down"
            )
        group = dataset._flat_data._transform_groups.current_group
        return {"numbers": torch.from_numpy(numbers), "group": group}

    def find(self, named: dict[str, Any]) -> Any:
        """The data set that ``name`` described."""
        numbers = named["numbers"].numpy()
        streams = list(self.benchmark.streams)
        keys, part_of = np.unique(numbers[:, :2], axis=0, return_inverse=True)
        part_of = part_of.reshape(-1)
        parts = []
        for p, (s, k) in enumerate(keys):
            whole = self.benchmark.streams[streams[s]][int(k)].dataset
            parts.append(whole.subset(numbers[part_of == p, 2].tolist()))
        if not parts:
            return AvalancheDataset([])
        joined = parts[0]
        for part in parts[1:]:
            joined = joined.concat(part)
        if len(parts) > 1:
            back = np.argsort(np.argsort(part_of, kind="stable"), kind="stable")
            joined = joined.subset(back.tolist())
        return joined.with_transforms(named["group"])
