"""The loader against a hand-written loop of draws and look-ups."""

from __future__ import annotations

import gc
import pickle
import weakref

import pytest
import torch
from avalanche.benchmarks.utils.data_loader import ReplayDataLoader
from torch.utils.data import Dataset

from avalanche_ext.training.loading.loader import LoaderOptions, ReplayLoader, ReplayPart
from avalanche_ext.training.loading.sampling import (
    BalancedDraw,
    GroupIndex,
    MergeDraw,
    PerGroupDraw,
    UniformDraw,
    seeded,
)
from avalanche_ext.training.loading.sources import DatasetSource, JoinedSource, TensorSource
from tests.conftest import class_stream

GROUPS = {"a": [4, 1], "b": [0], "c": [5, 2, 3, 8]}  # slots 6 and 7 are free
INDEX = GroupIndex.of(GROUPS)
DRAWS = {
    "per group": PerGroupDraw(3),
    "max groups": PerGroupDraw(3, 2),
    "uniform": UniformDraw(4),
    "share": UniformDraw(4, share=True),
    "balanced": BalancedDraw(8),
    "merge": MergeDraw(),
}


def source(n, start):
    ids = torch.arange(start, start + n)
    return TensorSource([ids[:, None].float().expand(-1, 2).clone(), ids, ids % 5])


CURRENT, MEMORY = source(30, 0), source(9, 1000)


def part(draw, *, name="m", seed=(7, 1), index=INDEX, memory=MEMORY):
    return ReplayPart(name, memory, 9, index, draw, seed)


class OneByOne(DatasetSource):
    """Samples that cannot be gathered from a tensor, as worker processes read them."""

    def __init__(self, tensors):
        super().__init__(tensors)
        self.tensors = tensors

    def gather(self, indices, generator=None):
        return self.tensors.gather(indices)


def loader_of(draw, *, size=8, n=30, **options):
    current = CURRENT if n == 30 else source(n, 0)
    if options.get("num_workers"):
        current = OneByOne(current)
    return ReplayLoader(current, LoaderOptions(size, **options), [part(draw)])


def ids(batches):
    """Every row's id, after checking that all of a row's columns belong together."""
    found = []
    for x, y, t in batches:
        assert torch.equal(x, y[:, None].float().expand(-1, 2))
        assert torch.equal(t, y % 5)
        found.append(y.tolist())
    return found


def assert_equal(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert all(torch.equal(c, d) for c, d in zip(a, b, strict=True))


def by_hand(draw, *, epoch, size=8, shuffle=True, drop_last=False):
    """The same draws as a plain loop over lists."""
    seed = (7, 1)
    pool = list(range(30))
    if isinstance(draw, MergeDraw):
        pool += [1000 + s for slots in GROUPS.values() for s in slots]
    if shuffle:
        order = torch.randperm(len(pool), generator=seeded(*seed, epoch, -2))
        pool = [pool[i] for i in order.tolist()]
    generator = seeded(*seed, epoch)
    per_step = size - size // 2 if getattr(draw, "share", False) else size
    batches = []
    for start in range(0, len(pool), per_step):
        chunk = pool[start : start + per_step]
        if drop_last and len(chunk) < per_step:
            break
        keep, slots = draw.step(len(chunk), INDEX, generator)
        chunk = chunk[:keep] + [1000 + s for s in slots.tolist()]
        batches.append([i for i in chunk if i < 1000] + [i for i in chunk if i >= 1000])
    return batches


@pytest.mark.parametrize("options", [{}, {"shuffle": False}, {"drop_last": True}], ids=str)
@pytest.mark.parametrize("name", DRAWS)
def test_batches_equal_a_hand_written_loop(name, options):
    loader = loader_of(DRAWS[name], **options)
    for epoch in (1, 2, 3):
        assert ids(loader) == by_hand(DRAWS[name], epoch=epoch, **options)


@pytest.mark.parametrize(
    ("draw", "n", "size", "kept", "dropped"),
    [
        (PerGroupDraw(3), 30, 8, 4, 3),
        (PerGroupDraw(3), 32, 8, 4, 4),
        (PerGroupDraw(3), 5, 8, 1, 0),
        (UniformDraw(4, share=True), 30, 8, 8, 7),
        (UniformDraw(3, share=True), 30, 7, 8, 7),
        (BalancedDraw(8), 30, 8, 4, 3),
        (MergeDraw(), 30, 8, 5, 4),
        (MergeDraw(), 33, 8, 5, 5),
        (MergeDraw(), 1, 8, 1, 1),
    ],
)
def test_length_is_rounded_up_or_down(draw, n, size, kept, dropped):
    for drop_last, length in ((False, kept), (True, dropped)):
        loader = loader_of(draw, n=n, size=size, drop_last=drop_last)
        assert len(loader) == length == len(list(loader))


@pytest.mark.parametrize("name", ["per group", "max groups", "uniform", "share", "merge"])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_current_sample_comes_exactly_once_per_epoch(name, shuffle):
    loader = loader_of(DRAWS[name], shuffle=shuffle)
    for _ in range(2):
        current = [i for batch in ids(loader) for i in batch if i < 1000]
        assert sorted(current) == list(range(30))
        assert (current == list(range(30))) is (not shuffle)


def test_merged_slots_come_exactly_once_per_epoch_and_are_spread():
    loader = loader_of(MergeDraw())
    batches = [ids(loader) for _ in range(3)]
    for epoch in batches:
        slots = sorted(i - 1000 for batch in epoch for i in batch if i >= 1000)
        assert slots == [0, 1, 2, 3, 4, 5, 8]
        assert sum(any(i >= 1000 for i in batch) for batch in epoch) > 1
    assert batches[0] != batches[1] != batches[2]


def test_unshuffled_memory_follows_the_current_data():
    flat = [i for batch in ids(loader_of(MergeDraw(), shuffle=False)) for i in batch]
    assert flat == [*range(30), 1004, 1001, 1000, 1005, 1002, 1003, 1008]


def test_short_last_batch_keeps_its_whole_replayed_part():
    sizes = [len(b) for b in ids(loader_of(PerGroupDraw(3)))]
    assert sizes == [17, 17, 17, 15]


def test_epochs_differ_and_a_new_loader_repeats_them():
    loader = loader_of(PerGroupDraw(3))
    first, second = ids(loader), ids(loader)
    assert first != second
    again = loader_of(PerGroupDraw(3))
    assert [ids(again), ids(again)] == [first, second]


def test_an_epoch_that_was_broken_off_counts_as_one():
    loader = loader_of(UniformDraw(4))
    next(iter(loader))
    assert ids(loader) == by_hand(UniformDraw(4), epoch=2)


def test_loading_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    list(loader_of(PerGroupDraw(3)))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize("name", ["per group", "merge"])
def test_worker_processes_give_the_same_batches(name, persistent):
    plain = loader_of(DRAWS[name])
    workers = loader_of(DRAWS[name], num_workers=2, persistent_workers=persistent)
    before = torch.get_rng_state()
    for _ in range(2):
        assert_equal(list(workers), list(plain))
    assert torch.equal(before, torch.get_rng_state())


class Noisy(Dataset):
    """Six samples whose x is noise drawn when they are read."""

    def __len__(self):
        return 6

    def __getitem__(self, i):
        return torch.rand(2), i, 0

    @staticmethod
    def collate_fn(rows):
        x, y, t = zip(*rows, strict=True)
        return torch.stack(x), torch.tensor(y), torch.tensor(t)


@pytest.mark.parametrize("persistent", [True, False])
def test_random_transforms_differ_between_epochs_of_worker_processes(persistent):
    loader = ReplayLoader(
        DatasetSource(Noisy()),
        LoaderOptions(3, num_workers=1, persistent_workers=persistent),
        [part(UniformDraw(1))],
    )
    noise = [torch.cat([x[:3] for x, *_ in loader]).flatten().tolist() for _ in range(3)]
    assert len({v for epoch in noise for v in epoch}) == 3 * 12


@pytest.mark.parametrize("workers", [0, 1])
def test_a_pickled_loader_goes_on_where_it_was(workers):
    loader = loader_of(PerGroupDraw(3), num_workers=workers, persistent_workers=workers > 0)
    list(loader)
    between = pickle.loads(pickle.dumps(loader))
    inside_epoch = iter(loader)
    next(inside_epoch)
    inside = pickle.loads(pickle.dumps(loader))
    second = [[row.tolist() for row in batch] for batch in between]
    assert [b[1] for b in second] == by_hand(PerGroupDraw(3), epoch=2)
    assert ids(inside) == by_hand(PerGroupDraw(3), epoch=3)
    assert ids(inside_epoch) == by_hand(PerGroupDraw(3), epoch=2)[1:]


def test_order_in_which_parts_are_added_does_not_matter():
    second = part(UniformDraw(2), name="z", seed=(8,), memory=source(9, 2000))
    options = LoaderOptions(8)
    one = ReplayLoader(CURRENT, options, [part(MergeDraw())]).with_part(second)
    other = ReplayLoader(CURRENT, options, [second]).with_part(part(MergeDraw()))
    for _ in range(2):
        assert_equal(list(one), list(other))


def test_several_parts_add_their_rows_and_draw_independently():
    second = part(UniformDraw(2), name="z", seed=(8,), memory=source(9, 2000))
    loader = loader_of(PerGroupDraw(3)).with_part(second)
    alone = ids(loader_of(PerGroupDraw(3)))
    for both, one in zip(ids(loader), alone, strict=True):
        assert [i for i in both if i < 2000] == one
        assert sum(i >= 2000 for i in both) == 2


def test_the_smallest_share_decides_how_many_current_samples_stay():
    second = part(PerGroupDraw(1), name="z", seed=(8,))
    loader = loader_of(UniformDraw(4, share=True)).with_part(second)
    assert len(loader) == 8
    assert [len(b) for b in ids(loader)] == [4 + 4 + 3] * 7 + [2 + 4 + 3]


def test_a_loader_without_memory_is_refused():
    with pytest.raises(ValueError, match="at least one memory"):
        ReplayLoader(CURRENT, LoaderOptions(8), [])


def foreign():
    stream = class_stream(3, width=2).train_stream
    return ReplayDataLoader(
        stream[1].dataset, stream[0].dataset, batch_size=8, batch_size_mem=4, shuffle=True
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_rows_are_added_to_the_batches_of_another_loader(workers):
    torch.manual_seed(5)
    plain = [list(b) for b in foreign()]
    loader = ReplayLoader(foreign(), LoaderOptions(8, num_workers=workers), [part(PerGroupDraw(2))])
    assert len(loader) == len(plain) == 5
    generator = seeded(7, 1, 1)
    torch.manual_seed(5)
    for (x, y, t), theirs in zip(loader, plain, strict=True):
        n = len(theirs[0])
        assert n == 12
        assert all(torch.equal(a[:n], b) for a, b in zip((x, y, t), theirs, strict=True))
        _, slots = PerGroupDraw(2).step(8, INDEX, generator)
        assert y[n:].tolist() == (1000 + slots).tolist()
        assert torch.equal(x[n:, 0], y[n:].float())
        assert torch.equal(t[n:], y[n:] % 5)


@pytest.mark.parametrize("name", ["share", "balanced", "merge"])
def test_draws_that_reshape_current_data_refuse_another_loader(name):
    mine = part(DRAWS[name], name="mine")
    with pytest.raises(ValueError, match=r"\['mine'\].*ReplayDataLoader"):
        ReplayLoader(foreign(), LoaderOptions(8), [mine])
    adding = ReplayLoader(foreign(), LoaderOptions(8), [part(UniformDraw(1), name="adds")])
    with pytest.raises(ValueError, match=r"\['mine'\].*ReplayDataLoader"):
        adding.with_part(mine)


def test_current_data_without_the_task_labels_of_the_memory_are_refused():
    bare = TensorSource(CURRENT.columns[:2])
    with pytest.raises(ValueError, match=r"\[2, 3\] columns; both need the same"):
        list(ReplayLoader(bare, LoaderOptions(8), [part(UniformDraw(4))]))


@pytest.mark.parametrize("draw", [PerGroupDraw(3), MergeDraw()])
def test_workers_end_with_their_loader_without_waiting_for_the_garbage_collector(draw):
    loader = loader_of(draw, num_workers=1, persistent_workers=True)
    list(loader)
    next(iter(loader))
    workers = weakref.ref(loader._dataloader._iterator)
    gc.disable()
    try:
        del loader
        assert workers() is None
    finally:
        gc.enable()


def test_samples_in_tensors_are_gathered_here_whatever_workers_are_asked_for():
    options = LoaderOptions(8, num_workers=2, persistent_workers=True)
    loader = ReplayLoader(CURRENT, options, [part(PerGroupDraw(3))])
    assert [b[1].tolist() for b in loader] == by_hand(PerGroupDraw(3), epoch=1)
    assert loader._dataloader is None


def test_who_reads_what():
    one_by_one = OneByOne(CURRENT)
    assert JoinedSource([one_by_one, MEMORY], [30, 9]).for_workers
    assert not JoinedSource([CURRENT, MEMORY], [30, 9]).for_workers
    elsewhere = TensorSource([c.to("meta") for c in MEMORY.columns])
    assert not JoinedSource([one_by_one, elsewhere], [30, 9]).for_workers
