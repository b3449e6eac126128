"""What a method costs: parameters, floating-point operations, and bytes kept from the past."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from avalanche.models.utils import avalanche_forward
from avalanche.training.plugins import AGEMPlugin, EvaluationPlugin, GEMPlugin, ReplayPlugin
from avalanche.training.supervised import Cumulative
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from avalanche_ext.models.modes import evaluating
from avalanche_ext.training.loading.sources import as_source
from avalanche_ext.training.plugins.device_data import DeviceDataPlugin
from avalanche_ext.training.storage_policy.policy_memory import PolicyMemory
from avalanche_ext.training.storage_policy.stores import sample_bytes

__all__ = [
    "bytes_by_kind",
    "bytes_remembered",
    "count_parameters",
    "flops_per_sample",
    "memory_mib",
]

# Their exemplars are counted apart, or nothing of theirs is from the past.
_TRANSIENT = (AGEMPlugin, GEMPlugin, ReplayPlugin, EvaluationPlugin, DeviceDataPlugin)


def count_parameters(model: nn.Module) -> int:
    """Numbers that the network learns or learnt, frozen ones included, shared ones once.

    Teachers that a plugin keeps are not part of it, nor are running statistics.
    """
    return sum(p.numel() for p in model.parameters())


def flops_per_sample(model: nn.Module, x: Tensor, task_labels: Tensor | None = None) -> int:
    """Floating-point operations to classify one sample, a multiply-add counted as 2.

    Counts matrix products, convolutions and attention, as ``torch.utils.flop_counter`` does, not
    what acts on single numbers (activations, normalisation). The model is left as it was; no
    random number is drawn unless it draws some in evaluation mode.

    Args:
        model: The network, compiled or not.
        x: Samples, of which the first is used.
        task_labels: Their task labels, for a network with one head per task.

    Raises:
        ValueError: If there is no sample.
    """
    if not len(x):
        raise ValueError("flops_per_sample expects at least one sample; got none.")
    labels = torch.zeros(len(x), dtype=torch.long) if task_labels is None else task_labels
    counter = FlopCounterMode(display=False)
    with evaluating(model), torch.no_grad(), counter:
        avalanche_forward(model, x[:1], labels[:1])
    return counter.get_total_flops()


def memory_mib(parameters: int, exemplar_bytes: int) -> float:
    """Memory in MiB of a network in float32 and its exemplars, the common scale of both."""
    return (4 * parameters + exemplar_bytes) / 2**20


def bytes_remembered(strategy: Any) -> int:
    """Bytes of exemplars that the strategy and its plugins hold between experiences."""
    total = sum(_of_plugin(plugin) for plugin in strategy.plugins)
    if isinstance(strategy, Cumulative) and strategy.dataset is not None:
        total += _of_dataset(strategy.dataset)
    return total


def bytes_by_kind(strategy: Any) -> dict[str, int]:
    """Bytes that the strategy and its plugins hold from the past, by what they are.

    Returns:
        ``exemplars``; ``networks``: weights and buffers of teachers, generators and other networks
        beside the model; ``tensors``: what else plugins hold in tensors, such as importances, the
        parameters that they belong to, masks. What follows from the current data alone (samples
        kept on the device, metrics, single numbers) is not counted.
    """
    counted: set[int] = {id(p) for p in strategy.model.parameters()}
    counted |= {id(b) for b in strategy.model.buffers()} | {id(strategy.model), id(strategy)}
    sizes = {"exemplars": bytes_remembered(strategy), "networks": 0, "tensors": 0}
    beside = [v for m in strategy.model.modules() for v in vars(m).values() if type(v) is list]
    beside += [v for v in vars(strategy).values() if isinstance(v, nn.Module)]
    _walk(beside, counted, sizes)
    for plugin in strategy.plugins:
        if not isinstance(plugin, _TRANSIENT) and not hasattr(plugin, "bytes_remembered"):
            _walk(plugin, counted, sizes)
    return sizes


def _walk(value: Any, counted: set[int], sizes: dict[str, int]) -> None:
    """Add the bytes of every tensor that can be reached, once."""
    if id(value) in counted:
        return
    counted.add(id(value))
    if isinstance(value, nn.Module):
        tensors = [t for t in (*value.parameters(), *value.buffers()) if id(t) not in counted]
        counted.update(map(id, tensors))
        sizes["networks"] += sum(t.nbytes for t in tensors)
    elif isinstance(value, Tensor):
        if value.ndim:  # single numbers are reports, not memory
            sizes["tensors"] += value.nbytes
    elif isinstance(value, Mapping):
        for part in value.values():
            _walk(part, counted, sizes)
    elif isinstance(value, list | tuple | set):
        for part in value:
            _walk(part, counted, sizes)
    elif type(value).__module__.startswith(("avalanche.training.", "avalanche_ext.training.")):
        _walk(vars(value) if hasattr(value, "__dict__") else (), counted, sizes)


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
