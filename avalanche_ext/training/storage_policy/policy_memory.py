"""Avalanche's own storage policies, seen as a memory of grouped slots."""

from __future__ import annotations

import itertools
from collections.abc import Hashable
from typing import Any

import torch
from avalanche.training.storage_policy import BalancedExemplarsBuffer, ExemplarsBuffer
from torch import Generator, Tensor

from avalanche_ext.training.loading.flat_data import attribute_values
from avalanche_ext.training.loading.sampling import GroupIndex
from avalanche_ext.training.loading.sources import JoinedSource, as_source, source_for
from avalanche_ext.training.storage_policy.stores import sample_bytes

__all__ = ["PolicyMemory"]


class PolicyMemory:
    """Read an Avalanche ``ExemplarsBuffer``: its samples, its groups, its bytes.

    Args:
        policy: Any storage policy of Avalanche's, such as ``ClassBalancedBuffer``. One that keeps
            groups decides the groups; one that does not (``ReservoirSamplingBuffer``) is grouped
            by the labels of its samples.
    """

    transform = None

    def __init__(self, policy: ExemplarsBuffer) -> None:
        self.policy = policy
        self.joined: JoinedSource | None = None

    @property
    def max_size(self) -> int:
        """The policy's budget."""
        return self.policy.max_size

    def __len__(self) -> int:
        return self.size

    @property
    def size(self) -> int:
        """Number of samples."""
        return sum(len(d) for d in self._datasets().values())

    @property
    def nbytes(self) -> int:
        """Bytes of the samples before transforms."""
        datasets = [d for d in self._datasets().values() if len(d)]
        if not datasets:
            return 0
        return self.size * sample_bytes(as_source(datasets[0].train()), 0)

    def check_room(self, experience: Any) -> None:
        """Avalanche's policies divide their budget themselves."""

    def post_adapt(self, agent: Any, exp: Any) -> None:
        """Let the policy store what it chooses."""
        self.policy.post_adapt(agent, exp)
        self.joined = None

    def index(self, group_by: str | None = None) -> GroupIndex:
        """The samples by the policy's groups, or by label where it has none."""
        self.joined = None  # the policy may have been resized since
        datasets = self._datasets()
        ends = torch.tensor([0, *(len(d) for d in datasets.values())]).cumsum(0).tolist()
        grouped = isinstance(self.policy, BalancedExemplarsBuffer)
        if grouped or group_by is None or not len(self):
            spans = itertools.pairwise(ends)
            return GroupIndex.of(
                {k: torch.arange(a, b) for k, (a, b) in zip(datasets, spans, strict=True)}
            )
        name = {"class": "targets", "task": "targets_task_labels"}.get(group_by)
        values = attribute_values(self.policy.buffer, name) if name else None
        if values is None:
            raise ValueError(
                f"{type(self.policy).__name__} keeps no groups, so its samples cannot be drawn by "
                f"{group_by!r}; use group_by='class', or a policy that is balanced by {group_by}."
            )
        return GroupIndex.of({int(v): torch.nonzero(values == v)[:, 0] for v in values.unique()})

    def open(self, strategy: Any) -> None:
        """Find the sources of the samples for an experience of ``strategy``."""
        datasets = [d.train() for d in self._datasets().values() if len(d)]
        sources = [source_for(strategy, d) for d in datasets]
        self.joined = JoinedSource(sources, [len(d) for d in datasets])

    def gather(self, indices: Tensor, generator: Generator | None = None) -> list[Tensor]:
        """The samples in the given slots."""
        if self.joined is None:
            self.open(None)
        assert self.joined is not None
        return self.joined.batch(self.joined.split(indices), generator)

    def locate(self, indices: Tensor) -> None:
        """See ``Source``: the policy's samples may lie in several data sets."""
        return

    def _datasets(self) -> dict[Hashable, Any]:
        if isinstance(self.policy, BalancedExemplarsBuffer):
            return {k: group.buffer for k, group in self.policy.buffer_groups.items()}
        return {"all": self.policy.buffer}

    def __getstate__(self) -> dict[str, Any]:
        return {"policy": self.policy, "joined": None}
