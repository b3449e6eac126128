"""Turn a data set into tensors on a device, and its random transforms into batched ones."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from avalanche.benchmarks.utils.transforms import MultiParamCompose, TupleTransform
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset
from torchvision.datasets import VisionDataset

from avalanche_ext.training.loading.batch_transforms import (
    MovedTransform,
    Normalize,
    ToFloat,
    UnmovableTransform,
    translate,
)
from avalanche_ext.training.loading.flat_data import (
    Leaf,
    attribute_values,
    extra_columns,
    leaves_of,
)
from avalanche_ext.training.loading.sources import (
    DatasetSource,
    TensorSource,
    agrees,
    tensor_source,
)

__all__ = ["Resident", "TooLarge", "layout_key", "make_resident"]

_CHUNK = 256
_TWICE = 8  # samples that are read twice
_TASKS = "targets_task_labels"


class TooLarge(ValueError):  # noqa: N818 - it names what is wrong with the data
    """The samples need more bytes than there are.

    Args:
        n: How many samples.
        row_bytes: Bytes of one.
        room: Bytes that are left.
    """

    def __init__(self, n: int, row_bytes: int, room: int) -> None:
        super().__init__(
            f"{n:,} samples of {row_bytes:,} bytes need {n * row_bytes:,} bytes, and {room:,} of "
            f"the budget are left."
        )
        self.row_bytes = row_bytes
        self.nbytes = n * row_bytes


@dataclass(frozen=True)
class Resident:
    """A data set on the device.

    Args:
        source: Its samples.
        nbytes: Bytes that were allocated for it; 0 if it is read from where it was.
        row_bytes: Bytes of one sample.
        keeps: What must stay alive for ``layout_key`` to stay valid.
    """

    source: TensorSource
    nbytes: int
    row_bytes: int
    keeps: tuple[Any, ...]


def layout_key(dataset: Any) -> tuple[Any, ...] | None:
    """Equal for two views of the same samples through the same transforms; ``None`` if unknown."""
    leaves = leaves_of(dataset)
    if not leaves:
        return None
    extra = extra_columns(dataset)
    # Task labels are the view's own: the same samples can be given to several tasks.
    tasks = attribute_values(dataset, _TASKS) if _TASKS in extra else None
    return (
        tuple(extra),
        None if tasks is None else tasks.numpy().tobytes(),
        *(
            (
                id(leaf.dataset),
                leaf.rows.tobytes(),
                None if isinstance(leaf.where, slice) else leaf.where.tobytes(),
                tuple(id(t) for t in leaf.transforms),
            )
            for leaf in leaves
        ),
    )


def make_resident(dataset: Any, device: torch.device, *, room: int, workers: int = 0) -> Resident:
    """The samples of ``dataset`` as tensors on ``device``; images stay uint8.

    torch's global random state is left alone, also where reading a sample draws from it.

    Args:
        dataset: An ``AvalancheDataset``.
        device: Where the tensors go. Tensors that are there already are not copied.
        room: Bytes that may be allocated.
        workers: Processes that read samples from disk.

    Raises:
        UnmovableTransform: If the data set's transforms cannot be applied to batches, or its
            samples cannot be stored as one tensor.
        TooLarge: If the samples need more than ``room``.
    """
    with torch.random.fork_rng(devices=[]):
        return _make_resident(dataset, torch.empty(0, device=device).device, room, workers)


def _make_resident(dataset: Any, device: torch.device, room: int, workers: int) -> Resident:
    leaves = leaves_of(dataset)
    if not leaves:
        raise UnmovableTransform(
            f"{type(dataset).__name__} is not a filled AvalancheDataset, so its samples and "
            f"transforms cannot be told apart."
        )
    if set(extra_columns(dataset)) - {_TASKS}:
        raise UnmovableTransform(
            f"samples carry {extra_columns(dataset)}; only task labels can be stored beside x, y."
        )
    readers = [_Reader.of(leaf) for leaf in leaves]
    batch = readers[0].moved.batch
    if any(reader.moved.batch != batch for reader in readers):
        raise UnmovableTransform("parts of the data set have different random transforms.")
    transform = batch if batch.steps else None
    exact = all(isinstance(step, ToFloat | Normalize) for step in batch.steps)
    found = None
    if len(leaves) == 1 and readers[0].plain:
        found = tensor_source(dataset, leaves[0])
    if found is not None:
        found.transform = transform
        if not agrees(found, dataset, compare_x=exact):
            found = None
    if found is not None and found.columns[0].device == device:
        source, allocates = found, False
    else:
        allocates = True
        if found is None:
            source = _read(dataset, leaves, readers, device, room, workers)
        else:
            source = _copied(found, device, room)
        source.transform = transform
        _check(source, dataset, exact=exact)
    row = _row_bytes(source.columns[0][:1], dataset)
    keeps = tuple((leaf.dataset, leaf.transforms) for leaf in leaves)
    return Resident(source, len(source) * row if allocates else 0, row, keeps)


@dataclass(frozen=True)
class _Reader:
    """How a leaf's samples are read: the bare data set, and what is done to ``x`` and to ``y``."""

    dataset: Any
    moved: MovedTransform
    y_steps: tuple[Callable[[Any], Any], ...]

    @property
    def plain(self) -> bool:
        """Whether samples are stored as they are."""
        return isinstance(self.dataset, TensorDataset) and not self.moved.prepare

    @classmethod
    def of(cls, leaf: Leaf) -> _Reader:
        dataset, own, y_own = _bare(leaf.dataset)
        moved = translate([*own, *leaf.transforms])
        y_steps = [*y_own, *(s for t in leaf.transforms for s in _y_steps(t))]
        return cls(dataset, moved, tuple(y_steps))

    def read(self, row: int) -> tuple[Tensor, int]:
        x, y = self.dataset[row][:2]
        for step in self.y_steps:
            y = step(y)
        return self.moved.store(x), _label(y)


def _label(y: Any) -> int:
    if isinstance(y, Tensor | np.ndarray) and y.ndim == 0:
        y = y.item()
    if isinstance(y, int | np.integer):
        return int(y)
    raise UnmovableTransform(f"labels must be whole numbers to be stored; got {y!r}.")


def _bare(dataset: Any) -> tuple[Any, list[Any], list[Any]]:
    """A leaf without the transforms that it applies itself, and those of ``x`` and of ``y``."""
    if type(dataset) is Subset:
        inner, x_own, y_own = _bare(dataset.dataset)
        return Subset(inner, dataset.indices), x_own, y_own
    if type(dataset) is ConcatDataset:
        inner, x_owns, y_owns = zip(*map(_bare, dataset.datasets), strict=True)
        if any(own != owns[0] for owns in (x_owns, y_owns) for own in owns):
            raise UnmovableTransform("parts of a ConcatDataset have different transforms.")
        return ConcatDataset(inner), x_owns[0], y_owns[0]
    own = getattr(dataset, "transform", None)
    if isinstance(dataset, VisionDataset):
        joint = getattr(dataset, "transforms", None)
        if joint is not None and type(joint).__name__ != "StandardTransform":
            raise UnmovableTransform(
                f"{type(dataset).__name__} transforms x and y together by {joint!r}; give it "
                f"transform= and target_transform= instead."
            )
        bare = copy.copy(dataset)
        bare.transform = bare.target_transform = bare.transforms = None
        target = dataset.target_transform
        return bare, [own] if own else [], [target] if target else []
    if own is not None:
        raise UnmovableTransform(
            f"{type(dataset).__name__} applies its own transform {own!r}; give it to Avalanche's "
            f"transform groups instead, where it can be seen."
        )
    return dataset, [], []


def _y_steps(transform: Any) -> list[Callable[[Any], Any]]:
    if isinstance(transform, TupleTransform):
        return [t for t in transform.transforms[1:2] if t is not None]
    if isinstance(transform, MultiParamCompose):
        return [step for t in transform.transforms for step in _y_steps(t)]
    if hasattr(transform, "flat_transforms") and transform.flat_transforms(1):
        raise UnmovableTransform(f"{transform!r} changes x and y together.")
    return []


class _Samples(Dataset):
    """Prepared samples of several leaves, for worker processes."""

    def __init__(self, leaves: list[Leaf], readers: list[_Reader]) -> None:
        self.readers = readers
        self.owner = np.empty(sum(len(leaf.rows) for leaf in leaves), dtype=np.int64)
        self.row = np.empty_like(self.owner)
        for k, leaf in enumerate(leaves):
            self.owner[leaf.where], self.row[leaf.where] = k, leaf.rows

    def __len__(self) -> int:
        return len(self.owner)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.readers[self.owner[i]].read(int(self.row[i]))


def _read(
    dataset: Any,
    leaves: list[Leaf],
    readers: list[_Reader],
    device: torch.device,
    room: int,
    workers: int,
) -> TensorSource:
    samples = _Samples(leaves, readers)
    first, _ = samples[0]
    _check_room(len(samples), _row_bytes(first, dataset), room)
    for i in np.linspace(0, len(samples) - 1, min(_TWICE, len(samples)), dtype=np.int64).tolist():
        if not torch.equal(samples[i][0], samples[i][0]):
            name = type(leaves[samples.owner[i]].dataset).__name__
            raise UnmovableTransform(f"{name} gives another sample each time it is read.")
    x = first.new_empty((len(samples), *first.shape), device=device)
    y = torch.empty(len(samples), dtype=torch.int64)
    loader = DataLoader(samples, _CHUNK, num_workers=workers, collate_fn=_stack)
    for k, (images, labels) in enumerate(loader):
        here = slice(k * _CHUNK, k * _CHUNK + len(labels))
        if images is None or images.shape[1:] != first.shape or images.dtype != first.dtype:
            raise UnmovableTransform(
                f"samples differ in shape or type (the first is {tuple(first.shape)}, "
                f"{first.dtype}); resize them to one size before any random transform."
            )
        x[here], y[here] = images.to(device), labels
    columns = [x, y.to(device)]
    if extra_columns(dataset):
        tasks = attribute_values(dataset, _TASKS)
        assert tasks is not None
        columns.append(tasks.to(device))
    return TensorSource(columns)


def _stack(samples: list[tuple[Tensor, int]]) -> tuple[Tensor | None, Tensor]:
    images = [x for x, _ in samples]
    alike = len({(x.shape, x.dtype) for x in images}) == 1
    return torch.stack(images) if alike else None, torch.tensor([y for _, y in samples])


def _copied(source: TensorSource, device: torch.device, room: int) -> TensorSource:
    row = sum(column[:1].nbytes for column in source.columns)
    _check_room(len(source), row, room)
    located = source.locate(torch.arange(len(source)))
    return TensorSource([c.index_select(0, rows).to(device) for c, rows in located])


def _row_bytes(x: Tensor, dataset: Any) -> int:
    """Bytes of one sample with its label and, where it has one, its task label."""
    return x.nbytes + 8 + 8 * len(extra_columns(dataset))


def _check_room(n: int, row: int, room: int) -> None:
    if n * row > room:
        raise TooLarge(n, row, room)


def _check(source: TensorSource, dataset: Any, *, exact: bool) -> None:
    """Compare a few samples with what the data set itself gives."""
    probe = torch.tensor(sorted({0, len(dataset) // 2, len(dataset) - 1}))
    with torch.random.fork_rng(devices=[]):
        mine, theirs = source.gather(probe), DatasetSource(dataset).gather(probe)
    same = len(mine) == len(theirs) and all(
        a.shape == b.shape and a.dtype == b.dtype and (torch.equal(a.cpu(), b) or not (k or exact))
        for k, (a, b) in enumerate(zip(mine, theirs, strict=True))
    )
    if not same:
        raise UnmovableTransform(
            "samples on the device differ from those of the data set itself: "
            + "; ".join(f"{tuple(a.shape)} {a.dtype}" for a in (*mine, *theirs))
        )
