"""The bookkeeping of an episodic memory: which slot belongs to whom, and who keeps its place."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from avalanche_ext.training.loading.sampling import GroupIndex

__all__ = ["Ledger", "Unit"]

# What has a quota: (owner of the budget, group). The units of one owner share its budget equally.
Unit = tuple[Hashable, Hashable]


class Ledger:
    """Slots, each with the unit that it belongs to and the priority of its sample.

    A unit keeps its samples of highest priority. Everything is held in two flat tensors, so that
    neither memory nor time grows with the number of groups beyond a few bytes for its name.
    """

    def __init__(self) -> None:
        self._owners: dict[Hashable, dict[Unit, int]] = {}  # owner -> its units' numbers
        self._groups: dict[Hashable, int] = {}  # group -> its number
        self._group_of: list[int] = []  # group number of each unit
        self._unit_of = torch.zeros(0, dtype=torch.int64)  # of each slot; -1 is free
        self._priority = torch.zeros(0, dtype=torch.float64)
        self._taken = 0
        self._index: GroupIndex | None = None

    def __len__(self) -> int:
        return self._taken

    @property
    def size(self) -> int:
        """One more than the largest slot number ever used."""
        return len(self._unit_of)

    def units_of(self, owner: Hashable) -> list[Unit]:
        """The units that share the owner's budget, oldest first."""
        return list(self._owners.get(owner, ()))

    def admit(
        self, units: Sequence[Unit], unit_of: Tensor, priority: Tensor, budget: int
    ) -> tuple[Tensor, Tensor]:
        """Let new samples compete for the budget of their owner.

        Args:
            units: The units that the samples belong to, all of one owner.
            unit_of: Position in ``units`` for each sample, ``(N,)``.
            priority: Priority of each sample, ``(N,)``.
            budget: Slots of the owner.

        Returns:
            The samples to store, ``(K,)``, and their slots, ``(K,)``. What lost its place is free
            already, so the budget is kept at any moment.
        """
        rivals = self._owners.setdefault(units[0][0], {})
        old = self._slots_of(rivals)
        for unit in units:
            self._number(unit, rivals)
        numbers = torch.tensor([rivals[unit] for unit in units])[unit_of]
        kept = self._best(
            torch.cat([self._unit_of[old], numbers]),
            torch.cat([self._priority[old], priority]),
            _quotas(rivals, budget),
        )
        self._unit_of[old[~kept[: len(old)]]] = -1
        chosen = torch.nonzero(kept[len(old) :])[:, 0]
        slots = self._free(len(chosen))
        self._unit_of[slots] = numbers[chosen]
        self._priority[slots] = priority[chosen]
        self._changed()
        return chosen, slots

    def shrink(self, budget: int) -> None:
        """Free the slots that go beyond a budget, for every owner."""
        for rivals in self._owners.values():
            old = self._slots_of(rivals)
            kept = self._best(self._unit_of[old], self._priority[old], _quotas(rivals, budget))
            self._unit_of[old[~kept]] = -1
        self._changed()

    def index(self) -> GroupIndex:
        """The taken slots by group, groups in the order of first storage."""
        if self._index is None:
            slots = torch.nonzero(self._unit_of >= 0)[:, 0]
            group_of = torch.tensor(self._group_of, dtype=torch.int64)[self._unit_of[slots]]
            counts = group_of.bincount(minlength=len(self._groups))
            held = itertools.compress(self._groups, (counts > 0).tolist())
            order = group_of.argsort(stable=True)
            self._index = GroupIndex(tuple(held), slots[order], counts[counts > 0])
        return self._index

    def _number(self, unit: Unit, rivals: dict[Unit, int]) -> None:
        if unit not in rivals:
            rivals[unit] = len(self._group_of)
            self._group_of.append(self._groups.setdefault(unit[1], len(self._groups)))

    @staticmethod
    def _best(unit_of: Tensor, priority: Tensor, quotas: dict[int, int]) -> Tensor:
        """Whether each sample is among its unit's ``quota`` samples of highest priority."""
        unit_of = torch.bucketize(unit_of, torch.tensor(list(quotas)))  # 0, 1, ... within the owner
        quota = torch.tensor(list(quotas.values()))
        order = priority.argsort(descending=True, stable=True)
        order = order[unit_of[order].argsort(stable=True)]
        units = unit_of[order]
        counts = units.bincount(minlength=len(quota))
        rank = torch.arange(len(units)) - (counts.cumsum(0) - counts)[units]
        kept = torch.empty(len(units), dtype=torch.bool)
        kept[order] = rank < quota[units]
        return kept

    def _slots_of(self, rivals: dict[Unit, int]) -> Tensor:
        if not rivals:
            return torch.zeros(0, dtype=torch.int64)
        return torch.nonzero(torch.isin(self._unit_of, torch.tensor(list(rivals.values()))))[:, 0]

    def _free(self, n: int) -> Tensor:
        free = torch.nonzero(self._unit_of < 0)[:n, 0]
        more = n - len(free)
        fresh = torch.arange(self.size, self.size + more)
        self._unit_of = torch.cat([self._unit_of, torch.full((more,), -1)])
        self._priority = torch.cat([self._priority, torch.zeros(more, dtype=torch.float64)])
        return torch.cat([free, fresh])

    def _changed(self) -> None:
        self._taken = int((self._unit_of >= 0).sum())
        self._index = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_index": None}


def _quotas(rivals: dict[Unit, int], budget: int) -> dict[int, int]:
    """Slots of each unit number: equal parts, the remainder to the oldest."""
    share, rest = divmod(budget, len(rivals))
    return {number: share + (i < rest) for i, number in enumerate(rivals.values())}
