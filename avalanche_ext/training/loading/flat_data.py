"""Read what an ``AvalancheDataset`` is made of, without a Python call per sample.

The private fields of Avalanche's ``FlatData`` are read in this file only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from avalanche.benchmarks.utils.data_attribute import DataAttribute
from avalanche.benchmarks.utils.flat_data import ConstantSequence, FlatData
from torch import Tensor

__all__ = ["Leaf", "attribute_values", "extra_columns", "leaves_of"]


@dataclass(frozen=True)
class Leaf:
    """A data set at the bottom of the tree, and the samples that are taken from it.

    Args:
        dataset: What the samples are read from.
        rows: Their numbers in it, ``(N,)``.
        where: Their places in the whole data set.
        transforms: What Avalanche applies to a sample on its way up, innermost first.
    """

    dataset: Any
    rows: np.ndarray
    where: Any
    transforms: tuple[Any, ...]


def leaves_of(dataset: Any) -> list[Leaf]:
    """The leaves of an ``AvalancheDataset``; none for an empty or a foreign data set."""
    root = getattr(dataset, "_flat_data", None)
    if root is None or len(dataset) == 0:
        return []
    places = np.arange(len(dataset))
    return list(_leaves(root, places, slice(None), _group(root), ()))


def extra_columns(dataset: Any) -> list[str]:
    """Names of the attributes that a sample carries behind ``x`` and ``y``."""
    return [a.name for a in dataset._data_attributes.values() if a.use_in_getitem]


def attribute_values(dataset: Any, name: str) -> Tensor | None:
    """An attribute such as ``targets`` as int64, without a Python call per sample."""
    attribute = getattr(dataset, name, None)
    if attribute is None:
        return None
    return torch.from_numpy(_values(attribute, np.arange(len(dataset))))


def _values(node: Any, at: np.ndarray) -> np.ndarray:
    if isinstance(node, DataAttribute):  # they are nested as views are made of views
        return _values(node.data, at)
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
    if isinstance(node, list):
        return np.array(node, dtype=np.int64)[at]
    return np.fromiter((int(v) for v in node), np.int64, len(node))[at]


def _children(node: FlatData, at: np.ndarray) -> list[tuple[Any, Any, np.ndarray]]:
    """For each child that is touched: the child, where its samples go, their numbers in it."""
    if node._indices is not None:
        at = np.asarray(node._indices if isinstance(node._indices, list) else _eager(node))[at]
    ends = np.asarray(node._cumulative_sizes)
    if (at < 0).any():  # such a number counts back in the first child
        at = np.where(at < 0, at + ends[0], at)
    if len(node._datasets) == 1:
        return [(node._datasets[0], slice(None), at)]
    owner = np.searchsorted(ends, at, side="right")
    found = []
    for k in np.unique(owner):
        where = np.flatnonzero(owner == k)
        found.append((node._datasets[k], where, at[where] - (ends[k - 1] if k else 0)))
    return found


def _eager(node: FlatData) -> np.ndarray:
    indices = cast(Sequence[int], node._indices)
    return np.fromiter((int(indices[i]) for i in range(len(indices))), np.int64, len(indices))


def _leaves(
    node: Any, at: np.ndarray, where: Any, group: str, above: tuple[Any, ...]
) -> Iterator[Leaf]:
    if not isinstance(node, FlatData):
        yield Leaf(node, at, where, above)
        return
    frozen, own = (
        groups[group] if (groups := getattr(node, name, None)) is not None else None
        for name in ("_frozen_transform_groups", "_transform_groups")
    )
    transforms = (*(t for t in (frozen, own) if t is not None), *above)
    for child, mine, positions in _children(node, at):
        yield from _leaves(child, positions, _nested(where, mine), group, transforms)


def _nested(where: Any, mine: Any) -> Any:
    """Places of a child's samples in the whole, from their places in its parent."""
    if isinstance(where, slice):
        return mine
    return where[mine] if not isinstance(mine, slice) else where


def _group(node: Any) -> str:
    groups = getattr(node, "_transform_groups", None)
    return "train" if groups is None else groups.current_group
