"""Pictures of what a run trains on and remembers, for TensorBoard."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from avalanche.training.plugins import SupervisedPlugin
from avalanche.training.storage_policy import ExemplarsBuffer

from avalanche_ext.evaluation.sample_grid import sample_grid
from avalanche_ext.experiments.checkpoint import random_state, set_random_state
from avalanche_ext.training.checks import check_count
from avalanche_ext.training.loading.sources import DatasetSource
from avalanche_ext.training.storage_policy.exemplar_memory import ExemplarMemory

__all__ = ["SampleGrids"]


class SampleGrids(SupervisedPlugin, supports_distributed=True):
    """Writes a grid of labelled images behind the first experiences.

    ``samples/current`` is drawn from what the experience was trained on (all of the stream for
    joint training), ``samples/memory`` from the exemplars kept; a second memory becomes
    ``samples/memory_2``. The step in TensorBoard is the experience's number. Pictures come behind
    experiences 0, 1, 2, 4, 8, 16, ...: on 391 experiences ten times. Samples that are no images
    are passed over.

    Images are seen through the evaluation transforms, without augmentation; exemplars that are
    kept in tensors as they are stored. Training does not notice: global random states are put
    back. Memories fill behind an experience too, so give this plugin behind those that hold them.

    Args:
        writer: TensorBoard's ``SummaryWriter``.
        n: Images in a grid.
        seed: Which ones.

    Raises:
        TypeError: If ``writer`` cannot write images.
        ValueError: If ``n`` is below 1.

    A pickle holds no writer. A copy from one has to be given one as ``writer`` before it is used.
    """

    def __init__(self, writer: Any, *, n: int = 32, seed: int = 0) -> None:
        super().__init__()
        if not hasattr(writer, "add_image"):
            raise TypeError(
                f"SampleGrids expects a SummaryWriter, such as TensorboardLogger(...).writer; got "
                f"{type(writer).__name__}."
            )
        check_count("SampleGrids", n=n)
        self.writer, self.n, self.seed = writer, n, seed
        self._experience = 0

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Note the experience's number: the clock may count on before this plugin's turn."""
        self._experience = strategy.clock.train_exp_counter

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Write the pictures, if it is their turn."""
        k = self._experience
        if k & (k - 1):  # neither 0 nor a power of two
            return
        before = random_state()  # evaluation transforms may be random too
        try:
            self._write("samples/current", strategy.adapted_dataset.eval())
            for m, memory in enumerate(_memories(strategy)):
                self._write(f"samples/memory{f'_{m + 1}' if m else ''}", _exemplars(memory))
        finally:
            set_random_state(before)

    def _write(self, tag: str, samples: Any) -> None:
        grid = sample_grid(samples, n=self.n, seed=self.seed + self._experience)
        if grid is not None:
            self.writer.add_image(tag, grid, self._experience)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "writer"}


def _memories(strategy: Any) -> Iterator[ExemplarsBuffer]:
    """The storage policies of the strategy and its plugins, each once."""
    seen: set[int] = set()
    for owner in (strategy, *strategy.plugins):
        policy = getattr(owner, "storage_policy", None)
        if isinstance(policy, ExemplarsBuffer) and id(policy) not in seen:
            seen.add(id(policy))
            yield policy


def _exemplars(policy: ExemplarsBuffer) -> Any:
    """A memory as a data set without augmentation."""
    return _Stored(policy) if isinstance(policy, ExemplarMemory) else policy.buffer.eval()


class _Stored:
    """The exemplars of one of our memories, as ``(x, y)``."""

    def __init__(self, memory: ExemplarMemory) -> None:
        self.memory = memory
        self.slots = memory.index().slots

    def __len__(self) -> int:
        return len(self.slots)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        slot = self.slots[i : i + 1]
        return _plain(self.memory, slot), int(self.memory.labels(slot)[0])


def _plain(source: Any, at: torch.Tensor) -> torch.Tensor:
    """One sample of a memory or a source before its random transforms."""
    located = source.locate(at)
    if located is not None:
        column, rows = located[0]
        return column[rows][0]
    if isinstance(source, DatasetSource):
        return source.dataset.eval()[int(at)][0]
    # A memory by reference: which sample of which source, asked without reading it.
    store = source._store
    owner, place = int(store._source_of[int(at)]), torch.from_numpy(store._index_of[at.numpy()])
    return _plain(store._sources[owner], place)
