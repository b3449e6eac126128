"""What BER, ER and Shuffle share: a memory, its place in the loader, its report.

A subclass says how a step draws from the memory (``draw``); everything else is here.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable
from typing import Any

import torch
from avalanche.benchmarks.utils.data_loader import TaskBalancedDataLoader
from avalanche.training.storage_policy import ExemplarsBuffer
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler, default_collate

from avalanche_ext.training.checks import CheckedPlugin
from avalanche_ext.training.loading.loader import ReplayLoader, ReplayPart, options_for
from avalanche_ext.training.loading.lookahead import LookAhead
from avalanche_ext.training.loading.resident_loader import ResidentLoader
from avalanche_ext.training.loading.sampling import Draw, GroupIndex
from avalanche_ext.training.loading.sources import DatasetSource, source_for
from avalanche_ext.training.publishing import publish
from avalanche_ext.training.storage_policy.exemplar_memory import ExemplarMemory, experience_key
from avalanche_ext.training.storage_policy.policy_memory import PolicyMemory

__all__ = ["DEFAULT_MEM", "ReplayTemplate"]

DEFAULT_MEM = 200


class ReplayTemplate(CheckedPlugin):
    """Base of the replay plugins.

    The loader is put in place when the epoch starts, after every plugin's
    ``before_training_exp``: so the order of the plugins does not matter, and a loader that
    another plugin has set is kept and added to. Until the memory holds something, Avalanche's
    own loader stays, so the first experience is plain training, bit for bit.

    Args:
        mem: Size of the memory, default 200; given by ``storage_policy`` if that is given.
        mem_scope: ``"experience"`` or ``"total"``, see ``ExemplarMemory``.
        group_by: What the memory's groups are, see ``ExemplarMemory``.
        storage_policy: A memory of ours or of Avalanche's, in place of the first three.
    """

    label = ""
    by_group = False  # whether ``draw`` looks at the groups of the memory

    def __init__(
        self,
        mem: int | None,
        mem_scope: str,
        group_by: str | None,
        storage_policy: ExemplarsBuffer | None,
    ) -> None:
        super().__init__()
        self.group_by = group_by
        if storage_policy is None:
            self.memory: ExemplarMemory | PolicyMemory = ExemplarMemory(
                DEFAULT_MEM if mem is None else mem, mem_scope=mem_scope, group_by=group_by
            )
            return
        if not isinstance(storage_policy, ExemplarsBuffer):
            raise TypeError(
                f"{self.label} expects storage_policy to be a memory of avalanche_ext or an "
                f"Avalanche ExemplarsBuffer; got {type(storage_policy).__name__}."
            )
        if mem is not None and mem != storage_policy.max_size:
            raise ValueError(
                f"{self.label} got mem={mem} and a storage_policy for {storage_policy.max_size} "
                f"samples; give one of the two."
            )
        if mem_scope != "experience":
            raise ValueError(
                f"{self.label} got mem_scope={mem_scope!r} and a storage_policy, which has a scope "
                f"of its own; give one of the two."
            )
        if isinstance(storage_policy, ExemplarMemory):
            own = storage_policy.group_by
            if group_by not in ("experience", own) and own is not None:
                raise ValueError(
                    f"{self.label} got group_by={group_by!r} and a storage_policy that is grouped "
                    f"by {own!r}; leave group_by out, or choose a memory of that grouping."
                )
            self.memory = storage_policy
        else:
            self.memory = PolicyMemory(storage_policy)

    _seed: int | None = None
    _name = ""
    _loaders = 0
    _checked = False

    @property
    def storage_policy(self) -> ExemplarsBuffer:
        """The memory as an Avalanche storage policy."""
        return self.memory.policy if isinstance(self.memory, PolicyMemory) else self.memory

    @property
    def bytes_remembered(self) -> int:
        """Bytes of exemplars held between experiences."""
        return self.memory.nbytes

    @abstractmethod
    def draw(self, strategy: Any, index: GroupIndex) -> Draw:
        """How one step of this experience draws from the memory."""

    # hooks ----------------------------------------------------------------------------------

    def before_train_dataset_adaptation(self, strategy: Any, **kwargs: Any) -> None:
        """Refuse an empty experience, and one whose groups the memory could not hold."""
        super().before_train_dataset_adaptation(strategy, **kwargs)
        self.memory.check_room(strategy.experience)
        self._checked = False
        twins = [p for p in strategy.plugins if getattr(p, "label", None) == self.label]
        self._name = f"{self.label} {twins.index(self)}"

    def before_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        """Put the memory into the loader."""
        if not len(self.memory):
            return
        loader = strategy.dataloader
        if isinstance(loader, ReplayLoader) and any(p.name == self._name for p in loader.parts):
            return  # a later epoch of the same experience
        index = self.memory.index(self.group_by if self.by_group else None)
        if self.group_by == "experience":
            # An experience that goes on (an online stream) is current, not past.
            index = index.without(self._current_key(strategy))
        if not len(index):
            return
        if self._seed is None:
            self._seed = torch.initial_seed()
        self._loaders += 1
        if isinstance(self.memory, PolicyMemory):
            self.memory.open(strategy)
        part = ReplayPart(
            name=self._name,
            source=self.memory,
            size=self.memory.size,
            index=index,
            draw=self.draw(strategy, index),
            seed=(self._seed, *self._name.encode(), self._loaders),
        )
        if isinstance(loader, ReplayLoader):
            strategy.dataloader = loader.with_part(part)
            return
        current = loader
        if _is_avalanches_own(loader, strategy):
            current = source_for(strategy, strategy.adapted_dataset)
            if isinstance(current, DatasetSource) and isinstance(self.memory, ExemplarMemory):
                self.memory.to(torch.device("cpu"))  # where worker processes can read
        strategy.dataloader = ReplayLoader(current, options_for(strategy, **kwargs), [part])

    def before_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        """Refuse to train on without the memory in the loader."""
        if self._checked or not len(self.memory):
            return
        loader = strategy.dataloader
        if isinstance(loader, LookAhead):
            loader = loader.loader
        parts = loader.parts if isinstance(loader, ReplayLoader) else []
        expected = len(self.memory.index().without(self._current_key(strategy)))
        if expected and not any(p.name == self._name for p in parts):
            raise ValueError(
                f"{self.label} put its loader in place, but another plugin replaced it with a "
                f"{type(loader).__name__} after that, so nothing would be replayed. Plugins must "
                f"set strategy.dataloader in before_training_exp."
            )

    def after_forward(self, strategy: Any, **kwargs: Any) -> None:
        """The loader of this experience has given a batch with what is replayed."""
        super().after_forward(strategy, **kwargs)
        self._checked = True

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Store exemplars of the experience; log how many and how large."""
        self.memory.post_adapt(strategy, strategy.experience)
        for name, value in (("Exemplars", len(self.memory)), ("Bytes", self.memory.nbytes)):
            publish(self, strategy, f"{self.label}_{name}", float(value))

    def __str__(self) -> str:
        return self.label

    # parts ----------------------------------------------------------------------------------

    def _current_key(self, strategy: Any) -> Hashable:
        return experience_key(strategy.experience, -1)


def _is_avalanches_own(loader: Any, strategy: Any) -> bool:
    """Whether the loader is the one that the strategy made for the current data alone."""
    if isinstance(loader, ResidentLoader):
        loader = loader.loader
    if type(loader) is DataLoader:
        return (
            loader.dataset is strategy.adapted_dataset
            and loader.batch_size == strategy.train_mb_size
            and loader.collate_fn is default_collate
            and type(loader.sampler) in (RandomSampler, SequentialSampler)
        )
    return type(loader) is TaskBalancedDataLoader
