"""Herding against a slow reading of its definition, and the memory's budget."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from avalanche_ext import HerdingMemory
from avalanche_ext.training.storage_policy.herding import herding_order
from tests.conftest import class_stream


def slow_order(features, n):
    """As written in the authors' code, in plain Python floats."""
    rows = [[float(v) for v in row] for row in features]
    mean = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    w, chosen = list(mean), []
    for _ in range(1000):
        if len(chosen) == n:
            break
        scores = [sum(a * b for a, b in zip(w, row, strict=True)) for row in rows]
        best = scores.index(max(scores))
        if best not in chosen:
            chosen.append(best)
        w = [a + m - z for a, m, z in zip(w, mean, rows[best], strict=True)]
    return chosen


@pytest.mark.parametrize("seed", range(5))
def test_the_order_is_the_definitions(seed):
    generator = torch.Generator().manual_seed(seed)
    z = nn.functional.normalize(torch.randn(30, 6, generator=generator, dtype=torch.float64), dim=1)
    assert herding_order(z, 12).tolist() == slow_order(z, 12)
    assert herding_order(z, 7).tolist() == herding_order(z, 12).tolist()[:7]


def test_by_hand():
    # Unit vectors at 0, 90 and 45 degrees: the mean points to 45, so the third is first; then
    # w = 2 mean - z_3 = (.43, .43), a tie that the first wins.
    s = 2**-0.5
    z = torch.tensor([[1.0, 0.0], [0.0, 1.0], [s, s]], dtype=torch.float64)
    assert herding_order(z, 3).tolist() == [2, 0, 1]


def test_the_mean_of_the_exemplars_follows_the_mean():
    generator = torch.Generator().manual_seed(0)
    z = nn.functional.normalize(torch.randn(400, 16, generator=generator) + 0.5, dim=1)
    herded = (z[herding_order(z, 20)].mean(0) - z.mean(0)).norm()
    drawn = [(z[torch.randperm(400, generator=generator)[:20]].mean(0) - z.mean(0)).norm()
             for _ in range(50)]  # fmt: skip
    assert herded < 0.5 * min(drawn)


def test_equal_samples_do_not_hang_it():
    assert sorted(herding_order(torch.ones(5, 3), 4).tolist()) == sorted(
        set(herding_order(torch.ones(5, 3), 4).tolist())
    )


class Identity(nn.Module):
    def super_feature(self, x):
        return x


class Agent:
    def __init__(self):
        self.model, self.device, self.eval_mb_size, self.plugins = (
            Identity(), torch.device("cpu"), 8, [],
        )  # fmt: skip


def test_quotas_are_floors_and_old_classes_keep_a_prefix():
    stream, memory = class_stream(3), HerdingMemory(25)
    seen = []
    for n, experience in zip((12, 6, 4), stream.train_stream, strict=True):
        memory.post_adapt(Agent(), experience)
        x, y = memory.gather(memory.index().slots)[:2]
        classes, counts = y.unique(return_counts=True)
        assert len(classes) == 2 * (len(seen) + 1)
        assert counts.tolist() == [n] * len(classes)  # 25 // 2, 25 // 4, 25 // 6
        assert len(memory) <= 25
        seen.append({int(c): x[y == c] for c in classes})
    for earlier, later in itertools.pairwise(seen):
        for c, x in earlier.items():
            for row in later[c]:
                assert bool((x == row).all(1).any())
    # What is left of the first class is the front of its herding order.
    dataset = stream.train_stream[0].dataset.eval()
    c = min(seen[0])
    rows = torch.stack([dataset[i][0] for i in range(len(dataset)) if dataset.targets[i] == c])
    z = nn.functional.normalize(rows.double(), dim=1)
    expected = rows[herding_order(z, 4)]
    assert {tuple(r) for r in seen[-1][c].tolist()} == {tuple(r) for r in expected.tolist()}


def test_a_number_for_each_class():
    memory = HerdingMemory(mem_per_class=3)
    for k, experience in enumerate(class_stream(3).train_stream):
        memory.post_adapt(Agent(), experience)
        assert len(memory) == 6 * (k + 1)


def test_bad_arguments():
    for options in ({}, {"mem": 5, "mem_per_class": 2}):
        with pytest.raises(ValueError, match="mem or mem_per_class"):
            HerdingMemory(**options)
    agent = Agent()
    agent.model = nn.Linear(3, 3)
    with pytest.raises(TypeError, match="super_feature"):
        HerdingMemory(20).post_adapt(agent, class_stream(3).train_stream[0])
    with pytest.raises(ValueError, match="one sample for each of 2"):
        HerdingMemory(1).post_adapt(Agent(), class_stream(3).train_stream[0])
