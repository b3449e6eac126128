"""What lies at the bottom of a tree of views, against the data set itself, sample by sample."""

from __future__ import annotations

import functools
import random

import numpy as np
import pytest
import torch
from avalanche.benchmarks.utils import AvalancheDataset, DataAttribute
from avalanche.benchmarks.utils.classification_dataset import (
    _make_taskaware_classification_dataset as classification_dataset,
)
from avalanche.benchmarks.utils.transform_groups import DefaultTransformGroups
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from avalanche_ext.training.loading.flat_data import attribute_values, extra_columns, leaves_of


class Digit:
    """Appends a digit: what comes out tells which transforms were applied, and in which order."""

    def __init__(self, digit):
        self.digit = digit

    def __call__(self, value):
        return value * 10 + self.digit


class Numbers(Dataset):
    """Sample ``i`` is ``(first + i, label)``."""

    def __init__(self, n, first=0):
        self.first = first
        self.targets = [(7 * i + first) % 5 for i in range(n)]

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, i):
        return self.first + range(len(self))[i], self.targets[i]


def made(n=9, first=1, groups=None, frozen=None, task=None):
    data = Numbers(n, first)
    tasks = [first % 3] * n if task is None else task
    dataset = classification_dataset(data, targets=data.targets, task_labels=tasks)
    if groups is None and frozen is None:
        return dataset
    return AvalancheDataset([dataset], transform_groups=groups, frozen_transform_groups=frozen)


def through_leaves(dataset):
    """Every sample, read at the bottom of the tree and taken up through the transforms."""
    rows = [None] * len(dataset)
    for leaf in leaves_of(dataset):
        places = np.arange(len(dataset))[leaf.where]
        assert len(places) == len(leaf.rows)
        assert leaf.rows.min() >= 0  # tensors are not indexed from the end
        for place, row in zip(places, leaf.rows, strict=True):
            element = functools.reduce(lambda e, t: t(*e), leaf.transforms, leaf.dataset[row])
            assert rows[place] is None
            rows[place] = list(element)
    return rows


def check(dataset):
    found = through_leaves(dataset)
    tasks = attribute_values(dataset, "targets_task_labels").tolist()
    assert extra_columns(dataset) == ["targets_task_labels"]
    for i, (mine, task) in enumerate(zip(found, tasks, strict=True)):
        assert [*mine, task] == list(dataset[i])
    targets = attribute_values(dataset, "targets")
    assert targets.dtype == torch.int64
    assert targets.tolist() == [int(v) for v in dataset.targets]


def train_and_eval(k):
    return {"train": (Digit(k), None), "eval": (Digit(k + 1), Digit(9))}


def grown(seed, steps=5):
    """A random tree of subsets, concatenations and transforms."""
    draw = random.Random(seed)
    trees = [made(9, first=10 * k + 1, task=None) for k in range(1, 4)]
    for _ in range(steps):
        tree = draw.choice(trees)
        step = draw.choice(["subset", "concat", "groups", "frozen", "freeze", "replace", "remove"])
        if step == "subset":
            picked = [draw.randrange(len(tree)) for _ in range(draw.randint(1, 14))]
            tree = tree.subset(draw.choice([list, np.array, tuple])(picked))
        elif step == "concat":
            tree = tree.concat(draw.choice(trees))
        elif step == "groups":
            tree = AvalancheDataset([tree], transform_groups=train_and_eval(draw.randint(1, 4)))
        elif step == "frozen":
            frozen = train_and_eval(draw.randint(5, 7))
            tree = AvalancheDataset([tree], frozen_transform_groups=frozen)
        elif step == "freeze":
            tree = tree.freeze_transforms()
        elif step == "replace":
            tree = tree.replace_current_transform_group((Digit(8), None))
        else:
            tree = tree.remove_current_transform_group()
        trees.append(tree)
    return trees


@pytest.mark.parametrize("group", ["train", "eval"])
@pytest.mark.parametrize("seed", range(40))
def test_random_trees(seed, group):
    for tree in grown(seed):
        check(tree.train() if group == "train" else tree.eval())


def test_one_leaf_without_a_transform():
    (leaf,) = leaves_of(made(5, first=100))
    assert leaf.rows.tolist() == [0, 1, 2, 3, 4]
    assert leaf.where == slice(None)
    assert leaf.transforms == ()
    assert isinstance(leaf.dataset, Numbers)


def test_transforms_come_innermost_first_and_frozen_ones_before_their_own():
    inner = made(3, groups=train_and_eval(1), frozen=train_and_eval(2))
    outer = AvalancheDataset([inner], transform_groups=train_and_eval(3))
    for dataset, digits in ((outer.train(), [2, 1, 3]), (outer.eval(), [3, 2, 4])):
        (leaf,) = leaves_of(dataset)
        assert [t.transforms[0].digit for t in leaf.transforms] == digits
        expected = int("1" + "".join(map(str, digits)))
        assert dataset[0][0] == expected
        check(dataset)


def test_the_current_group_is_that_of_the_root():
    data = AvalancheDataset([made(3, groups=train_and_eval(1))], transform_groups=train_and_eval(3))
    assert [d[0][0] for d in (data, data.train(), data.eval())] == [113, 113, 124]
    for dataset in (data, data.train(), data.eval()):
        check(dataset)


def test_default_groups_apply_in_every_group():
    data = made(3)
    data = AvalancheDataset([data], transform_groups=DefaultTransformGroups((Digit(6), Digit(7))))
    for dataset in (data.train(), data.eval(), data.train().subset([2, 0])):
        check(dataset)
        assert dataset[0][0] % 10 == 6


def test_a_sample_that_comes_twice_and_in_another_order():
    data = made(5, first=100).subset([4, 4, 0, 2])
    (leaf,) = leaves_of(data)
    assert leaf.rows.tolist() == [4, 4, 0, 2]
    check(data)


def test_places_of_interleaved_leaves():
    both = made(3, first=10).concat(made(3, first=20)).subset([5, 0, 4, 1])
    one, two = sorted(leaves_of(both), key=lambda leaf: leaf.dataset.first)
    assert (one.where.tolist(), one.rows.tolist()) == ([1, 3], [0, 1])
    assert (two.where.tolist(), two.rows.tolist()) == ([0, 2], [2, 1])
    check(both)


def test_only_leaves_that_are_touched():
    both = made(3, first=10).concat(made(3, first=20)).concat(made(2, first=30))
    leaves = leaves_of(both.subset([6, 7, 1]))
    assert sorted(leaf.dataset.first for leaf in leaves) == [10, 30]


@pytest.mark.parametrize("indices", [[-1], [2, -3, 0], [-9]])
@pytest.mark.parametrize("groups", [None, train_and_eval(1)])
def test_numbers_from_the_end(indices, groups):
    check(made(9, groups=groups).subset(indices))


def test_numbers_from_the_end_of_a_concatenation_count_in_its_first_part():
    both = made(4, first=10).concat(made(3, first=20))
    taken = both.subset([-1, 5])
    assert [row[0] for row in taken] == [13, 21]
    check_x = through_leaves(taken)
    assert [x for x, _ in check_x] == [13, 21]


@pytest.mark.parametrize("dataset", [AvalancheDataset([]), made(5).subset([])])
def test_an_empty_data_set_has_no_leaves(dataset):
    assert leaves_of(dataset) == []


@pytest.mark.parametrize(
    "dataset",
    [Numbers(3), [1, 2], TensorDataset(torch.zeros(2)), Subset(Numbers(3), [0]), None],
)
def test_a_foreign_data_set_has_no_leaves(dataset):
    assert leaves_of(dataset) == []


def test_views_of_torch_are_leaves():
    joined = ConcatDataset([Numbers(3), Numbers(2, 50)])
    dataset = classification_dataset(
        Subset(joined, [4, 0]), targets=[0, 0], task_labels=[0, 0]
    ).subset([1, 0, 1])
    (leaf,) = leaves_of(dataset)
    assert isinstance(leaf.dataset, Subset)
    assert leaf.rows.tolist() == [1, 0, 1]


# attributes -------------------------------------------------------------------------------------

VALUES = [3, 1, 4, 1, 5, 9, 2, 6]
KINDS = {
    "list": list,
    "tuple": tuple,
    "tensor": torch.tensor,
    "int32": lambda v: torch.tensor(v, dtype=torch.int32),
    "array": np.array,
    "bytes": lambda v: np.array(v, dtype=np.uint8),
    "tensors": lambda v: [torch.tensor(x) for x in v],
    "numpy numbers": lambda v: [np.int64(x) for x in v],
}


@pytest.mark.parametrize("kind", KINDS)
def test_attributes_of_any_kind(kind):
    data = AvalancheDataset(
        [Numbers(8)], data_attributes=[DataAttribute(KINDS[kind](VALUES), "flavour")]
    )
    for dataset, expected in (
        (data, VALUES),
        (data.subset([5]), [9]),
        (data.subset([0, 0, 7]), [3, 3, 6]),
        (data.concat(data.subset([1])), [*VALUES, 1]),
        (data.concat(data).subset([8, 7]).subset([1, 0, 0]), [6, 3, 3]),
    ):
        found = attribute_values(dataset, "flavour")
        assert found.dtype == torch.int64
        assert found.tolist() == expected


def test_constant_task_labels():
    data = classification_dataset(Numbers(6), targets=Numbers(6).targets, task_labels=4)
    other = classification_dataset(Numbers(3), targets=Numbers(3).targets, task_labels=2)
    both = data.concat(other)
    for dataset, expected in (
        (data, [4] * 6),
        (both, [4] * 6 + [2] * 3),
        (both.subset([8, 0, 7]), [2, 4, 2]),
        (data.subset([1, 1]).concat(other), [4, 4, 2, 2, 2]),
    ):
        assert attribute_values(dataset, "targets_task_labels").tolist() == expected


def test_an_attribute_that_is_not_there():
    assert attribute_values(AvalancheDataset([Numbers(3)]), "targets_task_labels") is None


def test_names_of_the_columns_behind_the_label():
    extra = [
        DataAttribute([0, 1, 2], "hidden"),
        DataAttribute([0, 1, 2], "shown", use_in_getitem=True),
    ]
    data = AvalancheDataset([Numbers(3)], data_attributes=extra)
    assert extra_columns(data) == ["shown"]
    assert extra_columns(data.subset([1])) == ["shown"]
    assert data[1] == [1, 2, 1]
