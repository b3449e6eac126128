"""DeviceData: keep an experience's samples in tensors on the device and gather batches from them.

A loader that reads, transforms and collates sample by sample costs more than the training step of
a small network; on an accelerator it leaves the device waiting. With this plugin in the list, the
samples of an experience are turned into tensors on the strategy's device once (images stay uint8),
a batch is one gather, and random transforms are applied to the batch.

What it does, and what it leaves alone:
    1. Batches hold the same samples in the same order as without the plugin, and torch's global
       random state moves on as it would have: without random transforms, training gives the same
       weights, bit for bit, with Avalanche's loaders and with ours.
    2. Random transforms (crop, flip, colour jitter) have torchvision's distribution, not its
       draws: they come from a generator of the plugin's own, seeded by torch's initial seed.
    3. Exemplars of our memories are copied from the tensors on the device and stay there. Those of
       Avalanche's storage policies are copied to the device when an experience begins.
    4. The budget counts what the plugin allocates: the current experience, evaluated experiences,
       replay buffers of Avalanche. Tensors that are on the device already are read from where
       they are and cost nothing. What was used longest ago makes room.
    5. Data that do not fit, or whose transforms cannot be applied to batches, are read by a
       ``DataLoader`` with ``workers`` processes, and a warning says why (``fallback="error"``
       raises instead). So is a loader of another plugin that is not of a kind known here left
       alone, with a warning.
    6. Hooks that nobody follows are not called (``avalanche_ext.training.lean_hooks``).

Cost: memory for the experience, at most ``budget``; one pass over the data when it first comes.
"""

from __future__ import annotations

import math
import re
import warnings
from typing import Any

import torch
from avalanche.benchmarks.utils.data_loader import MultiDatasetDataLoader
from avalanche.training.plugins import SupervisedPlugin
from torch.utils.data import DataLoader

from avalanche_ext.training import lean_hooks
from avalanche_ext.training.checks import check_one_of
from avalanche_ext.training.distributed import rank_and_world
from avalanche_ext.training.loading.batch_transforms import UnmovableTransform, translate
from avalanche_ext.training.loading.loader import ReplayLoader
from avalanche_ext.training.loading.residence import (
    Resident,
    TooLarge,
    layout_key,
    make_resident,
)
from avalanche_ext.training.loading.resident_loader import ResidentLoader, datasets_of
from avalanche_ext.training.loading.sampling import seeded
from avalanche_ext.training.loading.sources import TensorSource

__all__ = ["DeviceDataPlugin"]

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


class DeviceDataPlugin(SupervisedPlugin, supports_distributed=True):
    """Train and evaluate on tensors that stay on the strategy's device.

    Args:
        budget: Bytes that may be allocated for them, a number or a text such as ``"500MB"`` or
            ``"2GiB"``.
        augment: A torchvision transform (or ``Compose``) for training batches, on top of the data
            set's own transforms; random crop, flips, colour jitter, conversion to float and
            normalisation can be applied to batches.
        workers: Processes of the ``DataLoader`` for data that cannot be kept.
        fallback: ``"warn"`` reads such data with that ``DataLoader`` and says why; ``"error"``
            raises.

    Raises:
        ValueError: For a bad argument; when training starts, if the budget does not hold a single
            batch; with ``fallback="error"``, for data that do not fit.
        UnmovableTransform: For an ``augment`` that cannot be applied to batches; with
            ``fallback="error"``, for data whose transforms cannot.
    """

    def __init__(
        self,
        budget: int | float | str = "2GiB",
        *,
        augment: Any = None,
        workers: int = 2,
        fallback: str = "warn",
    ) -> None:
        super().__init__()
        self.budget = _bytes(budget)
        check_one_of("DeviceDataPlugin", "fallback", fallback, ("warn", "error"))
        if not isinstance(workers, int) or workers < 0:
            raise ValueError(f"DeviceDataPlugin expects workers to be 0 or more; got {workers!r}.")
        moved = translate(augment)
        if moved.prepare:
            raise UnmovableTransform(
                f"DeviceDataPlugin got augment={augment!r}: {moved.prepare[0]!r} is for single "
                f"samples; give it to the data set's transforms."
            )
        self.augment = moved.batch if moved.batch.steps else None
        self.fallback_workers = workers
        self.fallback = fallback
        self._residents: dict[Any, Resident] = {}
        self._in_use: set[Any] = set()
        self._refused: dict[Any, Any] = {}  # with what must stay alive for the keys to be valid
        self._warned: set[str] = set()
        self._seed: int | None = None
        self._epochs = 0
        self._draws: torch.Generator | None = None

    @property
    def bytes_allocated(self) -> int:
        """Bytes of the tensors that the plugin keeps at present."""
        return sum(resident.nbytes for resident in self._residents.values())

    def resident_source(self, strategy: Any, dataset: Any) -> TensorSource | None:
        """The samples of ``dataset`` on the strategy's device; ``None`` if they cannot be there."""
        key = layout_key(dataset)
        if strategy.is_training:
            self._in_use.add(key)
        if key in self._residents:
            self._residents[key] = self._residents.pop(key)  # used last
            return self._residents[key].source
        if key in self._refused:
            return None
        try:
            resident = self._make(strategy, dataset)
        except (TooLarge, UnmovableTransform) as reason:
            if self.fallback == "error":
                raise
            if key is not None and isinstance(reason, UnmovableTransform):
                self._refused[key] = dataset  # not to be read through again in each epoch
            self._warn(
                type(reason).__name__ if isinstance(reason, TooLarge) else str(reason),
                f"{reason} They are read by a DataLoader with {self.fallback_workers} worker "
                f"processes instead, which is slower.",
            )
            return None
        self._residents[key] = resident
        return resident.source

    # hooks ----------------------------------------------------------------------------------

    def before_train_dataset_adaptation(self, strategy: Any, **kwargs: Any) -> None:
        """The tensors of the experience before may go; views that cost nothing do."""
        for key in self._in_use & self._residents.keys():
            if not self._residents[key].nbytes:  # it would keep the experience's data set alive
                del self._residents[key]
        self._in_use, self._refused = set(), {}

    def before_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        """Gather this epoch's batches from tensors."""
        self._seed = torch.initial_seed() if self._seed is None else self._seed
        self._epochs += 1
        self._draws = seeded(self._seed, self._epochs, -4, rank_and_world(strategy)[0])
        loader = strategy.dataloader
        if not isinstance(loader, ReplayLoader):
            strategy.dataloader = self._on_device(strategy, loader, rank_and_world(strategy))
        elif not loader.sharded:  # memory rows on top of another plugin's loader
            loader.current = self._on_device(strategy, loader.current, (0, 1))
        lean_hooks.install(strategy, lean_hooks.TRAIN_EVENTS)

    def before_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        """Augment the batch."""
        if self.augment is not None:
            strategy.mbatch[0] = self.augment(strategy.mbatch[0], self._draws)

    def after_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        """Leave the strategy as it was between epochs."""
        lean_hooks.remove(strategy, lean_hooks.TRAIN_EVENTS)

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Likewise after an epoch that was stopped before it began."""
        lean_hooks.remove(strategy, lean_hooks.TRAIN_EVENTS)

    def before_eval_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Gather the evaluated experience's batches from tensors."""
        strategy.dataloader = self._on_device(strategy, strategy.dataloader, (0, 1))
        lean_hooks.install(strategy, lean_hooks.EVAL_EVENTS)

    def after_eval_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Leave the strategy as it was between experiences."""
        lean_hooks.remove(strategy, lean_hooks.EVAL_EVENTS)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_residents": {}, "_in_use": set(), "_refused": {}}  # read again

    def __str__(self) -> str:
        return "DeviceData"

    # parts ----------------------------------------------------------------------------------

    def _on_device(self, strategy: Any, loader: Any, shard: tuple[int, int]) -> Any:
        """``loader`` with its samples gathered from the device, or the best there is instead."""
        if isinstance(loader, ResidentLoader):
            return loader
        datasets = datasets_of(loader)
        if datasets is None:
            self._warn(
                type(loader).__name__,
                f"the {type(loader).__name__} that another plugin has put in place is left as it "
                f"is: its samples cannot be gathered on the device.",
            )
            return loader
        found = [self.resident_source(strategy, dataset) for dataset in datasets]
        sources = [source for source in found if source is not None]
        if len(sources) < len(datasets):
            return _with_workers(loader, self.fallback_workers)
        seed = (0 if self._seed is None else self._seed, self._epochs, -5)
        return ResidentLoader(loader, sources, seed=seed, shard=shard)

    def _make(self, strategy: Any, dataset: Any) -> Resident:
        device = torch.device(strategy.device)
        workers = self.fallback_workers
        while True:
            room = self.budget - self.bytes_allocated
            try:
                resident = make_resident(dataset, device, room=room, workers=workers)
            except TooLarge as error:
                self._check_one_batch(strategy, error)
                if error.nbytes > self.budget or not self._drop_oldest():
                    raise
            else:
                return resident

    def _drop_oldest(self) -> bool:
        """Give back what was used longest ago; whether there was anything."""
        for key, resident in self._residents.items():
            if resident.nbytes and key not in self._in_use:
                del self._residents[key]
                return True
        return False

    def _check_one_batch(self, strategy: Any, error: TooLarge) -> None:
        needed = error.row_bytes * strategy.train_mb_size
        if needed > self.budget:
            raise ValueError(
                f"DeviceDataPlugin(budget={self.budget:,} bytes) does not hold one batch: "
                f"{strategy.train_mb_size} samples of {error.row_bytes:,} bytes need {needed:,}. "
                f"Raise the budget, or leave the plugin out."
            )

    def _warn(self, kind: str, text: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(f"DeviceDataPlugin: {text}", stacklevel=2)


def _with_workers(loader: Any, workers: int) -> Any:
    """The same loader with worker processes, unless it has some.

    They start anew in each epoch: a loader whose workers stay cannot be pickled while it has them,
    and draws less from torch's global random state than the loader it stands for.
    """
    if isinstance(loader, MultiDatasetDataLoader):
        if not loader.loader_kwargs.get("num_workers"):
            loader.loader_kwargs = {**loader.loader_kwargs, "num_workers": workers}
        return loader
    if loader.num_workers or not workers:
        return loader
    return DataLoader(
        loader.dataset,
        batch_sampler=loader.batch_sampler,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        generator=loader.generator,
        worker_init_fn=loader.worker_init_fn,
        num_workers=workers,
    )


def _bytes(budget: int | float | str) -> int:
    expected = "a number of bytes above 0, or a text such as '500MB' or '2GiB'"
    value: float = -1
    if isinstance(budget, str):
        match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([KMG]i?)?B?\s*", budget, re.IGNORECASE)
        if match is not None:
            value = float(match[1]) * _UNITS[(match[2] or "").upper()]
    elif isinstance(budget, int | float) and not isinstance(budget, bool):
        value = budget
    if not 1 <= value < math.inf:
        raise ValueError(f"DeviceDataPlugin expects budget to be {expected}; got {budget!r}.")
    return int(value)
