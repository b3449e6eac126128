"""Episodic memories of exemplars: balanced over experiences, classes or tasks, or a reservoir.

They are Avalanche storage policies (``ReplayPlugin(storage_policy=...)`` takes them), but keep
their samples in tensors where that is possible, never rebuild what did not change, and never hold
more samples than their budget.

Every sample of the stream draws a uniform priority once; a group keeps its samples of highest
priority. So each group is at any moment a uniform random subset of all its samples so far, also
after its quota has shrunk and when its class comes back (reservoir sampling, Vitter 1985, by
random keys).
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from avalanche.benchmarks.utils import as_taskaware_classification_dataset
from avalanche.benchmarks.utils.data import AvalancheDataset
from avalanche.benchmarks.utils.data_attribute import DataAttribute
from avalanche.training.storage_policy import ExemplarsBuffer
from torch import Generator, Tensor
from torch.utils.data import Dataset

from avalanche_ext.training.checks import check_nonnegative, check_one_of
from avalanche_ext.training.loading.flat_data import attribute_values
from avalanche_ext.training.loading.sampling import GroupIndex, seeded
from avalanche_ext.training.loading.sources import Located, as_source, source_for
from avalanche_ext.training.storage_policy.ledger import Ledger, Unit
from avalanche_ext.training.storage_policy.stores import (
    ReferenceStore,
    TensorStore,
    raw_sample,
    store_for,
)

__all__ = [
    "ClassBalancedMemory",
    "ExemplarMemory",
    "ExperienceBalancedMemory",
    "ReservoirMemory",
    "experience_key",
]

GROUPINGS = ("experience", "class", "task", None)
SCOPES = ("experience", "total")


class ExemplarMemory(ExemplarsBuffer):
    """Exemplars in groups, under a budget.

    Args:
        mem: Budget in samples, see ``mem_scope``; 0 stores nothing.
        mem_scope: ``"total"``: ``mem`` samples in all, ``mem // groups`` for each group and one
            more for the first ``mem % groups``. ``"experience"``: every experience adds up to
            ``mem`` samples and none is ever dropped, as in the tables of Chen et al. (2020);
            split over the groups of that experience.
        group_by: What the groups are: ``"experience"``, ``"class"``, ``"task"``, or ``None`` for
            one group, a reservoir of the whole stream.

    Raises:
        ValueError: For a bad argument; when an experience comes whose groups the budget cannot
            give one sample each.
    """

    def __init__(
        self, mem: int, *, mem_scope: str = "total", group_by: str | None = "experience"
    ) -> None:
        self._check_size(mem=mem)
        check_one_of(type(self).__name__, "mem_scope", mem_scope, SCOPES)
        check_one_of(type(self).__name__, "group_by", group_by, GROUPINGS)
        super().__init__(int(mem))
        self.mem_scope = mem_scope
        self.group_by = group_by
        self._store: TensorStore | ReferenceStore | None = None
        self._ledger = Ledger()
        self._updates = 0
        self._seed: int | None = None
        self._tensor_labels = False  # a collate function takes either tensors or numbers

    def _check_size(self, **size: Any) -> None:
        check_nonnegative(type(self).__name__, **size)
        for name, value in size.items():
            if value % 1 != 0:
                raise ValueError(
                    f"{type(self).__name__} expects a whole number {name}; got {value}."
                )

    # what is stored -------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._ledger)

    @property
    def nbytes(self) -> int:
        """Bytes of the exemplars and their labels."""
        return len(self) * self._store.bytes_per_sample() if self._store is not None else 0

    @property
    def size(self) -> int:
        """One more than the largest slot number."""
        return self._ledger.size

    def index(self, group_by: str | None = None) -> GroupIndex:
        """The slots by group; a reservoir can be seen by ``"class"`` or ``"task"`` too."""
        if self.group_by is None and group_by is not None and len(self):
            return _by_label(self, group_by)
        return self._ledger.index()

    def labels(self, indices: Tensor) -> list[Tensor]:
        """Labels and, where there are any, task labels of the given slots."""
        return self._store.labels(indices) if self._store is not None else []

    @property
    def transform(self) -> Any:
        """What ``gather`` does to the rows that ``locate`` finds."""
        return self._store.transform if self._store is not None else None

    def gather(self, indices: Tensor, generator: Generator | None = None) -> list[Tensor]:
        """The samples in the given slots, as a batch (see ``training.loading.sources.Source``)."""
        if self._store is None:
            raise IndexError("the memory is empty")
        return self._store.gather(indices, generator)

    def locate(self, indices: Tensor) -> Located | None:
        """Tensors and rows of the given slots; ``None`` where samples are kept by reference."""
        return self._store.locate(indices) if self._store is not None else None

    @property
    def buffer(self) -> AvalancheDataset:
        """The exemplars as an Avalanche data set, built on demand for Avalanche's own plugins."""
        if not len(self):
            return AvalancheDataset([])
        slots = self.index().slots
        stored: Any = _Stored(self, slots)
        targets, *tasks = self.labels(slots)
        values: Any = targets.tolist()
        attributes = [DataAttribute(values, "targets")]
        if not tasks:
            return AvalancheDataset([stored], data_attributes=attributes)
        values = tasks[0].tolist()
        attributes.append(DataAttribute(values, "targets_task_labels", use_in_getitem=True))
        dataset: Any = AvalancheDataset([stored], data_attributes=attributes)
        return as_taskaware_classification_dataset(dataset)

    @buffer.setter
    def buffer(self, new_buffer: AvalancheDataset) -> None:
        if len(new_buffer):  # Avalanche's constructor assigns an empty one
            raise AttributeError("the buffer of an ExemplarMemory follows from what it stores")

    # updates --------------------------------------------------------------------------------

    def check_room(self, experience: Any) -> None:
        """Raise if the groups that ``experience`` brings would leave a group without a sample."""
        if self.max_size == 0:
            return
        groups = self._groups_of(experience).unique().tolist()
        keys = self._unit_keys(experience, groups, self._updates + 1)
        rivals = {*keys, *self._ledger.units_of(keys[0][0])}
        if self.max_size < len(rivals):
            kind = self.group_by or "group"
            where = "in total" if self.mem_scope == "total" else "per experience"
            raise ValueError(
                f"mem={self.max_size} {where} cannot hold one sample for each of {len(rivals)} "
                f"groups (group_by={self.group_by!r}: one group per {kind}). Use mem >= "
                f"{len(rivals)}, another group_by, or mem_scope='experience'."
            )

    def post_adapt(self, agent: Any, exp: Any) -> None:
        """Store samples of the experience that has just been trained on.

        Args:
            agent: The strategy. If one of its plugins keeps data on the device, exemplars are
                copied there and stay there.
            exp: The experience; its training transforms apply at replay.
        """
        if self.max_size == 0:
            return
        self.check_room(exp)
        self._updates += 1
        self._seed = torch.initial_seed() if self._seed is None else self._seed
        dataset = exp.dataset.train()
        source = source_for(agent, dataset)
        if self._store is None:
            self._tensor_labels = isinstance(raw_sample(dataset, 0)[1], Tensor)
            self._store = store_for(source, self.max_size if self.mem_scope == "total" else None)
        elif not self._store.accepts(source):
            self._refer_to_old_store()
        if isinstance(self._store, ReferenceStore):
            source = as_source(dataset)  # a reference must not keep a whole experience in tensors
        priorities = self._priorities(agent, exp, source)
        groups, group_of = self._groups_of(exp).unique(return_inverse=True)
        units = self._unit_keys(exp, groups.tolist(), self._updates)
        chosen, slots = self._ledger.admit(units, group_of, priorities, self._budget(units))
        self._store.write(slots, source, chosen)

    def to(self, device: torch.device) -> None:
        """Move exemplars that are kept in tensors."""
        if isinstance(self._store, TensorStore):
            self._store.to(device)

    def resize(self, strategy: Any, new_size: int) -> None:
        """Change the budget; a smaller one drops the samples of lowest priority at once."""
        self._check_size(new_size=new_size)
        self.max_size = int(new_size)
        self._ledger.shrink(self.max_size)

    def _refer_to_old_store(self) -> None:
        """Samples of another shape or kind have come: go on with references, also to the old."""
        old, used = self._store, torch.arange(self.size)
        self._store = ReferenceStore()
        self._store.write(used, old, used)  # type: ignore[arg-type]

    def _priorities(self, agent: Any, exp: Any, source: Any) -> Tensor:
        """One number per new sample; a group keeps its largest."""
        assert self._seed is not None
        generator = seeded(self._seed, self._updates)
        return torch.rand(len(source), generator=generator, dtype=torch.float64)

    def _budget(self, units: list[Unit]) -> int:
        """Samples that the groups of these units' owner may have together."""
        return self.max_size

    # groups ---------------------------------------------------------------------------------

    def _groups_of(self, experience: Any) -> Tensor:
        dataset = experience.dataset
        if self.group_by in ("class", "task"):
            name = "targets" if self.group_by == "class" else "targets_task_labels"
            values = attribute_values(dataset, name)
            if values is None:
                raise ValueError(
                    f"group_by={self.group_by!r} needs the data set's {name!r}; it has none. Use "
                    f"a benchmark that gives them, or group_by='experience'."
                )
            return values
        return torch.zeros(len(dataset), dtype=torch.int64)

    def _unit_keys(self, experience: Any, groups: list[int], position: int) -> list[Unit]:
        now = experience_key(experience, position)
        owner = now if self.mem_scope == "experience" else None
        if self.group_by == "experience":
            return [(owner, now)]
        if self.group_by is None:
            return [(owner, "all")]
        return [(owner, group) for group in groups]

    def __getstate__(self) -> dict[str, Any]:
        if self._store is not None:
            self._store.trim(self.size)
        return dict(self.__dict__)


class ExperienceBalancedMemory(ExemplarMemory):
    """``mem`` exemplars in all, divided equally over the experiences seen."""

    def __init__(self, mem: int) -> None:
        super().__init__(mem, group_by="experience")


class ClassBalancedMemory(ExemplarMemory):
    """``mem`` exemplars in all, divided equally over the classes seen."""

    def __init__(self, mem: int) -> None:
        super().__init__(mem, group_by="class")


class ReservoirMemory(ExemplarMemory):
    """``mem`` exemplars, at any moment a uniform random subset of the stream so far."""

    def __init__(self, mem: int) -> None:
        super().__init__(mem, group_by=None)


def experience_key(experience: Any, position: int) -> Hashable:
    """What identifies an experience as a group: its place in the order of training.

    The small experiences of an online stream belong to the experience that they were cut from.
    """
    origin = getattr(experience, "origin_experience", None)
    return position if origin is None else ("origin", origin.current_experience)


class _Stored(Dataset):
    """The memory's slots as a data set of ``(x, y)``."""

    def __init__(self, memory: ExemplarMemory, slots: Tensor) -> None:
        self.memory, self.slots = memory, slots

    def __len__(self) -> int:
        return len(self.slots)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor | int]:
        x, y = self.memory.gather(self.slots[i : i + 1])[:2]
        return x[0], y[0] if self.memory._tensor_labels else int(y[0])


def _by_label(memory: ExemplarMemory, group_by: str) -> GroupIndex:
    slots, labels = memory.index().slots, memory.labels(memory.index().slots)
    position = {"class": 0, "task": 1}.get(group_by, len(labels))
    if position >= len(labels):
        raise ValueError(
            f"a memory without groups cannot be drawn from by {group_by!r}; use "
            f"group_by='class', or a memory that is grouped by {group_by}."
        )
    values = labels[position]
    return GroupIndex.of({int(v): slots[values == v] for v in values.unique()})
