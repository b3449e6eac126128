"""Experiences whose samples carry their own number, and what a memory holds of them."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from avalanche.benchmarks.utils.classification_dataset import (
    _make_taskaware_classification_dataset as classification_dataset,
)
from torch.utils.data import TensorDataset

WIDTH = 3


def experience(
    first, labels, *, task=0, origin=None, dtype=torch.float32, groups=None, width=WIDTH
):
    """An experience of samples ``first, first + 1, ...``; every entry of ``x`` is the number."""
    y = torch.as_tensor(labels)
    x = torch.arange(first, first + len(y))[:, None].expand(-1, width).to(dtype)
    tasks = [task] * len(y) if isinstance(task, int) else list(task)
    dataset = classification_dataset(
        TensorDataset(x, y), targets=y.tolist(), task_labels=tasks, transform_groups=groups
    )
    exp = SimpleNamespace(dataset=dataset, labels=y.tolist(), tasks=tasks, first=first)
    if origin is not None:
        exp.origin_experience = SimpleNamespace(current_experience=origin)
    return exp


def stream(*label_lists, tasks=None, **kwargs):
    """Experiences one after the other; numbers go on from one to the next."""
    experiences, first = [], 0
    for k, labels in enumerate(label_lists):
        task = tasks[k] if tasks else 0
        experiences.append(experience(first, labels, task=task, **kwargs))
        first += len(labels)
    return experiences


def held(memory):
    """``{group: set of sample numbers}``, after checking each sample against its labels."""
    index = memory.index()
    found = {}
    for key, slots in zip(index.keys, index.slots.split(index.counts.tolist()), strict=True):
        x, *labels = memory.gather(slots)
        assert all(torch.equal(a, b) for a, b in zip(labels, memory.labels(slots), strict=True))
        assert len(set(slots.tolist())) == len(slots)
        found[key] = {int(v) for v in x[:, 0]}
        assert len(found[key]) == len(slots)
    return found


def all_held(memory):
    return set().union(*held(memory).values())
