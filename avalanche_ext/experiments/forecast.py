"""How long a run will take and how much memory it will need, from a few steps.

A copy of the strategy is trained for fifty steps (fewer where they take long) on each of the first
three experiences, with all of their data, so that memories fill as they will. The median step, what
stands around the steps, the rows of a batch, the steps of an epoch and the bytes of memories and
weights are carried on in a straight line from the second and third experience.

Limits: what grows in another way (a cap such as ``max_groups`` that is reached later, branches of
different sizes) is predicted by that line. The time of a step is the machine's at this moment.
Bytes are those of tensors; Python and its libraries come on top, about half a gigabyte.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any

import torch
from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor

from avalanche_ext.evaluation.accounting import bytes_remembered
from avalanche_ext.experiments.micro_steps import copy_of, part_of
from avalanche_ext.experiments.run import watched_stream
from avalanche_ext.training.loading.flat_data import leaves_of

__all__ = ["ExperienceForecast", "Forecast", "available_bytes", "forecast"]

_MEASURED = 3
_FEW, _PATIENCE = 5, 2.0  # steps at least; seconds, if there are more than that
_EVALUATED = 20  # batches
_GROWN = 1.15  # steps that take so much longer grow with the experiences; less may be noise


@dataclass(frozen=True)
class ExperienceForecast:
    """One experience: its samples, the steps of an epoch, the rows of a step, seconds in all."""

    samples: int
    steps: int
    rows: int
    seconds: float


@dataclass(frozen=True)
class Forecast:
    """What a run will need.

    Args:
        experiences: One entry for each.
        evaluation: Seconds of one pass over the test stream.
        memory: Bytes at the end of the stream, by what they hold.
    """

    experiences: tuple[ExperienceForecast, ...]
    evaluation: float
    memory: dict[str, int]

    @property
    def training(self) -> float:
        """Seconds of training in all."""
        return sum(e.seconds for e in self.experiences)

    @property
    def total(self) -> float:
        """Seconds in all, with an evaluation behind every experience."""
        return self.training + len(self.experiences) * self.evaluation

    @property
    def peak_bytes(self) -> int:
        """All that is held at once."""
        return sum(self.memory.values())


def forecast(
    strategy: Any,
    benchmark: Any,
    *,
    steps: int = 50,
    activation_bytes: float = 0.0,
    epochs_of: Callable[[int], int] | None = None,
) -> Forecast:
    """Predict seconds and bytes; neither argument is changed.

    Args:
        strategy: What will be trained.
        benchmark: On what.
        steps: Steps on each of the first experiences, or fewer where they take long.
        activation_bytes: Bytes that a step keeps for each row of its batch.
        epochs_of: Passes over an experience, by its number; the strategy's by default.
    """
    twin = copy_of(strategy)
    stream = list(benchmark.train_stream)
    measured = [_measure(twin, e, steps) for e in stream[:_MEASURED]]
    rows = _line([m.rows for m in measured], len(stream))
    sizes = [len(e.dataset) for e in stream]
    plain = [-(-n // strategy.train_mb_size) for n in sizes]
    more = [max(0, m.steps - p) for m, p in zip(measured, plain, strict=False)]
    extra = _line(more, len(stream))
    step = _step_times(measured, rows)
    around = sum(m.around for m in measured) / max(1, sum(sizes[: len(measured)]))
    rest = []
    for k, n in enumerate(sizes):
        known = k < len(measured)
        m = measured[min(k, len(measured) - 1)]
        count = max(1, round(plain[k] + extra[k]))
        epochs = epochs_of(k) if epochs_of else strategy.train_epochs
        seconds = (m.around if known else around * n) + epochs * count * step[k]
        rest.append(ExperienceForecast(n, count, round(rows[k]), seconds))
    return Forecast(
        tuple(rest),
        _evaluation(twin, benchmark),
        {
            "data sets": _bytes_of_data(benchmark),
            "data kept on the device": max(m.resident for m in measured),
            "exemplars": round(_line([m.exemplars for m in measured], len(stream))[-1]),
            "weights and gradients": 2
            * round(_line([m.weights for m in measured], len(stream))[-1]),
            "optimizer": round(_line([m.optimizer for m in measured], len(stream))[-1]),
            "activations of a step": round(activation_bytes * max(rows)),
        },
    )


def available_bytes(device: torch.device) -> int:
    """Memory of the device: a GPU's free bytes, the machine's for the CPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# parts ----------------------------------------------------------------------------------------


@dataclass
class _Stopwatch(SupervisedPlugin, supports_distributed=True):
    """Stop after ``limit`` steps, and note when each one ended."""

    limit: int
    ends: list[float] = field(default_factory=list)
    rows: int = 0
    steps: int = 0
    resident: int = 0

    def __post_init__(self) -> None:
        super().__init__()

    def before_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        """The loader stands."""
        self.ends.append(_now(strategy.device))

    def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        """A step is over."""
        self.ends.append(_now(strategy.device))
        self.rows = max(self.rows, len(strategy.mb_y))
        self.steps = len(strategy.dataloader) if isinstance(strategy.dataloader, Sized) else 0
        slow = len(self.ends) > _FEW and self.ends[-1] - self.ends[0] > _PATIENCE
        if len(self.ends) > self.limit or slow:
            strategy.stop_training()

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """What plugins keep on the device."""
        kept = [getattr(p, "bytes_allocated", 0) for p in strategy.plugins]
        self.resident = sum(kept)


@dataclass
class _Measured:
    rows: int
    steps: int
    step: float  # seconds
    around: float
    resident: int
    exemplars: int
    weights: int
    optimizer: int


def _measure(strategy: Any, experience: Any, steps: int) -> _Measured:
    watch = _Stopwatch(steps)
    strategy.plugins.append(watch)
    start = _now(strategy.device)
    strategy.train(experience, eval_streams=[])
    whole = _now(strategy.device) - start
    strategy.plugins.remove(watch)
    gaps = [b - a for a, b in zip(watch.ends, watch.ends[1:], strict=False)]
    state = strategy.optimizer.state.values()
    return _Measured(
        rows=watch.rows,
        steps=watch.steps,
        step=statistics.median(gaps[1:] or gaps),
        around=max(0.0, whole - sum(gaps)),
        resident=watch.resident,
        exemplars=bytes_remembered(strategy),
        weights=sum(p.nbytes for p in strategy.model.parameters()),
        optimizer=sum(v.nbytes for s in state for v in s.values() if isinstance(v, Tensor)),
    )


def _evaluation(strategy: Any, benchmark: Any) -> float:
    """Seconds of a pass over what a run is tested on, from some batches of its first experience."""
    watched = watched_stream(benchmark)
    first = part_of(watched[0], _EVALUATED * strategy.eval_mb_size)
    start = _now(strategy.device)
    strategy.eval([first])
    seconds = _now(strategy.device) - start
    return seconds * sum(len(e.dataset) for e in watched) / len(first.dataset)


def _line(values: Sequence[float], n: int) -> list[float]:
    """``values``, carried on to ``n`` entries by the step between the last two of three."""
    step = values[-1] - values[-2] if len(values) >= _MEASURED else 0
    more = max(0, n - len(values))
    return [*values, *(max(0, values[-1] + (k + 1) * step) for k in range(more))]


def _step_times(measured: Sequence[_Measured], rows: Sequence[float]) -> list[float]:
    """Seconds of a step in every experience: by its rows, or by their own growth (GEM's)."""
    times, last = [m.step for m in measured], measured[-1]
    if len(times) < _MEASURED:
        return _line(times, len(rows))
    if last.rows == measured[-2].rows and times[-1] > _GROWN * times[-2]:
        return _line(times, len(rows))
    slope = _slope([(m.rows, m.step) for m in measured])
    return times + [last.step + slope * (r - last.rows) for r in rows[len(times) :]]


def _slope(points: Sequence[tuple[float, float]]) -> float:
    """Seconds for one row more, by least squares; 0 where the rows do not differ."""
    x, y = (statistics.fmean(column) for column in zip(*points, strict=True))
    spread = sum((a - x) ** 2 for a, _ in points)
    return max(0.0, sum((a - x) * (b - y) for a, b in points) / spread) if spread else 0.0


def _bytes_of_data(benchmark: Any) -> int:
    """Bytes of the tensors behind both streams; what is read from disk counts nothing."""
    tensors = {
        id(tensor): tensor.nbytes
        for experience in [*benchmark.train_stream, *benchmark.test_stream]
        for leaf in leaves_of(experience.dataset)
        for tensor in getattr(leaf.dataset, "tensors", ())
    }
    return sum(tensors.values())


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
