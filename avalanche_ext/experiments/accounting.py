"""What a strategy keeps from the past, in bytes."""

from __future__ import annotations

from typing import Any

from avalanche.training.plugins import AGEMPlugin, GEMPlugin, ReplayPlugin
from avalanche.training.supervised import Cumulative

from avalanche_ext.training.loading.sources import as_source
from avalanche_ext.training.storage_policy.policy_memory import PolicyMemory
from avalanche_ext.training.storage_policy.stores import sample_bytes

__all__ = ["bytes_remembered"]


def bytes_remembered(strategy: Any) -> int:
    """Bytes of exemplars that the strategy and its plugins hold between experiences."""
    total = sum(_of_plugin(plugin) for plugin in strategy.plugins)
    if isinstance(strategy, Cumulative) and strategy.dataset is not None:
        total += _of_dataset(strategy.dataset)
    return total


def _of_plugin(plugin: Any) -> int:
    if hasattr(plugin, "bytes_remembered"):
        return plugin.bytes_remembered
    if isinstance(plugin, ReplayPlugin):
        return PolicyMemory(plugin.storage_policy).nbytes
    if isinstance(plugin, GEMPlugin):
        parts = (plugin.memory_x, plugin.memory_y, plugin.memory_tid)
        return sum(t.nbytes for part in parts for t in part.values())
    if isinstance(plugin, AGEMPlugin):
        return sum(_of_dataset(d) for d in plugin.buffers)
    return 0


def _of_dataset(dataset: Any) -> int:
    return len(dataset) * sample_bytes(as_source(dataset), 0) if len(dataset) else 0
