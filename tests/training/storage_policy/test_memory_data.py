"""Bytes, seeds, pickles, data kinds, and the memory inside Avalanche's own plugins."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from avalanche.benchmarks import class_incremental_benchmark
from avalanche.benchmarks.utils import AvalancheDataset
from avalanche.benchmarks.utils.classification_dataset import (
    _make_taskaware_classification_dataset as classification_dataset,
)
from avalanche.benchmarks.utils.data_attribute import DataAttribute
from avalanche.training.plugins import ReplayPlugin
from PIL import Image
from torch.utils.data import Dataset, TensorDataset
from torchvision.transforms.functional import pil_to_tensor

from avalanche_ext.training.storage_policy.exemplar_memory import (
    ClassBalancedMemory,
    ExemplarMemory,
    ExperienceBalancedMemory,
    ReservoirMemory,
)
from avalanche_ext.training.storage_policy.stores import ReferenceStore, TensorStore
from tests.conftest import blobs, class_stream, naive
from tests.training.storage_policy.streams import all_held, experience, held, stream


class Pictures(Dataset):
    """Images made when they are read: pixel value = number of the sample."""

    def __init__(self, numbers, size=(4, 6), mode="RGB"):
        self.numbers, self.size, self.mode, self.reads = list(numbers), size, mode, 0
        self.targets = [n % 3 for n in self.numbers]

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, i):
        self.reads += 1
        shape = self.size if self.mode == "L" else (*self.size, 3)
        pixels = np.full(shape, self.numbers[i], dtype=np.uint8)
        return Image.fromarray(pixels), self.targets[i]


def pictures(numbers, transform=pil_to_tensor, **kwargs):
    groups = {"train": (transform, None), "eval": (pil_to_tensor, None)}
    data = classification_dataset(
        Pictures(numbers, **kwargs), transform_groups=groups, task_labels=0
    )
    return SimpleNamespace(dataset=data)


def noise(image):
    return torch.rand(3) + pil_to_tensor(image).flatten()[0]


@pytest.mark.parametrize(
    ("exp", "per_sample"),
    [
        (experience(0, [0, 1] * 9), 3 * 4 + 8 + 8),
        (experience(0, [0, 1] * 9, dtype=torch.uint8), 3 + 8 + 8),
        (experience(0, [0, 1] * 9, width=50, dtype=torch.float64), 400 + 8 + 8),
        (pictures(range(18)), 4 * 6 * 3 + 8 + 8),
        (pictures(range(18), size=(5, 5), mode="L"), 25 + 8 + 8),
        (pictures(range(18), noise), 4 * 6 * 3 + 8 + 8),
    ],
    ids=["float32", "uint8", "float64", "RGB", "grey", "augmented"],
)
def test_bytes_are_those_of_the_stored_samples(exp, per_sample):
    memory = ExemplarMemory(7, mem_scope="experience")
    memory.post_adapt(None, exp)
    assert memory.nbytes == 7 * per_sample
    memory.post_adapt(None, exp)
    assert memory.nbytes == 14 * per_sample


@pytest.mark.parametrize("group_by", ["experience", "class", None])
def test_same_seed_same_exemplars_and_another_seed_others(group_by):
    kept = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        memory = ExemplarMemory(9, group_by=group_by)
        for k, exp in enumerate(stream([0] * 30, [1] * 30)):
            torch.rand(5 * k + seed)  # what else was drawn does not matter
            memory.post_adapt(None, exp)
        kept.append(held(memory))
    assert kept[0] == kept[1] != kept[2]


def test_storing_and_reading_leave_the_global_random_state_alone():
    memory, before = ClassBalancedMemory(9), torch.get_rng_state()
    for exp in stream([0] * 30, [1] * 30):
        memory.post_adapt(None, exp)
    memory.gather(memory.index().slots)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("group_by", ["experience", "class", None])
def test_pickle_holds_the_exemplars_and_not_the_data_set(group_by):
    memory = ExemplarMemory(10, group_by=group_by)
    for exp in stream([0] * 500, [1] * 500, width=200):
        memory.post_adapt(None, exp)
    saved = pickle.dumps(memory)
    assert memory.nbytes == 10 * (800 + 16)
    assert memory.nbytes < len(saved) < memory.nbytes + 4000
    assert held(pickle.loads(saved)) == held(memory)


@pytest.mark.parametrize("clone", [lambda m: pickle.loads(pickle.dumps(m)), copy.deepcopy])
@pytest.mark.parametrize("make", [ClassBalancedMemory, ReservoirMemory])
@pytest.mark.parametrize("kind", ["tensors", "images"])
def test_a_copy_goes_on_exactly_like_the_original(clone, make, kind):
    if kind == "tensors":
        parts = stream([0] * 30, [1, 0] * 15, [2] * 9)
    else:
        parts = [pictures(range(30 * k, 30 * k + 30)) for k in range(3)]
    memory, restored = make(11), make(11)
    for exp in parts:
        restored = clone(restored)
        memory.post_adapt(None, exp)
        restored.post_adapt(None, exp)
    slots = memory.index().slots
    assert torch.equal(slots, restored.index().slots)
    for a, b in zip(memory.gather(slots), restored.gather(slots), strict=True):
        assert torch.equal(a, b)


def test_tensor_memory_keeps_no_data_set_alive():
    exp = experience(0, [0, 1] * 20)
    data = weakref.ref(exp.dataset._flat_data._datasets[0])
    memory = ClassBalancedMemory(4)
    memory.post_adapt(None, exp)
    assert isinstance(memory._store, TensorStore)
    del exp
    gc.collect()
    assert data() is None
    assert len(all_held(memory)) == 4


def test_random_augmentation_is_drawn_anew_at_every_replay():
    memory = ReservoirMemory(5)
    exp = pictures(range(20), noise)
    memory.post_adapt(None, exp)
    slots = memory.index().slots
    assert isinstance(memory._store, ReferenceStore)
    first, again = memory.gather(slots), memory.gather(slots)
    assert not (first[0] == again[0]).any()
    assert torch.equal(first[0].floor(), again[0].floor())
    assert torch.equal(first[1], first[0][:, 0].long() % 3)


def test_storing_references_reads_a_sample_for_its_size_and_none_for_labels():
    exp = pictures(range(40))
    reads = exp.dataset._flat_data
    while not isinstance(reads, Pictures):
        (reads,) = reads._datasets
    memory = ReservoirMemory(10)
    reads.reads = 0
    memory.post_adapt(None, exp)
    memory.labels(memory.index("class").slots)
    assert reads.reads <= 2
    for _ in range(3):
        reads.reads = 0
        memory.post_adapt(None, exp)
        assert reads.reads <= 1
    reads.reads = 0
    memory.gather(memory.index().slots[:3])
    assert reads.reads == 3


def test_references_come_back_in_the_order_asked_for():
    memory = ExemplarMemory(6, mem_scope="experience")
    for k in range(4):
        memory.post_adapt(None, pictures(range(10 * k, 10 * k + 10)))
    slots = memory.index().slots[torch.tensor([23, 0, 12, 1, 18, 7, 0])]
    x, y, t = memory.gather(slots)
    one_by_one = [memory.gather(slots[i : i + 1]) for i in range(7)]
    assert torch.equal(x, torch.cat([row[0] for row in one_by_one]))
    assert torch.equal(y, x[:, 0, 0, 0].long() % 3)
    assert torch.equal(y, memory.labels(slots)[0])
    assert t.tolist() == [0] * 7
    assert sorted({int(v) // 10 for v in x[:, 0, 0, 0]}) == [0, 1, 2, 3]


def test_unused_data_sets_are_let_go_when_their_slots_are_taken():
    memory = ExperienceBalancedMemory(2)
    for k in range(2):
        memory.post_adapt(None, pictures(range(10 * k, 10 * k + 10)))
    memory.resize(None, 1)
    assert len(memory._store._sources) == 2
    reservoir = ReservoirMemory(1)
    for k in range(30):
        reservoir.post_adapt(None, pictures(range(k, k + 1)))
        assert len(reservoir._store._sources) == 1


@pytest.mark.parametrize(
    "other",
    [
        lambda: experience(40, [1] * 20, dtype=torch.float64),
        lambda: experience(40, [1] * 20, groups={"train": (torch.abs, None), "eval": (None, None)}),
    ],
    ids=["other type", "with a transform"],
)
@pytest.mark.parametrize("group_by", ["experience", "class", None])
def test_memory_goes_on_with_references_when_samples_of_another_kind_come(other, group_by):
    memory, plain = (ExemplarMemory(9, group_by=group_by) for _ in range(2))
    for exp in (experience(0, [0] * 20), experience(20, [2] * 20)):
        memory.post_adapt(None, exp)
        plain.post_adapt(None, exp)
    assert isinstance(memory._store, TensorStore)
    memory.post_adapt(None, other())
    plain.post_adapt(None, experience(40, [1] * 20))
    assert isinstance(memory._store, ReferenceStore)
    assert held(memory) == held(plain)
    assert memory.size <= 9
    assert pickle.loads(pickle.dumps(memory)).nbytes == memory.nbytes


def test_samples_of_another_shape_can_be_stored_and_read_by_themselves():
    memory = ExemplarMemory(3, mem_scope="experience")
    memory.post_adapt(None, experience(0, [0] * 5, width=3))
    memory.post_adapt(None, experience(5, [1] * 5, width=4))
    index = memory.index()
    first, second = index.slots.split(index.counts.tolist())
    assert memory.gather(first)[0].shape == (3, 3)
    assert memory.gather(second)[0].shape == (3, 4)
    assert memory.labels(index.slots)[0].tolist() == [0] * 3 + [1] * 3


# Avalanche's view -------------------------------------------------------------------------------


def test_buffer_is_a_data_set_with_labels_and_task_labels():
    memory = ClassBalancedMemory(8)
    for exp in stream([0] * 9 + [1] * 9, [2] * 9 + [3] * 9, tasks=[5, 6]):
        memory.post_adapt(None, exp)
    buffer = memory.buffer
    assert len(buffer) == 8
    rows = [buffer[i] for i in range(8)]
    assert {int(x[0]) for x, *_ in rows} == all_held(memory)
    for x, y, t in rows:
        assert (y, t) == (int(x[0]) // 9, 5 + int(x[0]) // 18)
    assert list(buffer.targets) == [y for _, y, _ in rows]
    assert list(buffer.targets_task_labels) == [t for *_, t in rows]
    assert sorted(buffer.task_set) == [5, 6]


def test_buffer_without_task_labels_has_two_columns():
    x, y = blobs().tensors
    data = AvalancheDataset(
        [TensorDataset(x, y)], data_attributes=[DataAttribute(y.tolist(), "targets")]
    )
    memory = ReservoirMemory(8)
    memory.post_adapt(None, SimpleNamespace(dataset=data))
    rows = [memory.buffer[i] for i in range(8)]
    assert [len(row) for row in rows] == [2] * 8
    assert list(memory.buffer.targets) == [int(label) for _, label in rows]
    assert memory.nbytes == 8 * (8 * 4 + 8)


@pytest.mark.parametrize("transform_groups", [None, {"train": (None, None), "eval": (None, None)}])
def test_images_without_transforms_are_counted(transform_groups):
    data = classification_dataset(
        Pictures(range(9)), transform_groups=transform_groups, task_labels=0
    )
    memory = ReservoirMemory(4)
    memory.post_adapt(None, SimpleNamespace(dataset=data.subset(range(1, 9))))
    assert memory.nbytes == 4 * (72 + 8 + 8)


def test_joined_tensor_data_sets_are_counted_and_read():
    parts = stream([0] * 9, [1] * 9)
    memory = ClassBalancedMemory(6)
    joined = parts[0].dataset.concat(parts[1].dataset)
    memory.post_adapt(None, SimpleNamespace(dataset=joined))
    assert memory.nbytes == 6 * (12 + 8 + 8)
    assert {k: len(v) for k, v in held(memory).items()} == {0: 3, 1: 3}


def test_buffer_cannot_be_assigned():
    with pytest.raises(AttributeError, match="follows from what it stores"):
        ReservoirMemory(3).buffer = class_stream(3).train_stream[0].dataset


class Recorder(ReplayPlugin):
    """Avalanche's plugin, noting the labels of each batch."""

    def before_forward(self, strategy, **kwargs):
        self.seen = [*getattr(self, "seen", []), [c.tolist() for c in strategy.mbatch[1:]]]


@pytest.mark.parametrize("make", [ReservoirMemory, ClassBalancedMemory, ExperienceBalancedMemory])
@pytest.mark.parametrize("balanced", [False, True])
def test_avalanches_replay_plugin_replays_our_memory(make, balanced):
    plugin = Recorder(12, storage_policy=make(12), task_balanced_dataloader=balanced)
    strategy = naive(torch.nn.Linear(8, 6), [plugin])
    for exp in class_stream(3, task_labels=True).train_stream:
        plugin.seen = []
        strategy.train(exp)
        for y, t in plugin.seen:
            assert [label // 2 for label in y] == t
            assert len([k for k in t if k == exp.current_experience]) == 8
            assert (len(t) > 8) is (exp.current_experience > 0)
        everything = {k for _, t in plugin.seen for k in t}
        assert everything == set(range(exp.current_experience + 1))
    assert len(plugin.storage_policy) == 12


def test_avalanches_replay_plugin_replays_our_memory_of_a_class_incremental_benchmark():
    plugin = Recorder(12, storage_policy=ClassBalancedMemory(12))
    strategy = naive(torch.nn.Linear(8, 6), [plugin])
    streams = {"train": blobs(), "test": blobs(seed=1)}
    for exp in class_incremental_benchmark(streams, num_experiences=3).train_stream:
        plugin.seen = []
        strategy.train(exp)
    assert {label for y, _ in plugin.seen for label in y} == set(range(6))


# real images ------------------------------------------------------------------------------------


class Frames(Dataset):
    def __init__(self, paths, label):
        self.paths, self.targets = paths, [label] * len(paths)

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        return Image.open(self.paths[i]).convert("RGB"), self.targets[i]


@pytest.mark.data
def test_memory_of_real_frames_counts_their_planes_and_reads_them_again(core50_frames):
    memory = ExemplarMemory(4, mem_scope="experience")
    paths = [core50_frames[k : k + 10] for k in (0, 10, 20)]
    for label, part in enumerate(paths):
        data = classification_dataset(
            Frames(part, label),
            transform_groups={"train": (pil_to_tensor, None), "eval": (pil_to_tensor, None)},
            task_labels=0,
        )
        memory.post_adapt(None, SimpleNamespace(dataset=data))
    assert memory.nbytes == 12 * (128 * 128 * 3 + 8 + 8)
    x, y, _ = memory.gather(memory.index().slots)
    assert x.shape == (12, 3, 128, 128)
    assert x.dtype == torch.uint8
    for image, label in zip(x, y, strict=True):
        frames = [pil_to_tensor(Image.open(p).convert("RGB")) for p in paths[int(label)]]
        assert any(torch.equal(image, frame) for frame in frames)
    assert len(pickle.dumps(memory)) < 128 * 128 * 3
