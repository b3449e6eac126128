"""Avalanche's storage policies, seen as grouped slots."""

from __future__ import annotations

import pickle
from types import SimpleNamespace

import pytest
import torch
from avalanche.training.storage_policy import (
    ClassBalancedBuffer,
    ExperienceBalancedBuffer,
    ParametricBuffer,
    ReservoirSamplingBuffer,
)

from avalanche_ext.training.storage_policy.policy_memory import PolicyMemory
from tests.training.storage_policy.streams import stream

PARTS = stream([0] * 9 + [1] * 9, [2] * 9 + [3] * 9, [0] * 9 + [2] * 9, tasks=[0, 1, 2])
MAKERS = {
    "reservoir": ReservoirSamplingBuffer,
    "experience": ExperienceBalancedBuffer,
    "class": ClassBalancedBuffer,
    "parametric": lambda n: ParametricBuffer(n, groupby="class"),
}


def filled(name, mem=12, n=3):
    memory = PolicyMemory(MAKERS[name](mem))
    for k, exp in enumerate(PARTS[:n]):
        agent = SimpleNamespace(clock=SimpleNamespace(train_exp_counter=k))
        memory.post_adapt(agent, exp)
    return memory


def rows(memory, group_by=None):
    index = memory.index(group_by)
    parts = index.slots.split(index.counts.tolist())
    return {
        key: list(zip(*(c.tolist() for c in memory.gather(slots)), strict=True))
        for key, slots in zip(index.keys, parts, strict=True)
    }


@pytest.mark.parametrize("name", MAKERS)
def test_slots_are_the_samples_of_the_policys_buffer(name):
    memory = filled(name)
    mine = [(int(x[0]), y, t) for group in rows(memory).values() for x, y, t in group]
    theirs = [(int(x[0]), int(y), t) for x, y, t in memory.policy.buffer]
    assert sorted(mine) == sorted(theirs)
    assert len(memory) == memory.size == len(memory.index()) == len(theirs) == 12
    assert memory.max_size == 12
    assert memory.nbytes == 12 * (3 * 4 + 8 + 8)


@pytest.mark.parametrize(
    ("name", "group_by", "position"),
    [("class", None, 1), ("class", "experience", 1), ("parametric", "task", 1),
     ("experience", "class", 2), ("reservoir", "class", 1), ("reservoir", "task", 2)],
)  # fmt: skip
def test_groups_are_the_policys_own_or_else_by_label(name, group_by, position):
    found = rows(filled(name), group_by)
    assert len(found) > 1
    for key, group in found.items():
        assert {row[position] for row in group} == {key}


def test_a_policy_without_groups_cannot_be_drawn_from_by_experience():
    with pytest.raises(ValueError, match=r"ReservoirSamplingBuffer keeps no groups.*'experience'"):
        filled("reservoir").index("experience")


@pytest.mark.parametrize("name", MAKERS)
def test_an_empty_policy_is_an_empty_memory(name):
    memory = filled(name, n=0)
    assert (len(memory), memory.size, memory.nbytes, len(memory.index())) == (0, 0, 0, 0)


@pytest.mark.parametrize("name", ["experience", "class"])
def test_a_resized_policy_is_read_anew(name):
    memory = filled(name)
    rows(memory)
    memory.policy.resize(None, 6)
    for key, group in rows(memory).items():
        assert {row[1 if name == "class" else 2] for row in group} == {key}
    assert len(memory) == 6


@pytest.mark.parametrize("name", MAKERS)
def test_a_pickled_policy_reads_the_same(name):
    memory = filled(name)
    assert rows(pickle.loads(pickle.dumps(memory))) == rows(memory)


def test_reading_leaves_the_global_random_state_alone():
    memory, before = filled("class"), torch.get_rng_state()
    rows(memory)
    assert torch.equal(before, torch.get_rng_state())
