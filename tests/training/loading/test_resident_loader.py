"""Batches gathered from tensors, against the loader that they stand for."""

from __future__ import annotations

import itertools
import pickle

import pytest
import torch
from avalanche.benchmarks.utils.classification_dataset import (
    _make_taskaware_classification_dataset as classification_dataset,
)
from avalanche.benchmarks.utils.data_loader import (
    GroupBalancedDataLoader,
    GroupBalancedInfiniteDataLoader,
    MultiDatasetDataLoader,
    ReplayDataLoader,
    SingleDatasetDataLoader,
    TaskBalancedDataLoader,
)
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

from avalanche_ext.training.distributed import share
from avalanche_ext.training.loading.residence import make_resident
from avalanche_ext.training.loading.resident_loader import ResidentLoader, datasets_of
from avalanche_ext.training.loading.sampling import seeded


def data(n, *, first=0, tasks=0):
    """Samples that carry their own number."""
    ids = torch.arange(first, first + n)
    tensors = TensorDataset(ids[:, None].float().expand(-1, 3).clone(), ids % 7)
    task_labels = [tasks] * n if isinstance(tasks, int) else tasks
    return classification_dataset(tensors, targets=(ids % 7).tolist(), task_labels=task_labels)


D30, D13, D5 = data(30), data(13, first=100, tasks=1), data(5, first=200, tasks=2)
THREE_TASKS = data(34, tasks=[0] * 21 + [1] * 9 + [2] * 4)


class Lazy(BatchSampler):
    """Draws every batch from the global state when it is asked for."""

    def __init__(self, n, size, steps):
        super().__init__(RandomSampler(range(n)), size, False)
        self.n, self.steps = n, steps

    def __len__(self):
        return self.steps

    def __iter__(self):
        for _ in range(self.steps):
            yield torch.randint(self.n, (self.batch_size,)).tolist()


def generator():
    return torch.Generator().manual_seed(11)


LOADERS = {
    "in order": lambda: DataLoader(D30, 8),
    "shuffled": lambda: DataLoader(D30, 8, shuffle=True),
    "last dropped": lambda: DataLoader(D30, 8, shuffle=True, drop_last=True),
    "all dropped": lambda: DataLoader(D5, 8, shuffle=True, drop_last=True),
    "one batch": lambda: DataLoader(D5, 8, shuffle=True),
    "one by one": lambda: DataLoader(D5, 1, shuffle=True),
    "own generator": lambda: DataLoader(D30, 8, shuffle=True, generator=generator()),
    "replacement": lambda: DataLoader(D30, 8, sampler=RandomSampler(D30, True, 70)),
    "more than all": lambda: DataLoader(D30, 8, sampler=RandomSampler(D30, num_samples=70)),
    "weighted": lambda: DataLoader(D30, 8, sampler=WeightedRandomSampler([1.0] * 30, 17)),
    "batch sampler": lambda: DataLoader(D30, batch_sampler=[[4, 4, 2], [29], [0, 7]]),
    "lazy": lambda: DataLoader(D30, batch_sampler=Lazy(30, 6, 5)),
    "its collate": lambda: DataLoader(D30, 8, shuffle=True, collate_fn=D30.collate_fn),
    "avalanche, one": lambda: SingleDatasetDataLoader(D30, 8, shuffle=True),
    "avalanche, in order": lambda: SingleDatasetDataLoader(D30, 8, shuffle=False),
    "avalanche, dropped": lambda: SingleDatasetDataLoader(D30, 8, shuffle=True, drop_last=True),
    "avalanche, generator": lambda: SingleDatasetDataLoader(
        D30, 8, shuffle=True, generator=generator()
    ),
    "one task": lambda: TaskBalancedDataLoader(D30, 8, shuffle=True, oversample_small_groups=True),
    "three tasks": lambda: TaskBalancedDataLoader(THREE_TASKS, 8, shuffle=True),
    "three tasks, again": lambda: TaskBalancedDataLoader(
        THREE_TASKS, 8, oversample_small_groups=True, shuffle=True
    ),
    "three tasks, dropped": lambda: TaskBalancedDataLoader(
        THREE_TASKS, 8, oversample_small_groups=True, shuffle=True, drop_last=True
    ),
    "different sizes": lambda: GroupBalancedDataLoader([D5, D30, D13], batch_size=8, shuffle=True),
    "different sizes, again": lambda: GroupBalancedDataLoader(
        [D5, D30, D13], oversample_small_groups=True, batch_size=8, shuffle=True
    ),
    "ends with the first": lambda: MultiDatasetDataLoader(
        [D13, D30], [3, 4], termination_dataset=0, shuffle=True
    ),
    "ends with the second": lambda: MultiDatasetDataLoader(
        [D13, D30], [3, 4], termination_dataset=1, oversample_small_datasets=True, shuffle=True
    ),
    "replay": lambda: ReplayDataLoader(D30, D13, batch_size=8, batch_size_mem=4, shuffle=True),
    "replay, again": lambda: ReplayDataLoader(
        D30, D5, oversample_small_tasks=True, batch_size=6, batch_size_mem=4, shuffle=True
    ),
    "replay by task": lambda: ReplayDataLoader(
        D30, THREE_TASKS, oversample_small_tasks=True, batch_size=6, batch_size_mem=7,
        task_balanced_dataloader=True, shuffle=True,
    ),
    "generator of several": lambda: GroupBalancedDataLoader(
        [D5, D30], oversample_small_groups=True, batch_size=8, shuffle=True, generator=generator()
    ),
}  # fmt: skip


def resident(loader, *, transform=None, **kwargs):
    sources = [
        make_resident(d, torch.device("cpu"), room=10**9).source for d in datasets_of(loader)
    ]
    for source in sources:
        source.transform = transform
    return ResidentLoader(loader, sources, **kwargs)


def epochs(loader, *, draws):
    """Two epochs; between two batches the model draws too, as dropout does."""
    torch.manual_seed(5)
    found = []
    for _ in range(2):
        epoch = []
        for batch in loader:
            epoch.append([c.tolist() for c in batch])
            torch.rand(draws)
        found.append((epoch, torch.get_rng_state().tolist()))
    return found


@pytest.mark.parametrize("draws", [0, 3])
@pytest.mark.parametrize("name", LOADERS)
def test_the_same_batches_and_random_states(name, draws):
    expected = epochs(LOADERS[name](), draws=draws)
    loader = resident(LOADERS[name]())
    found = epochs(loader, draws=draws)
    assert found == expected
    lengths = {len(epoch) for epoch, _ in found}
    assert lengths == {len(loader)} == {len(LOADERS[name]())}
    for x, y, t in found[0][0][:1]:
        assert [round(row[0]) % 7 for row in x] == y
        assert len(t) == len(y)


@pytest.mark.parametrize("name", ["in order", "replacement", "lazy", "avalanche, one", "replay"])
def test_batches_are_tensors_of_the_same_kind(name):
    one, other = (next(iter(make(LOADERS[name]()))) for make in (lambda d: d, resident))
    assert isinstance(other, list)
    assert [(c.dtype, c.shape) for c in one] == [(c.dtype, c.shape) for c in other]


def test_a_loader_that_never_ends():
    def endless():
        return GroupBalancedInfiniteDataLoader([D30, D5], batch_size=4, shuffle=True)

    def first(loader):
        torch.manual_seed(5)
        batches = [[c.tolist() for c in b] for b in itertools.islice(loader, 25)]
        return batches, torch.get_rng_state().tolist()

    assert first(resident(endless())) == first(endless())


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda **kw: DataLoader(D30, 8, shuffle=True, **kw),
        lambda **kw: SingleDatasetDataLoader(D30, 8, shuffle=True, **kw),
    ],
)
def test_random_states_of_a_loader_with_worker_processes(make, persistent):
    expected = epochs(make(num_workers=1, persistent_workers=persistent), draws=2)
    assert epochs(resident(make(num_workers=1, persistent_workers=persistent)), draws=2) == expected


# transforms and shares --------------------------------------------------------------------------


def noise(x, generator):
    return x + torch.rand(x.shape, generator=generator)


@pytest.mark.parametrize("name", ["shuffled", "three tasks, again"])
def test_random_transforms_draw_from_a_generator_of_their_own(name):
    def once(seed=(3, 1)):
        return epochs(resident(LOADERS[name](), transform=noise, seed=seed), draws=0)

    plain = epochs(LOADERS[name](), draws=0)
    found, again, other = once(), once(), once((3, 2))
    assert found == again
    assert found != other
    for mine, others, theirs in zip(found, other, plain, strict=True):
        assert mine[1] == theirs[1]
        assert [b[1:] for b in mine[0]] == [b[1:] for b in others[0]] == [b[1:] for b in theirs[0]]
    (first, _), (second, _) = found
    shift = [
        torch.tensor(b[0]) - torch.tensor(a[0])
        for b, a in ((first[0], plain[0][0][0]), (second[0], plain[1][0][0]))
    ]
    assert not torch.allclose(*shift, atol=1e-3)
    draws = seeded(3, 1, 1, 0)
    torch.testing.assert_close(shift[0], torch.rand(shift[0].shape, generator=draws))


@pytest.mark.parametrize("name", ["shuffled", "three tasks, again", "replay"])
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_each_batch(name, world):
    torch.manual_seed(5)
    whole = [[c.tolist() for c in b] for b in LOADERS[name]()]
    shares, rows = [], []
    for rank in range(world):
        torch.manual_seed(5)
        loader = resident(LOADERS[name](), shard=(rank, world))
        shares.append([])
        for batch in loader:
            shares[-1].append([c.tolist() for c in batch])
            rows.append(loader.global_rows)
    assert rows == [len(b[1]) for b in whole] * world
    for k, (x, *_) in enumerate(whole):
        for rank in range(world):
            (expected,) = share([torch.tensor(x)], rank, world)
            assert shares[rank][k][0] == expected.tolist()


@pytest.mark.parametrize("name", LOADERS)
def test_the_number_of_rows_is_known(name):
    loader = resident(LOADERS[name]())
    for batch in loader:
        assert loader.global_rows == len(batch[0])


@pytest.mark.parametrize("name", ["shuffled", "avalanche, one", "replay, again"])
def test_a_pickled_loader_goes_on_with_the_next_epoch(name):
    loader = resident(LOADERS[name]())
    torch.manual_seed(5)
    iterator = iter(loader)
    next(iterator)
    twin = pickle.loads(pickle.dumps(loader))
    assert twin.epoch == 1
    assert epochs(twin, draws=1) == epochs(loader, draws=1)


# what is recognised -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOADERS)
def test_data_sets_of_known_loaders(name):
    loader = LOADERS[name]()
    found = datasets_of(loader)
    if isinstance(loader, DataLoader):
        assert found == [loader.dataset]
    else:
        assert all(a is b for a, b in zip(found, loader.datasets, strict=True))
        assert found is not loader.datasets


def own_collate(rows):
    return default_collate(rows)


class OwnLoader(DataLoader):
    pass


class OwnOrder(SingleDatasetDataLoader):
    def __iter__(self):
        return reversed(list(super().__iter__()))


class Endless(IterableDataset):
    def __iter__(self):
        yield torch.zeros(2), 0


UNKNOWN = {
    "list": lambda: [1, 2],
    "nothing": lambda: None,
    "subclass": lambda: OwnLoader(D30, 8),
    "own order": lambda: OwnOrder(D30, 8),
    "collate": lambda: DataLoader(D30, 8, collate_fn=own_collate),
    "avalanche's collate": lambda: SingleDatasetDataLoader(D30, 8, collate_fn=own_collate),
    "no batches": lambda: DataLoader(D30, batch_size=None),
    "iterable": lambda: DataLoader(Endless(), 8),
    "a tensor data set's collate": lambda: DataLoader(
        Subset(D30, [0]), 8, collate_fn=lambda rows: rows
    ),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_other_loaders_are_left_alone(name):
    assert datasets_of(UNKNOWN[name]()) is None
