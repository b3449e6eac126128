"""Runs with and without ``DeviceDataPlugin``, and everything about them that must be equal."""

from __future__ import annotations

import random
import warnings
from contextlib import contextmanager
from functools import cache

import numpy as np
import torch
from avalanche.benchmarks import (
    class_incremental_benchmark,
    dataset_benchmark,
    nc_benchmark,
    tensors_benchmark,
)
from avalanche.benchmarks.utils import as_classification_dataset
from avalanche.benchmarks.utils.classification_dataset import (
    _make_taskaware_classification_dataset as classification_dataset,
)
from avalanche.training.plugins import SupervisedPlugin
from PIL import Image
from torch import nn
from torch.utils.data import Dataset, TensorDataset
from torchvision.datasets import VisionDataset
from torchvision.transforms import Compose, Normalize, ToTensor

from avalanche_ext.training.plugins.device_data import DeviceDataPlugin
from tests.conftest import blobs, class_stream, naive

SIDE = 4
TO_FLOAT = Compose([ToTensor(), Normalize((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))])


# models and states ------------------------------------------------------------------------------


def mlp(width=8, *, dropout=0.0):
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(width, 9), nn.ReLU(), nn.Dropout(dropout), nn.Linear(9, 6)
    )


def with_dropout():
    return mlp(dropout=0.5)


def for_images(*, dropout=0.0):
    return mlp(3 * SIDE * SIDE, dropout=dropout)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def random_states():
    """The global states of torch, NumPy and Python."""
    words = np.random.get_state()  # noqa: NPY002 - Avalanche draws from it
    return torch.get_rng_state().tolist(), words[1].tolist(), words[2], random.getstate()


class Batches(SupervisedPlugin):
    """Every batch that was trained on (or evaluated), per experience."""

    def __init__(self):
        super().__init__()
        self.trained, self.evaluated = [], []

    def before_training_exp(self, strategy, **kwargs):
        self.trained.append([])

    def before_eval_exp(self, strategy, **kwargs):
        self.evaluated.append([])

    def before_forward(self, strategy, **kwargs):
        self.trained[-1].append([c.clone() for c in strategy.mbatch])

    def before_eval_forward(self, strategy, **kwargs):
        self.evaluated[-1].append([c.clone() for c in strategy.mbatch])


def run(plugins, stream, *, model=mlp, seed=0, train=None, **options):
    """Train on every experience; final weights, random states and the strategy."""
    made = model()
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    random.seed(seed)
    strategy = naive(made, plugins, **options)
    for exp in stream:
        strategy.train(exp, eval_streams=[], **(train or {}))
    return weights(made), random_states(), strategy


def assert_same(one, other):
    """Bit for bit the same weights, and the same random states afterwards."""
    assert torch.isfinite(one[0]).all()
    assert torch.equal(one[0], other[0])
    assert one[1] == other[1]


def placed(plugins, where, plugin):
    """The plugin at the head or at the end of the list."""
    return [plugin, *plugins] if where == "first" else [*plugins, plugin]


def leftovers(strategy):
    """What a plugin has left behind in a strategy's instance."""
    names = {n for n in vars(strategy) if n.startswith(("_before_", "_after_"))}
    return names | ({"forward", "backward", "optimizer_step"} & set(vars(strategy)))


# streams of vectors -----------------------------------------------------------------------------


@cache
def stream(name):
    """Three small experiences with 6 classes over all, as Avalanche's constructors give them."""
    return list(_STREAMS[name]().train_stream)


@cache
def benchmark(name):
    return _STREAMS[name]()


def _class_incremental(convert):
    data = {"train": convert(blobs()), "test": convert(blobs(seed=1))}
    return class_incremental_benchmark(data, num_experiences=3, seed=3)


def _tensors():
    parts = []
    for k, n in enumerate((20, 13, 17)):
        x = torch.randn(n, 8, generator=torch.Generator().manual_seed(k))
        parts.append((x, torch.arange(n) % 2 + 2 * k))
    return tensors_benchmark(
        train_tensors=parts, test_tensors=parts, task_labels=[0, 0, 0], complete_test_set_only=False
    )


def _several_tasks():
    """Experiences with three tasks each, of 21, 9 and 4 samples: two are sampled over again."""
    data = []
    for k in range(3):
        x = torch.randn(34, 8, generator=torch.Generator().manual_seed(k))
        y = torch.arange(34) % 6
        tasks = [0] * 21 + [1] * 9 + [2] * 4
        order = torch.randperm(34, generator=torch.Generator().manual_seed(9)).tolist()
        tasks = [tasks[i] for i in order]
        data.append(classification_dataset(TensorDataset(x, y), targets=y, task_labels=tasks))
    return dataset_benchmark(data, data)


_STREAMS = {
    "nc": lambda: class_stream(3),
    "nc with task labels": lambda: class_stream(3, task_labels=True),
    "class incremental": lambda: _class_incremental(lambda d: d),
    "class incremental, label-less": lambda: _class_incremental(as_classification_dataset),
    "tensors": _tensors,
    "several tasks": _several_tasks,
}


# images -----------------------------------------------------------------------------------------


def pixels(n=36, *, seed=0, side=SIDE):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(256, (n, side, side, 3), generator=generator, dtype=torch.uint8)
    return x.numpy(), (torch.arange(n) % 6).tolist()


class Pictures(VisionDataset):
    """Images in memory behind torchvision's interface; counts how often one is read."""

    def __init__(self, arrays, targets, transform=None, target_transform=None, transforms=None):
        super().__init__("", transforms, transform, target_transform)
        self.arrays, self.targets, self.reads = arrays, list(targets), 0

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, i):
        self.reads += 1
        x, y = Image.fromarray(self.arrays[i]), self.targets[i]
        if self.transforms is not None and type(self.transforms).__name__ != "StandardTransform":
            return self.transforms(x, y)
        x = x if self.transform is None else self.transform(x)
        return x, y if self.target_transform is None else self.target_transform(y)


class Album(Dataset):
    """Images in a plain data set, without any transform of its own."""

    def __init__(self, arrays, targets):
        self.images = [Image.fromarray(a) for a in arrays]
        self.targets = list(targets)
        self.reads = 0

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, i):
        self.reads += 1
        return self.images[i], self.targets[i]


def image_stream(train_transform=TO_FLOAT, eval_transform=TO_FLOAT, *, n=36, make=Album):
    """Three experiences of two classes, with Avalanche's transform groups."""
    train, test = make(*pixels(n)), make(*pixels(n, seed=1))
    made = nc_benchmark(
        train, test, 3, task_labels=False, shuffle=False, fixed_class_order=list(range(6)),
        train_transform=train_transform, eval_transform=eval_transform,
    )  # fmt: skip
    made.raw = (train, test)
    return made


@contextmanager
def quietly():
    """Data that are read by a ``DataLoader`` are not what a test is about."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "DeviceDataPlugin")
        yield


def device_data(budget="64MB", **kwargs):
    """The plugin without worker processes, which take longer to start than a test."""
    return DeviceDataPlugin(budget, **{"workers": 0, **kwargs})
