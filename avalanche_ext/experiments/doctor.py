"""Examine a run before it is started: minutes of looking against days of training in vain.

What is looked at: the device; both streams and their samples; head and labels; memories and their
groups; the list of plugins; then, on copies, one batch of the first two experiences through every
hook; last the time and memory that the whole will need.

Nothing of the caller's is changed: strategies are copied, loggers are left out of the copies, and
the random state is put back. With ``CompilePlugin`` the copies compile, which takes its time.
"""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from avalanche.training.determinism.rng_manager import RNGManager
from avalanche.training.plugins import EvaluationPlugin

from avalanche_ext.evaluation.metrics.device import accuracy_metrics, loss_metrics
from avalanche_ext.experiments.benchmark_checks import (
    FAILURES,
    Finding,
    check_device,
    check_head,
    check_last_batch,
    check_memories,
    check_plugin_list,
    check_samples,
    check_streams,
    first_line,
)
from avalanche_ext.experiments.build import build_strategy
from avalanche_ext.experiments.forecast import Forecast, available_bytes, forecast
from avalanche_ext.experiments.micro_steps import take_micro_steps
from avalanche_ext.recipes import Recipe

__all__ = ["Examination", "Finding", "examine", "examine_recipe", "forecast_text", "memory_text"]


@dataclass(frozen=True)
class Examination:
    """Findings and, where no error stood in the way, a forecast."""

    findings: tuple[Finding, ...]
    forecast: Forecast | None = None

    @property
    def healthy(self) -> bool:
        """Whether there is no error."""
        return not any(f.level == "error" for f in self.findings)


def examine(
    strategy: Any,
    benchmark: Any,
    *,
    steps: int = 50,
    epochs_of: Callable[[int], int] | None = None,
) -> Examination:
    """Examine a strategy and the benchmark that it is to be trained on.

    Args:
        strategy: Any Avalanche strategy, not yet trained; a copy of it is.
        benchmark: With ``train_stream`` and ``test_stream``.
        steps: Steps on each of the first three experiences, at most, for the forecast.
        epochs_of: Passes over an experience, by its number; the strategy's by default.

    Returns:
        What was found. After an error, checks that need what is broken are left out.
    """
    findings = [check_device(strategy.device)]
    with _left_alone():
        findings += check_streams(benchmark)
        if _broken(findings):
            return Examination(tuple(findings))
        findings += check_samples(benchmark)
        if not _broken(findings):
            findings += check_head(strategy, benchmark)
        findings += check_last_batch(strategy, benchmark)
        findings += check_memories(strategy, benchmark)
        findings += check_plugin_list(strategy)
        if _broken([f for f in findings if f.check not in ("memory", "plugins")]):
            return Examination(tuple(findings))
        micro = take_micro_steps(strategy, benchmark)
        findings += micro.findings(strategy)
        if _broken(findings):
            return Examination(tuple(findings))
        try:
            needs = forecast(
                strategy, benchmark, steps=steps, activation_bytes=micro.activation_bytes,
                epochs_of=epochs_of,
            )  # fmt: skip
        except FAILURES as error:
            findings.append(Finding("error", "forecast", f"a longer run: {first_line(error)}"))
            return Examination(tuple(findings))
        findings.append(_check_room(needs, strategy.device))
    return Examination(tuple(findings), needs)


def examine_recipe(recipe: Recipe, *, device: str = "cpu", steps: int = 50) -> Examination:
    """Build what a recipe describes, with its first seed, and examine it."""
    place = check_device(device)
    if place.level == "error":
        return Examination((place,))
    with _left_alone():
        try:
            benchmark = recipe.benchmark.build(*recipe.runs[0])
        except FAILURES as error:
            return Examination((place, Finding("error", "data", first_line(error))))
        RNGManager.set_random_seeds(recipe.seeds[0])
        try:
            metrics = [loss_metrics(epoch=True), accuracy_metrics(experience=True, stream=True)]
            evaluator = EvaluationPlugin(*metrics, strict_checks=False)  # as in a run
            strategy = build_strategy(recipe, evaluator=evaluator, device=device)
        except FAILURES as error:
            return Examination((place, Finding("error", "strategy", first_line(error))))
        return examine(strategy, benchmark, steps=steps, epochs_of=recipe.epochs_of)


def forecast_text(needs: Forecast) -> str:
    """The experiences as a table for a terminal."""
    cells = [("experience", "samples", "steps", "rows", "seconds")]
    cells += [
        (str(k), f"{e.samples:,}", f"{e.steps:,}", str(e.rows), f"{e.seconds:,.1f}")
        for k, e in enumerate(needs.experiences)
    ]
    return _aligned(cells)


def memory_text(needs: Forecast) -> str:
    """The bytes as a table for a terminal."""
    parts = [*needs.memory.items(), ("in all", needs.peak_bytes)]
    return _aligned([("held at once", "MB"), *((name, f"{b / 1e6:,.2f}") for name, b in parts)])


# parts ----------------------------------------------------------------------------------------


def _check_room(needs: Forecast, device: torch.device) -> Finding:
    needed, there = needs.peak_bytes, available_bytes(device)
    if needed > 0.9 * there:
        return Finding(
            "warning", "room",
            f"expected less than 90 % of the {there / 1e9:.1f} GB of {device}; tensors will need "
            f"{needed / 1e9:.1f} GB: smaller batches or memories, or max_groups",
        )  # fmt: skip
    return Finding("ok", "room", f"{needed / 1e6:,.1f} MB of the {there / 1e9:,.1f} GB of {device}")


def _broken(findings: list[Finding]) -> bool:
    return any(f.level == "error" for f in findings)


@contextlib.contextmanager
def _left_alone() -> Iterator[None]:
    """Put every random state back; what copies warn of, the run itself will say."""
    python = random.getstate()
    numpy = np.random.get_state()  # noqa: NPY002 - Avalanche draws from it
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


def _aligned(cells: list[Any]) -> str:
    widths = [max(len(row[k]) for row in cells) for k in range(len(cells[0]))]
    lines = []
    for first, *others in cells:
        right = [c.rjust(w) for c, w in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *right]))
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
