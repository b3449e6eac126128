"""What the processes of one data-parallel training tell each other, besides gradients.

On torch's default process group, which ``join`` starts under torchrun.
"""

from __future__ import annotations

import atexit
import os
import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from avalanche.benchmarks.utils import data_loader as avalanches_loaders
from torch import Tensor

from avalanche_ext.training.loading.flat_data import attribute_values

__all__ = [
    "all_ranks_agree",
    "copy_from_first_rank",
    "fingerprint",
    "from_first_rank",
    "join",
    "let_avalanche_split",
    "memory_fingerprints",
    "rank",
    "share_random_state",
]

_ALIKE = (
    "Build the benchmark, the model and the strategy in the same way on every rank; "
    "DataParallelPlugin does the splitting."
)
_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def join(device: torch.device) -> tuple[int, int]:
    """This process's rank and the number of processes; start the process group under torchrun.

    One that is there already is used as it is. Without one and outside torchrun: ``(0, 1)``.
    """
    started = all(name in os.environ for name in _TORCHRUN) and os.environ["WORLD_SIZE"] != "1"
    if started and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(_leave)
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """This process's rank, also before ``join``; 0 outside torchrun."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def copy_from_first_rank(tensors: Iterable[Tensor]) -> None:
    """Overwrite each tensor with rank 0's, bit for bit."""
    with torch.no_grad():
        for tensor in tensors:
            whole = tensor.detach().contiguous()
            dist.broadcast(whole, src=0)
            if whole.data_ptr() != tensor.data_ptr():
                tensor.copy_(whole)


def from_first_rank(value: Any) -> Any:
    """Rank 0's value of a picklable object."""
    holder = [value]
    dist.broadcast_object_list(holder, src=0)
    return holder[0]


def share_random_state() -> int:
    """Give every rank rank 0's random state: torch's on the CPU, NumPy's and Python's.

    Returns:
        The seed that all ranks now have. Rank 0's own state does not change.
    """
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    seed, (of_torch, of_numpy, of_python) = from_first_rank((torch.initial_seed(), states))
    torch.set_rng_state(of_torch)  # the seed is part of it
    np.random.set_state(of_numpy)  # noqa: NPY002 - Avalanche's buffers draw from these
    random.setstate(of_python)
    return seed


def all_ranks_agree(values: dict[str, Any], what: str, advice: str = _ALIKE) -> None:
    """Raise on every rank unless all have the same ``values``.

    Args:
        values: Small picklable things by name.
        what: What they are, for the error.
        advice: What to do about it.

    Raises:
        ValueError: If they differ; it names the first differences and both values.
    """
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, values)
    for other, theirs in enumerate(everyone):
        first = everyone[0]
        names = [n for n in {**first, **theirs} if first.get(n) != theirs.get(n)]
        if names:
            found = "; ".join(
                f"{n}: rank 0 has {first.get(n)}, rank {other} has {theirs.get(n)}"
                for n in names[:3]
            )
            raise ValueError(
                f"data-parallel training needs the same {what} on every rank, but they differ. "
                f"{found}. {advice}"
            )


class _NotDistributed:
    is_distributed = False


_AVALANCHES_HELPER = avalanches_loaders.DistributedHelper


def let_avalanche_split(allowed: bool) -> None:
    """Whether Avalanche's loaders give each rank a part of the data set of its own (its default).

    They do so wherever a process group exists; with batches that are split that would be a split
    of a split. They ask one object, which only they know by this name.
    """
    helper = _AVALANCHES_HELPER if allowed else _NotDistributed
    setattr(avalanches_loaders, "DistributedHelper", helper)  # noqa: B010 - of another type


def fingerprint(labels: Tensor | None) -> tuple[int, int] | None:
    """Two numbers that tell one list of labels from another, order included."""
    if labels is None:
        return None
    return len(labels), int((labels.cpu() * torch.arange(1, len(labels) + 1)).sum())


def memory_fingerprints(plugins: Iterable[Any]) -> dict[str, Any]:
    """Number and labels of the exemplars of every plugin that has a ``storage_policy``."""
    policies = [p.storage_policy for p in plugins if getattr(p, "storage_policy", None) is not None]
    return {f"{type(p).__name__} {k}": _remembered(p) for k, p in enumerate(policies)}


def _remembered(policy: Any) -> tuple[int, int] | None:
    if hasattr(policy, "labels") and hasattr(policy, "index"):  # ours, without building a data set
        columns = policy.labels(policy.index().slots)
        return fingerprint(columns[0]) if columns else None
    return fingerprint(attribute_values(policy.buffer, "targets"))
