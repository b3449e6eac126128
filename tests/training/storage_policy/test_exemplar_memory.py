"""What a memory keeps, against a slow list of everything seen."""

from __future__ import annotations

import pickle
import sys
from collections import Counter

import pytest
import torch
from avalanche.benchmarks.scenarios.online import split_online_stream

from avalanche_ext.training.loading.sampling import seeded
from avalanche_ext.training.storage_policy.exemplar_memory import (
    ClassBalancedMemory,
    ExemplarMemory,
    ExperienceBalancedMemory,
    ReservoirMemory,
)
from avalanche_ext.training.storage_policy.stores import TensorStore
from tests.conftest import class_stream
from tests.training.storage_policy.streams import all_held, experience, held, stream

MIXED = stream(
    [0] * 10 + [1] * 3,
    [2] * 8 + [0] * 6,
    [1] * 5 + [3],
    [0] * 4,
    [4, 3, 2, 1, 0] * 3,
    tasks=[0, 1, 1, 2, [0, 1, 2] * 5],
)


class Slow:
    """Keeps every sample with its priority, and sorts them all after each experience."""

    def __init__(self, mem, scope, group_by):
        self.mem, self.scope, self.group_by = mem, scope, group_by
        self.seen, self.updates = {}, 0

    def update(self, exp):
        self.updates += 1
        priority = torch.rand(
            len(exp.labels), generator=seeded(0, self.updates), dtype=torch.float64
        ).tolist()
        groups = {
            "experience": [self.updates] * len(exp.labels),
            "class": exp.labels,
            "task": exp.tasks,
            None: ["all"] * len(exp.labels),
        }[self.group_by]
        owner = self.updates if self.scope == "experience" else None
        rows = zip(groups, priority, range(exp.first, exp.first + len(groups)), strict=True)
        for group, p, number in sorted(rows, key=lambda row: str(row[0])):
            self.seen.setdefault((owner, group), []).append((p, number))

    def held(self):
        found = {}
        for owner in {o for o, _ in self.seen}:
            units = [key for key in self.seen if key[0] == owner]
            for i, key in enumerate(units):
                quota = self.mem // len(units) + (i < self.mem % len(units))
                best = sorted(self.seen[key], reverse=True)[:quota]
                found.setdefault(key[1], set()).update(number for _, number in best)
        return found


@pytest.mark.parametrize("mem", [5, 7, 16, 30, 1000])
@pytest.mark.parametrize("group_by", ["experience", "class", "task", None])
@pytest.mark.parametrize("scope", ["total", "experience"])
def test_memory_equals_a_slow_oracle_after_every_experience(scope, group_by, mem):
    torch.manual_seed(0)
    memory, oracle = (
        ExemplarMemory(mem, mem_scope=scope, group_by=group_by),
        Slow(mem, scope, group_by),
    )
    for seen, exp in enumerate(MIXED, 1):
        memory.post_adapt(None, exp)
        oracle.update(exp)
        assert held(memory) == oracle.held()
        assert len(memory) == sum(map(len, held(memory).values()))
        budget = mem if scope == "total" else mem * seen
        assert len(memory) <= budget
        assert memory.size <= budget
        assert len(memory._store) <= (mem if scope == "total" else 1.5 * budget)


@pytest.mark.parametrize("group_by", ["experience", "class", None])
def test_budget_holds_while_samples_are_written(group_by, monkeypatch):
    most, write = [], TensorStore.write

    def watched(store, slots, source, indices):
        write(store, slots, source, indices)
        most.append(max(len(memory), len(store), *(slots + 1).tolist()))

    monkeypatch.setattr(TensorStore, "write", watched)
    memory = ExemplarMemory(7, group_by=group_by)
    for exp in MIXED:
        memory.post_adapt(None, exp)
    assert max(most) == 7


@pytest.mark.parametrize(
    ("mem", "quotas"),
    [(10, [[10], [5, 5], [4, 3, 3], [3, 3, 2, 2]]), (7, [[7], [4, 3], [3, 2, 2], [2, 2, 2, 1]])],
)
def test_quotas_are_equal_with_the_remainder_to_the_first(mem, quotas):
    memory = ExperienceBalancedMemory(mem)
    for exp, expected in zip(stream(*[[k] * 20 for k in range(4)]), quotas, strict=True):
        memory.post_adapt(None, exp)
        assert memory.index().counts.tolist() == expected


def test_shrinking_keeps_a_subset_of_what_was_kept():
    memory, before = ClassBalancedMemory(24), {}
    for exp in stream(*[[2 * k, 2 * k + 1] * 30 for k in range(5)]):
        memory.post_adapt(None, exp)
        now = held(memory)
        assert all(now[key] <= before[key] for key in before)
        assert sum(map(len, now.values())) == 24
        before = now


def test_a_class_that_comes_back_shares_one_group_with_its_past():
    memory = ClassBalancedMemory(20)
    for exp in stream([0] * 50, [1] * 50, [0] * 50):
        memory.post_adapt(None, exp)
    kept = held(memory)
    assert {key: len(v) for key, v in kept.items()} == {0: 10, 1: 10}
    old, new = {i for i in kept[0] if i < 50}, {i for i in kept[0] if i >= 100}
    assert old | new == kept[0]
    assert old
    assert new


def test_fewer_samples_than_the_quota_are_all_kept():
    memory = ClassBalancedMemory(100)
    for exp in stream([0] * 3, [1] * 2 + [0] * 4):
        memory.post_adapt(None, exp)
    assert held(memory) == {0: {0, 1, 2, 5, 6, 7, 8}, 1: {3, 4}}


@pytest.mark.parametrize("group_by", ["experience", "class", None])
def test_mem_of_zero_stores_nothing(group_by):
    memory = ExemplarMemory(0, group_by=group_by)
    memory.post_adapt(None, MIXED[0])
    assert (len(memory), memory.nbytes, memory.size, len(memory.buffer)) == (0, 0, 0, 0)
    assert len(memory.index()) == 0
    with pytest.raises(IndexError, match="empty"):
        memory.gather(torch.tensor([0]))


@pytest.mark.parametrize(
    ("scope", "group_by", "labels", "needed"),
    [
        ("total", "class", [[0, 1, 2], [3]], 4),
        ("total", "experience", [[0], [0], [0], [0]], 4),
        ("experience", "class", [[0], [0, 1, 2, 3]], 4),
    ],
)
def test_too_small_a_budget_is_refused_before_anything_is_stored(scope, group_by, labels, needed):
    memory = ExemplarMemory(3, mem_scope=scope, group_by=group_by)
    *fine, last = stream(*[part * 5 for part in labels])
    for exp in fine:
        memory.post_adapt(None, exp)
    before, updates = held(memory), memory._updates
    with pytest.raises(ValueError, match=rf"mem=3 .* each of {needed} groups .*mem >= {needed}"):
        memory.check_room(last)
    with pytest.raises(ValueError, match="mem=3"):
        memory.post_adapt(None, last)
    assert (held(memory), memory._updates) == (before, updates)


def test_small_budget_is_refused_for_the_classes_of_one_origin_together():
    parts = [experience(4 * k, [k] * 4, origin=0) for k in range(3)]
    memory = ExemplarMemory(2, mem_scope="experience", group_by="class")
    memory.post_adapt(None, parts[0])
    memory.post_adapt(None, parts[1])
    with pytest.raises(ValueError, match="each of 3 groups"):
        memory.check_room(parts[2])
    memory.check_room(experience(12, [5] * 4, origin=1))


def test_resize_down_keeps_the_best_and_up_lets_new_ones_in():
    memory = ExperienceBalancedMemory(20)
    first, second, third = stream([0] * 30, [1] * 30, [2] * 30)
    memory.post_adapt(None, first)
    memory.post_adapt(None, second)
    before = held(memory)
    memory.resize(None, 7)
    after = held(memory)
    assert {k: len(v) for k, v in after.items()} == {1: 4, 2: 3}
    assert all(after[k] < before[k] for k in after)
    torch.manual_seed(0)
    small = ExperienceBalancedMemory(7)
    small.post_adapt(None, first)
    small.post_adapt(None, second)
    assert held(small) == after
    memory.resize(None, 30)
    assert held(memory) == after
    memory.post_adapt(None, third)
    assert {k: len(v) for k, v in held(memory).items()} == {1: 4, 2: 3, 3: 10}
    assert all(held(memory)[k] == after[k] for k in after)


def test_resize_per_experience_counts_for_each_experience():
    memory = ExemplarMemory(6, mem_scope="experience")
    for exp in stream([0] * 9, [1] * 9, [2] * 3):
        memory.post_adapt(None, exp)
    memory.resize(None, 4)
    assert memory.index().counts.tolist() == [4, 4, 3]
    memory.post_adapt(None, experience(21, [0] * 9))
    assert memory.index().counts.tolist() == [4, 4, 3, 4]


def test_resize_to_zero_forgets_everything():
    memory = ReservoirMemory(5)
    memory.post_adapt(None, MIXED[0])
    memory.resize(None, 0)
    memory.post_adapt(None, MIXED[1])
    assert (len(memory), memory.nbytes, len(memory.buffer)) == (0, 0, 0)


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        ({"mem": -1}, ValueError, "mem >= 0"),
        ({"mem": 2.5}, ValueError, "whole number mem"),
        ({"mem": float("inf")}, ValueError, "mem"),
        ({"mem": float("nan")}, ValueError, "mem"),
        ({"mem": "3"}, TypeError, "number mem"),
        ({"mem": True}, TypeError, "number mem"),
        ({"mem": 3, "mem_scope": "stream"}, ValueError, "mem_scope to be one of"),
        ({"mem": 3, "group_by": "label"}, ValueError, "group_by to be one of"),
    ],
)
def test_bad_arguments_are_named(kwargs, error, words):
    with pytest.raises(error, match=f"ExemplarMemory expects .*{words}"):
        ExemplarMemory(**kwargs)


@pytest.mark.parametrize("size", [-1, 2.5])
def test_bad_new_size_is_refused(size):
    memory = ReservoirMemory(5)
    with pytest.raises(ValueError, match="new_size"):
        memory.resize(None, size)
    assert memory.max_size == 5


def test_missing_labels_are_named():
    exp = experience(0, [0, 1])
    exp.dataset = torch.utils.data.TensorDataset(torch.zeros(2, 1), torch.zeros(2))
    with pytest.raises(ValueError, match=r"group_by='task' needs .*'targets_task_labels'"):
        ExemplarMemory(5, group_by="task").post_adapt(None, exp)


@pytest.mark.parametrize("make", [ReservoirMemory, ExperienceBalancedMemory, ClassBalancedMemory])
def test_every_sample_of_a_group_is_kept_equally_often(make):
    """300 seeds; an experience of 8, then 4, then 12 samples, two of them origins of one class."""
    counts, runs = Counter(), 300
    parts = stream([0] * 8, [0] * 4, [0] * 12)
    for seed in range(runs):
        torch.manual_seed(seed)
        memory = make(6)
        for exp in parts:
            memory.post_adapt(None, exp)
        counts.update(all_held(memory))
    by_experience = make is ExperienceBalancedMemory
    chance = [2 / n if by_experience else 6 / 24 for n in (8, 4, 12) for _ in range(n)]
    for number, p in enumerate(chance):
        assert abs(counts[number] - runs * p) < 4 * (runs * p * (1 - p)) ** 0.5


def test_per_experience_scope_grows_by_the_smaller_of_mem_and_n():
    memory, sizes = ExemplarMemory(5, mem_scope="experience"), []
    before = set()
    for exp in stream([0] * 9, [1] * 3, [2] * 5, [0] * 20):
        memory.post_adapt(None, exp)
        sizes.append(len(memory))
        assert before <= all_held(memory)
        before = all_held(memory)
    assert sizes == [5, 8, 13, 18]


@pytest.mark.parametrize("scope", ["total", "experience"])
def test_online_stream_is_grouped_by_the_experience_it_was_cut_from(scope):
    memory = ExemplarMemory(12, mem_scope=scope)
    parts = class_stream(3, n_per_class=10).train_stream
    seen = []
    for exp in split_online_stream(parts, 6, seed=1):
        memory.post_adapt(None, exp)
        if exp.origin_experience.current_experience not in seen:
            seen.append(exp.origin_experience.current_experience)
        index = memory.index()
        assert index.keys == tuple(("origin", k) for k in seen)
        assert len(memory) <= (12 if scope == "total" else 12 * len(seen))
        for (_, origin), slots in zip(
            index.keys, index.slots.split(index.counts.tolist()), strict=True
        ):
            assert set(memory.labels(slots)[0].tolist()) <= {2 * origin, 2 * origin + 1}
    assert memory.index().counts.tolist() == ([4, 4, 4] if scope == "total" else [12, 12, 12])


@pytest.mark.parametrize("group_by", ["class", None])
def test_a_reservoir_can_be_seen_by_label(group_by):
    memory = ReservoirMemory(1000)
    assert len(memory.index(group_by)) == 0
    for exp in MIXED:
        memory.post_adapt(None, exp)
    labels = [label for exp in MIXED for label in exp.labels]
    index = memory.index(group_by)
    wanted = Counter(labels) if group_by else {"all": len(labels)}
    assert dict(zip(index.keys, index.counts.tolist(), strict=True)) == wanted
    tasks = memory.index("task")
    assert tasks.counts.tolist() == [13 + 5, 14 + 6 + 5, 4 + 5]
    with pytest.raises(ValueError, match="cannot be drawn from by 'experience'"):
        memory.index("experience")


# cost -------------------------------------------------------------------------------------------

TINY = stream(*[[k % 10, (k + 3) % 10, k % 7] for k in range(400)])


@pytest.mark.parametrize(
    "make",
    [
        lambda: ReservoirMemory(50),
        lambda: ClassBalancedMemory(50),
        lambda: ExemplarMemory(2, mem_scope="experience"),
    ],
    ids=["reservoir", "class", "per experience"],
)
def test_work_per_experience_does_not_grow_over_400_experiences(make, monkeypatch):
    writes, calls, grown, per_step = [], Counter(), [], []
    write, module = TensorStore.write, sys.modules[TensorStore.__module__]
    copy = module._grown

    def watched_copy(column, rows):
        grown.append(len(column))
        return copy(column, rows)

    def watched_write(store, slots, source, indices):
        writes.append(len(indices))
        write(store, slots, source, indices)

    monkeypatch.setattr(TensorStore, "write", watched_write)
    monkeypatch.setattr(module, "_grown", watched_copy)
    memory = make()
    for exp in TINY:
        calls.clear()
        writes.clear()
        sys.setprofile(lambda frame, event, arg: calls.update([event]))
        try:
            memory.post_adapt(None, exp)
        finally:
            sys.setprofile(None)
        assert sum(writes) <= 3
        assert len(writes) <= 10
        per_step.append(calls["call"])
    early, late = sorted(per_step[60:160]), sorted(per_step[300:])
    assert abs(late[50] - early[50]) <= 0.1 * early[50]
    assert late[-1] <= 1.25 * early[-1]
    assert sum(grown) <= 3 * 3 * len(memory)  # 3 columns, each copied a bounded number of times


@pytest.mark.parametrize("make", [ReservoirMemory, ClassBalancedMemory], ids=["reservoir", "class"])
def test_a_memory_weighs_no_more_after_400_experiences_than_after_40(make):
    memory, weights = make(50), []
    for exp in TINY:
        memory.post_adapt(None, exp)
        weights.append(len(pickle.dumps(memory)))
    assert abs(weights[-1] - weights[39]) < 300
    assert len(memory) == memory.size == 50
