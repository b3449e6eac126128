"""Pictures of samples: when, of what, and that training does not notice."""

from __future__ import annotations

import copy
import pickle
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from avalanche.benchmarks.scenarios.dataset_scenario import benchmark_from_datasets
from avalanche.benchmarks.utils import as_classification_dataset
from avalanche.training.plugins import ReplayPlugin
from avalanche.training.supervised import JointTraining
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import Dataset, TensorDataset
from torch.utils.tensorboard import SummaryWriter
from torchvision.transforms import RandomHorizontalFlip

from avalanche_ext import BERPlugin, DeviceDataPlugin, ERPlugin
from avalanche_ext.evaluation.sample_grid import sample_grid
from avalanche_ext.experiments.data_index import DataIndex
from avalanche_ext.experiments.sample_grids import SampleGrids, _memories
from avalanche_ext.experiments.state import capture, restore
from avalanche_ext.training.storage_policy.exemplar_memory import ReservoirMemory
from tests.conftest import class_stream, naive


class Board:
    """A writer that keeps what it is given."""

    def __init__(self):
        self.images = {}

    def add_image(self, tag, image, step):
        self.images[tag, step] = image


class Pictures(Dataset):
    """Images read one by one; sample i of class k is ``10 k + i`` in its first pixel."""

    def __init__(self, label: int, n: int = 6):
        self.targets = [label] * n

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, i):
        if i >= len(self):
            raise IndexError
        x = torch.zeros(1, 4, 4)
        x[0, 0, 0] = 10 * self.targets[i] + i
        x[0, 3, 0] = 100
        return x, self.targets[i]


def noisy(x):
    """Augmentation that shows, and draws from every global random state."""
    return x.flip(1, 2) + torch.rand(1) + np.random.rand() + random.random()  # noqa: NPY002


def drawing(x):
    """An evaluation transform that draws random numbers, as bad as that is."""
    return noisy(x)


def stream(n=3, *, kind="read", eval_transform=None):
    """One class of six images per experience; training augments, evaluation does not.

    ``kind``: ``"read"`` one by one, in ``"tensors"`` without augmentation, in tensors that are
    ``"flipped"`` in training, or ``"mixed"``: the first experience in tensors, the others read.
    """
    parts = []
    for k in range(n):
        data: Any = Pictures(k)
        augmentation = {"tensors": None, "flipped": RandomHorizontalFlip(1.0)}.get(kind, noisy)
        if kind != "read" and not (kind == "mixed" and k > 0):
            data = TensorDataset(torch.stack([x for x, _ in data]), torch.tensor(data.targets))
            data.targets = data.tensors[1].tolist()
            augmentation = None if kind == "mixed" else augmentation
        transforms = {"train": (augmentation, None), "eval": (eval_transform, None)}
        parts.append(as_classification_dataset(data, transform_groups=transforms))
    return benchmark_from_datasets(train=parts, test=parts)


def net(width=16, outputs=12):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(width, outputs))


def trained(benchmark, plugins):
    strategy = naive(net(), plugins)
    for experience in benchmark.train_stream:
        strategy.train(experience)
    return strategy


def clean(label):
    return sample_grid(Pictures(label), seed=label)


def marks(grid, count):
    """The images' first pixels in the grid, in order, back in their own range."""
    places = [(k // 8 * 64 + 16, k % 8 * 50 + 2) for k in range(count)]
    return [grid[0, row, column].item() for row, column in places]


def test_pictures_come_behind_experiences_zero_and_powers_of_two():
    board = Board()
    trained(stream(10), [SampleGrids(board)])
    assert list(board.images) == [("samples/current", k) for k in (0, 1, 2, 4, 8)]


def test_current_samples_are_those_of_the_experience_without_augmentation():
    board = Board()
    trained(stream(3), [SampleGrids(board)])
    for k in range(3):
        assert torch.equal(board.images["samples/current", k], clean(k))


def test_n_and_seed_choose_the_images():
    board = Board()
    trained(stream(1), [SampleGrids(board, n=2, seed=5)])
    assert torch.equal(board.images["samples/current", 0], sample_grid(Pictures(0), n=2, seed=5))


REPLAY = {
    "tensors": (lambda: [ERPlugin(4)], "tensors"),
    "on_the_device": (lambda: [DeviceDataPlugin(), ERPlugin(4)], "tensors"),
    "flipped_on_the_device": (lambda: [DeviceDataPlugin(), ERPlugin(4)], "flipped"),
    "by_reference": (lambda: [ERPlugin(4)], "read"),
    "by_class": (lambda: [BERPlugin(12, mem_scope="total", group_by="class")], "read"),
    "tensors_then_references": (lambda: [ERPlugin(4)], "mixed"),
    "avalanches": (lambda: [ReplayPlugin(12)], "read"),
}


@pytest.mark.parametrize("case", REPLAY)
def test_exemplars_are_shown_without_augmentation_and_under_their_labels(case):
    make, kind = REPLAY[case]
    board, plugins = Board(), make()
    trained(stream(3, kind=kind), [*plugins, SampleGrids(board)])
    policy = plugins[-1].storage_policy
    labels = [int(y) for y in policy.buffer.targets]
    assert len(labels) == 12
    grid = board.images["samples/memory", 2]
    assert len(set(labels)) == 3 or case == "avalanches"
    seen = marks(grid, 12)
    # Exemplar i of class k is 255 (10 k + i) / 100 and stands under k.
    allowed = [{round(2.55 * (10 * k + i)) for i in range(6)} for k in sorted(labels)]
    assert all(value in values for value, values in zip(seen, allowed, strict=True))
    for k in set(labels):
        mine = [value for value, label in zip(seen, sorted(labels), strict=True) if label == k]
        assert len(set(mine)) == len(mine)  # as many different exemplars
    stripes = [grid[:, 64 * r + 2 : 64 * r + 16, 50 * c + 2 : 50 * c + 12]
               for r in range(2) for c in range(8)][:12]  # fmt: skip
    for stripe, k in zip(stripes, sorted(labels), strict=True):
        assert torch.equal(stripe, clean(k)[:, 2:16, 2:12])


def test_a_memory_grows_along_the_stream_and_an_empty_one_is_left_out():
    board = Board()
    trained(stream(2), [ERPlugin(4), SampleGrids(board)])
    small, large = (board.images["samples/memory", k] for k in (0, 1))
    assert small.shape[2] < large.shape[2]
    board = Board()
    trained(stream(2), [ERPlugin(0), SampleGrids(board)])
    assert {tag for tag, _ in board.images} == {"samples/current"}


def test_a_second_memory_has_a_name_of_its_own():
    board = Board()
    trained(stream(1), [ReplayPlugin(2), ReplayPlugin(3), SampleGrids(board)])
    assert set(board.images) == {
        ("samples/current", 0), ("samples/memory", 0), ("samples/memory_2", 0)
    }  # fmt: skip
    assert board.images["samples/memory", 0].shape[2] == 2 * 50 + 2
    assert board.images["samples/memory_2", 0].shape[2] == 3 * 50 + 2


def test_a_memory_that_two_share_is_drawn_once():
    policy = ReservoirMemory(3)
    owner = SimpleNamespace(storage_policy=policy)
    strategy = SimpleNamespace(storage_policy=policy, plugins=[owner, SimpleNamespace()])
    assert list(_memories(strategy)) == [policy]


def test_joint_training_shows_the_whole_stream():
    board = Board()
    model = net()
    strategy = JointTraining(
        model=model, optimizer=torch.optim.SGD(model.parameters(), 0.1),
        criterion=nn.CrossEntropyLoss(), train_mb_size=8, plugins=[SampleGrids(board)],
        evaluator=None,
    )  # fmt: skip
    strategy.train(stream(3).train_stream)
    assert list(board.images) == [("samples/current", 0)]
    values = marks(board.images["samples/current", 0], 18)
    assert sorted(values) == sorted(round(2.55 * (10 * k + i)) for k in range(3) for i in range(6))


def test_vectors_have_no_picture():
    board = Board()
    strategy = naive(net(8, 6), [ERPlugin(4), SampleGrids(board)])
    for experience in class_stream(2).train_stream:
        strategy.train(experience)
    assert board.images == {}


@pytest.mark.parametrize("replay", [None, "by_reference", "avalanches", "flipped_on_the_device"])
def test_training_is_the_same_bit_for_bit(replay):
    ends = []
    for pictures in (False, True):
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002
        random.seed(0)
        make, kind = REPLAY.get(replay, (list, "read"))
        board = Board()
        extra = [SampleGrids(board)] if pictures else []
        strategy = trained(stream(4, kind=kind, eval_transform=drawing), [*make(), *extra])
        assert bool(board.images) == pictures
        ends.append((
            torch.cat([p.detach().flatten() for p in strategy.model.parameters()]),
            torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate(),  # noqa: NPY002
        ))  # fmt: skip
    assert torch.equal(ends[0][0], ends[1][0])
    assert torch.equal(ends[0][1], ends[1][1])
    assert ends[0][2:] == ends[1][2:]


def test_tensorboard_reads_the_pictures_back(tmp_path):
    from io import BytesIO

    from PIL import Image

    with SummaryWriter(str(tmp_path)) as writer:
        trained(stream(2), [ERPlugin(2), SampleGrids(writer)])
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0})
    events.Reload()
    assert sorted(events.Tags()["images"]) == ["samples/current", "samples/memory"]
    first, second = events.Images("samples/current")
    assert (first.step, second.step) == (0, 1)
    pixels = np.asarray(Image.open(BytesIO(second.encoded_image_string)))
    assert (pixels == clean(1).numpy()[0][:, :, None]).all()


def test_a_checkpoint_keeps_the_writer_and_a_pickle_has_none():
    board = Board()
    benchmark = stream(2)
    strategy = naive(net(), [SampleGrids(board, n=3)])
    strategy.train(benchmark.train_stream[0])
    data = DataIndex(benchmark)
    state = capture(strategy.plugins[0], data)
    other = SampleGrids(Board(), n=1)
    mine = other.writer
    restore(other, state, data)
    assert other.writer is mine
    assert (other.n, other._experience) == (3, 0)
    for pickled in (pickle.loads(pickle.dumps(other)), copy.deepcopy(other)):
        assert not hasattr(pickled, "writer")
        assert vars(pickled) == {k: v for k, v in vars(other).items() if k != "writer"}


def test_wrong_arguments():
    with pytest.raises(TypeError, match=r"expects a SummaryWriter.*; got str"):
        SampleGrids("runs")
    with pytest.raises(ValueError, match="n=0"):
        SampleGrids(Board(), n=0)
