"""A source gives exactly what the Avalanche data set gives, sample by sample."""

from __future__ import annotations

from collections import Counter
from typing import ClassVar

import numpy as np
import pytest
import torch
from avalanche.benchmarks import (
    class_incremental_benchmark,
    nc_benchmark,
    ni_benchmark,
    tensors_benchmark,
)
from avalanche.benchmarks.utils import make_avalanche_dataset
from avalanche.benchmarks.utils.classification_dataset import (
    _make_taskaware_classification_dataset as classification_dataset,
)
from avalanche.benchmarks.utils.data_attribute import DataAttribute
from PIL import Image
from torch.utils.data import Dataset, TensorDataset

from avalanche_ext.training.loading.flat_data import attribute_values
from avalanche_ext.training.loading.sources import (
    DatasetSource,
    JoinedSource,
    TensorSource,
    as_source,
    join_batches,
)
from tests.conftest import blobs


def nc(part=1, **kwargs):
    kwargs = {"task_labels": False, "seed": 3, **kwargs}
    return nc_benchmark(blobs(), blobs(seed=1), 3, **kwargs).train_stream[part].dataset


def ni():
    return ni_benchmark(blobs(), blobs(), 3, task_labels=False, seed=1).train_stream[1].dataset


def tensors(part=1, labels=(0, 4)):
    x, y = blobs().tensors
    y = y.flip(0)
    stream = tensors_benchmark(
        train_tensors=[(x[:50], y[:50]), (x[50:], y[50:])],
        test_tensors=[(x, y)],
        task_labels=list(labels),
    ).train_stream
    return stream[part].dataset


def raw(part=1):
    streams = {"train": blobs(), "test": blobs(seed=1)}
    return class_incremental_benchmark(streams, num_experiences=3).train_stream[part].dataset


def double_subset():
    return nc().subset([39, 3, 3, 17, 0]).subset([4, 1, 0])


def joined_experiences(build):
    return build(0).concat(build(1)).concat(build(2).subset([5, 2]))


def nested():
    both = nc(0).concat(nc(1).subset(range(30, 3, -3)))
    return both.subset([45, 0, 41, 7, 48]).concat(nc(2))


def labels_from_zero(**kwargs):
    return nc(2, task_labels=True, class_ids_from_zero_in_each_exp=True, **kwargs)


SHORT_CUT = {
    "nc": nc,
    "nc with task labels": lambda: nc(task_labels=True),
    "ni": ni,
    "tensors": tensors,
    "class-incremental": raw,
    "labels from zero in each experience": labels_from_zero,
    "labels from zero in a given class order": lambda: labels_from_zero(
        fixed_class_order=[4, 1, 5, 0, 3, 2], shuffle=False
    ),
    "labels from zero in the first experience": lambda: nc(class_ids_from_zero_from_first_exp=True),
    "subset of a subset": double_subset,
    "subset of class-incremental": lambda: raw().subset([7, 0, 7]),
    "subset within one of two tensor data sets": lambda: (
        tensors(0).concat(tensors(1)).subset([69, 51, 110, 60, 51])
    ),
    "eval view": lambda: nc().eval(),
}
FALL_BACK = {
    "two tensor data sets": lambda: tensors(0).concat(tensors(1)),
    "subset over two tensor data sets": lambda: (
        tensors(0).concat(tensors(1)).subset([69, 0, 51, 49, 50, 0])
    ),
}
EITHER = {
    "joined class-incremental": lambda: joined_experiences(raw),
    "joined nc": lambda: joined_experiences(nc),
    "nested": nested,
}


def one_by_one(dataset, indices):
    return list(dataset.collate_fn([dataset[i] for i in indices]))


def assert_same(batch, expected):
    assert [c.dtype for c in batch] == [c.dtype for c in expected]
    assert all(torch.equal(a, b) for a, b in zip(batch, expected, strict=True))


@pytest.mark.parametrize("name", [*SHORT_CUT, *FALL_BACK, *EITHER])
def test_every_sample_equals_plain_iteration(name):
    dataset = {**SHORT_CUT, **FALL_BACK, **EITHER}[name]()
    source = as_source(dataset)
    order = [*range(len(dataset) - 1, -1, -1), 0, 2, 0]
    assert len(source) == len(dataset)
    assert_same(source.gather(torch.tensor(order)), one_by_one(dataset, order))


@pytest.mark.parametrize("name", SHORT_CUT)
def test_one_tensor_data_set_takes_the_short_cut(name):
    assert isinstance(as_source(SHORT_CUT[name]()), TensorSource)


@pytest.mark.parametrize("name", FALL_BACK)
def test_several_tensor_data_sets_are_read_one_by_one(name):
    assert isinstance(as_source(FALL_BACK[name]()), DatasetSource)


def test_short_cut_shares_the_tensor_of_the_leaf():
    data = blobs()
    dataset = nc_benchmark(data, data, 3, task_labels=False, seed=3).train_stream[1].dataset
    assert as_source(dataset).columns[0].data_ptr() == data.tensors[0].data_ptr()


def negate(x):
    return -x


class Pictures(Dataset):
    """Eight grey images whose pixels are their number."""

    targets = tuple(range(8))

    def __len__(self):
        return 8

    def __getitem__(self, i):
        return Image.fromarray(np.full((2, 3), i, dtype=np.uint8)), i


def transformed():
    groups = {"train": (negate, None), "eval": (None, None)}
    return classification_dataset(blobs(), transform_groups=groups, task_labels=0)


def frozen():
    return transformed().freeze_transforms()


def pictures():
    from torchvision.transforms.functional import pil_to_tensor

    groups = {"train": (pil_to_tensor, None), "eval": (pil_to_tensor, None)}
    return classification_dataset(Pictures(), transform_groups=groups, task_labels=0)


def extra_column():
    x, y = blobs().tensors
    attributes = [
        DataAttribute(y.tolist(), "targets"),
        DataAttribute(torch.arange(len(y)), "number", use_in_getitem=True),
    ]
    return make_avalanche_dataset(TensorDataset(x, y), data_attributes=attributes)


def three_tensors():
    x, y = blobs().tensors
    names = [DataAttribute(y.tolist(), "targets")]
    return make_avalanche_dataset(TensorDataset(x, y, y + 1), data_attributes=names)


def lying(where):
    x, y = blobs().tensors
    wrong = y.clone()
    wrong[where] = (wrong[where] + 1) % 6
    names = [DataAttribute(wrong.tolist(), "targets")]
    return make_avalanche_dataset(TensorDataset(x, y), data_attributes=names)


def swap_two_and_four(y):
    return {2: 4, 4: 2}.get(int(y), int(y))


def undeclared_target_transform():
    groups = {"train": (None, swap_two_and_four), "eval": (None, None)}
    return classification_dataset(blobs(), transform_groups=groups, task_labels=0)


def small_integers():
    x, y = blobs().tensors
    names = [DataAttribute(y.tolist(), "targets")]
    return make_avalanche_dataset(TensorDataset(x, y.int()), data_attributes=names)


@pytest.mark.parametrize(
    "build",
    [
        transformed,
        frozen,
        pictures,
        extra_column,
        three_tensors,
        lambda: lying(slice(None)),
        lambda: lying(slice(77, 78)),
        undeclared_target_transform,
        small_integers,
    ],
    ids=[
        "transform of x",
        "frozen transform",
        "images",
        "extra attribute",
        "three tensors",
        "all targets lie",
        "one target lies",
        "target transform that targets do not show",
        "labels of another type",
    ],
)
def test_anything_else_is_read_through_the_data_set(build):
    dataset = build()
    source = as_source(dataset)
    assert isinstance(source, DatasetSource)
    order = list(range(len(dataset)))
    assert_same(source.gather(torch.tensor(order)), one_by_one(dataset, order))


def test_transform_of_the_other_group_does_not_matter():
    dataset = transformed().eval()
    source = as_source(dataset)
    assert isinstance(source, TensorSource)
    assert_same(source.gather(torch.arange(120)), one_by_one(dataset, range(120)))


def test_empty_data_set_has_an_empty_source():
    assert len(as_source(nc().subset([]))) == 0


@pytest.mark.parametrize("name", [*SHORT_CUT, *FALL_BACK, *EITHER])
@pytest.mark.parametrize("attribute", ["targets", "targets_task_labels"])
def test_attribute_values_equal_plain_iteration(name, attribute):
    dataset = {**SHORT_CUT, **FALL_BACK, **EITHER}[name]()
    values = attribute_values(dataset, attribute)
    assert values.dtype == torch.int64
    assert values.tolist() == [int(v) for v in getattr(dataset, attribute)]


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
def test_attribute_values_of_a_plain_data_set(kind):
    data = blobs()
    data.targets = kind(data.targets)
    assert attribute_values(data, "targets").tolist() == data.tensors[1].tolist()


def test_attribute_that_is_missing_is_none():
    assert attribute_values(blobs(), "targets_task_labels") is None


class CountingList(list):
    """A list that counts single look-ups and whole passes."""

    reads: ClassVar[Counter] = Counter()

    def __getitem__(self, i):
        self.reads["item"] += 1
        return super().__getitem__(i)

    def __iter__(self):
        self.reads["pass"] += 1
        return super().__iter__()


def test_few_out_of_many_values_are_read_alone():
    targets = CountingList(range(10_000))
    attribute = DataAttribute(targets, "targets")
    few = attribute.subset([7, 9_999, 7])
    CountingList.reads.clear()
    holder = type("Holder", (), {"targets": few, "__len__": lambda self: 3})()
    assert attribute_values(holder, "targets").tolist() == [7, 9_999, 7]
    assert CountingList.reads == {"item": 3}


def test_joined_source_groups_rows_by_source_and_keeps_their_order():
    a = TensorSource([torch.arange(3.0), torch.arange(3)])
    b = TensorSource([torch.arange(10.0, 14), torch.arange(10, 14)])
    joined = JoinedSource([a, b], [3, 4])
    assert len(joined) == 7
    x, y = joined.__getitems__(joined.split(torch.tensor([6, 2, 3, 0, 2])))
    assert y.tolist() == [2, 0, 2, 13, 10]
    assert torch.equal(x, y.float())


def test_join_of_different_column_counts_says_so():
    one, two = [torch.zeros(2), torch.zeros(2)], [torch.zeros(2)] * 3
    with pytest.raises(ValueError, match=r"\[2, 3\] columns"):
        join_batches([one, two])
