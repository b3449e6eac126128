"""Where replayed samples come from: what a source is, and two that need no generator.

``NoiseReplay`` and ``ExactReplay`` are what deep generative replay is compared with. The source
that learns is ``avalanche_ext.training.supervised.generator_training.GeneratorTraining``.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any, Protocol

import torch
from avalanche.benchmarks.scenarios.online import OnlineCLExperience
from torch import Tensor

from avalanche_ext.models.generators.base import ValueRange
from avalanche_ext.training.loading.sources import Source, as_source

__all__ = [
    "ExactReplay",
    "NoiseReplay",
    "ReplaySource",
    "check_new_data_weight",
    "check_one_mixture",
    "classes_of",
    "whole_experience",
]

Replay = tuple[Tensor, Tensor | None]


class ReplaySource(Protocol):
    """What gives samples of earlier experiences, and learns from the present one.

    Calls come in the order ``begin``, then ``replay`` and ``step`` in turn, then ``finish``; and
    again for the next experience. ``learn`` is an alternative to ``step``.
    """

    labelled: bool  # whether samples come with labels
    adversarial: bool

    def begin(self, experience: Any, device: torch.device) -> None:
        """An experience begins: from now on ``replay`` gives what was known before it."""
        ...

    def replay(self, n: int, generator: torch.Generator) -> Replay:
        """``n`` samples of earlier experiences, without gradients, and their labels or ``None``."""
        ...

    def step(self, x: Tensor, y: Tensor, replay: Replay | None) -> None:
        """Learn from one batch and what is replayed beside it."""
        ...

    def learn(self, experience: Any) -> None:
        """Learn from the whole experience."""
        ...

    def finish(self) -> None:
        """The experience has ended."""
        ...


class NoiseReplay:
    """Uniform noise of the data's shape and range: does the teacher alone remember?

    Args:
        in_shape: Shape of one sample.
        value_range: Lowest and highest value of the data.

    Raises:
        ValueError: If a range is missing.
    """

    labelled = False
    adversarial = False

    def __init__(self, in_shape: Sequence[int], *, value_range: ValueRange = (0.0, 1.0)) -> None:
        if value_range is None or not value_range[0] < value_range[1]:
            raise ValueError(
                f"NoiseReplay expects value_range=(lowest, highest); got {value_range}."
            )
        self.in_shape = tuple(in_shape)
        self.value_range = value_range
        self.device = torch.device("cpu")

    def begin(self, experience: Any, device: torch.device) -> None:
        """See ``ReplaySource``."""
        self.device = device

    def replay(self, n: int, generator: torch.Generator) -> Replay:
        """See ``ReplaySource``."""
        low, high = self.value_range
        noise = torch.rand((n, *self.in_shape), generator=generator)
        return (low + (high - low) * noise).to(self.device), None

    def step(self, x: Tensor, y: Tensor, replay: Replay | None) -> None:
        """Nothing to learn."""

    def learn(self, experience: Any) -> None:
        """Nothing to learn."""

    def finish(self) -> None:
        """Nothing to keep."""


class ExactReplay:
    """All earlier samples, each equally likely, with their labels: the upper bound.

    Use it with ``DGRPlugin(ExactReplay(), labels="source")``. A bounded memory is ``ERPlugin``.
    """

    labelled = True
    adversarial = False

    def __init__(self) -> None:
        self.datasets: list[Any] = []  # of each experience, the present one included
        self.device = torch.device("cpu")
        self._sources: list[Source] = []  # built again where needed

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_sources": []}

    def begin(self, experience: Any, device: torch.device) -> None:
        """See ``ReplaySource``."""
        self.device = device
        self.datasets = [*self.datasets, experience.dataset.train()]

    def replay(self, n: int, generator: torch.Generator) -> Replay:
        """See ``ReplaySource``."""
        earlier = self.datasets[:-1]
        if len(self._sources) != len(earlier):
            self._sources = [as_source(dataset) for dataset in earlier]
        sizes = torch.tensor([len(dataset) for dataset in earlier])
        at = torch.randint(int(sizes.sum()), (n,), generator=generator)
        ends = sizes.cumsum(0)
        which = torch.bucketize(at, ends, right=True)
        rows = [torch.nonzero(which == k)[:, 0] for k in range(len(self._sources))]
        columns = [
            source.gather(at[mine] - (ends[k] - sizes[k]), generator)[:2]
            for k, (source, mine) in enumerate(zip(self._sources, rows, strict=True))
            if len(mine)
        ]
        # As they were drawn: any part of them is a sample of all experiences.
        drawn = torch.cat(rows).argsort()
        x, y = (torch.cat(parts)[drawn].to(self.device) for parts in zip(*columns, strict=True))
        return x, y

    def step(self, x: Tensor, y: Tensor, replay: Replay | None) -> None:
        """Nothing to learn: the samples are kept."""

    def learn(self, experience: Any) -> None:
        """Nothing to learn."""

    def finish(self) -> None:
        """From the next ``begin`` on the experience is an earlier one."""


def whole_experience(experience: Any) -> Any:
    """The experience of which an online stream gives parts, if the stream says where it begins."""
    online = isinstance(experience, OnlineCLExperience) and experience.access_task_boundaries
    return experience.origin_experience if online else experience


def classes_of(experience: Any) -> list[int]:
    """Its classes, in ascending order."""
    known = getattr(experience, "classes_in_this_experience", None)
    return sorted({int(c) for c in (experience.dataset.targets if known is None else known)})


def check_one_mixture(plugin: Any, strategy: Any) -> None:
    """Raise if another plugin weighs its replay against the new data as well.

    Such a plugin says so by ``mixes_criterion``. The weights of two would multiply, in the order of
    the plugins.
    """
    others = [
        type(p).__name__
        for p in strategy.plugins
        if p is not plugin and getattr(p, "mixes_criterion", False)
    ]
    if others:
        raise ValueError(
            f"{type(plugin).__name__} weighs new data against its replay, and so does "
            f"{others[0]}: what the new data count would depend on their order. Use one of them, "
            f"or ERPlugin or BERPlugin beside it."
        )


def check_new_data_weight(owner: str, r: Any) -> None:
    """Raise unless ``r`` is a rule of ``new_data_weight`` or a number in [0, 1]."""
    number = isinstance(r, Real) and not isinstance(r, bool)
    if r not in ("1/t", "class_ratio") and not (number and 0 <= float(r) <= 1):
        raise ValueError(
            f"{owner} expects r, the weight of the new data, to be '1/t', 'class_ratio' or a "
            f"number from 0 to 1; got {r!r}."
        )
