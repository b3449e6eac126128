"""Shared fixtures: tiny benchmarks on tensors, seeded; nothing is downloaded."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

DATA_ROOT = Path("~/.avalanche/data").expanduser()


@pytest.fixture(autouse=True)
def _seeded():
    """Every test starts from the same random state, on one thread."""
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - Avalanche draws from NumPy's global state
    random.seed(0)
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def mnist_root() -> Path:
    """Where real MNIST lies; the test is skipped, with the reason, where it does not."""
    for root in (DATA_ROOT, DATA_ROOT / "mnist"):
        if (root / "MNIST" / "raw" / "train-images-idx3-ubyte").exists():
            return root
    pytest.skip(f"real MNIST is not in {DATA_ROOT}/MNIST/raw")


@pytest.fixture
def core50_frames() -> list[Path]:
    """Real CORe50 frames (PNG, 128 x 128); the test is skipped where they are absent."""
    frames = sorted((DATA_ROOT / "core50_sample").glob("*.png"))
    if not frames:
        pytest.skip(f"no CORe50 frames in {DATA_ROOT}/core50_sample")
    return frames


def blobs(n_per_class: int = 20, n_classes: int = 6, width: int = 8, seed: int = 0):
    """Gaussian classes as a ``TensorDataset`` with ``targets``, as Avalanche's builders want."""
    generator = torch.Generator().manual_seed(seed)
    centres = 3 * torch.randn(n_classes, width, generator=generator)
    y = torch.arange(n_classes).repeat_interleave(n_per_class)
    x = centres[y] + torch.randn(len(y), width, generator=generator)
    dataset = TensorDataset(x, y)
    dataset.targets = y.tolist()
    return dataset


def class_stream(n_experiences: int = 3, *, task_labels: bool = False, **kwargs):
    """A class-incremental benchmark (task-incremental with ``task_labels``) over ``blobs``."""
    from avalanche.benchmarks import nc_benchmark

    train, test = blobs(**kwargs), blobs(**{**kwargs, "seed": 1})
    n_classes = len(set(train.targets))
    return nc_benchmark(
        train, test, n_experiences, task_labels=task_labels, shuffle=False,
        fixed_class_order=list(range(n_classes)),
    )  # fmt: skip


def naive(model, plugins=(), *, lr: float = 0.1, batch: int = 8, epochs: int = 1, **kwargs):
    """Avalanche's ``Naive`` with SGD and no metrics."""
    from avalanche.training.supervised import Naive

    return Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr),
        criterion=torch.nn.CrossEntropyLoss(),
        train_mb_size=batch,
        train_epochs=epochs,
        eval_mb_size=64,
        plugins=list(plugins),
        evaluator=kwargs.pop("evaluator", None),
        **kwargs,
    )
