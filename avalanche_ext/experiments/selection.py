"""The protocol on which settings are chosen: held-out training images, the first experiences.

Whoever tunes on the test set, or on the whole stream, reports numbers that nobody gets who meets
the stream for the first time. So a search trains on the first ``k`` experiences alone (A-GEM's
protocol has three, of twenty) and is scored on training images that were held out. The test set
cannot be reached from here: the benchmark refuses to be built on it.

References:
    Chaudhry et al. (2019), Efficient Lifelong Learning with A-GEM, Sec. 2.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from avalanche.benchmarks import CLScenario

from avalanche_ext.recipes import Recipe
from avalanche_ext.recipes.streams import BenchmarkSettings

__all__ = ["FirstExperiences", "check_held_out", "for_selection"]


@dataclass(frozen=True, kw_only=True)
class FirstExperiences(BenchmarkSettings):
    """The first experiences of another benchmark, which must hold out its test images.

    ``n_experiences`` stays that of the whole stream: a memory is divided as it will be in the run.

    Args:
        of: The benchmark.
        stream: What it is called.
        first: How many of its experiences to keep; ``None`` keeps all.
    """

    of: BenchmarkSettings
    stream: str
    first: int | None = None

    @property
    def in_shape(self) -> tuple[int, ...]:
        """Shape of one image."""
        return self.of.in_shape

    @property
    def n_outputs(self) -> int:
        """Units of the head, which is that of the whole stream."""
        return self.of.n_outputs

    @property
    def units(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """See ``BenchmarkSettings``."""
        return self.of.units

    @property
    def multi_head(self) -> bool:
        """See ``BenchmarkSettings``."""
        return self.of.multi_head

    def build(self, seed: int, order_seed: int | None = None) -> Any:
        """The two streams, cut.

        Raises:
            ValueError: If the test stream would be the test set.
        """
        check_held_out(self.of)
        benchmark = self.of.build(seed, order_seed)
        train, test = benchmark.train_stream, benchmark.test_stream
        n = len(train) if self.first is None else min(self.first, len(train))
        if len(test) == 1:  # one for all of training, as in a stream of sessions
            return CLScenario([train[:n], test])
        if len(test) != len(train):
            raise ValueError(
                f"{self.stream} has {len(test)} test experiences for {len(train)} training "
                f"experiences; the score after the first {n} needs a test experience for each."
            )
        return CLScenario([train[:n], test[:n]])


def check_held_out(benchmark: BenchmarkSettings) -> None:
    """Raise unless the benchmark tests on held-out training images.

    Raises:
        ValueError: If it would test on the test set.
    """
    if benchmark.validation is not True:
        raise ValueError(
            f"settings are never chosen on the test stream: the sweep expects "
            f"benchmark.validation=true, which tests on held-out training images; got "
            f"{benchmark.validation!r}. Leave the field out, or set it to true."
        )


def for_selection(recipe: Recipe, first: int | None) -> Recipe:
    """The recipe with its stream cut to the first experiences, on held-out images.

    Raises:
        ValueError: If the recipe would test on the test set, or for a bad ``first``.
    """
    check_held_out(recipe.benchmark)
    n = recipe.benchmark.n_experiences
    if first is not None and not 1 <= first <= n:
        raise ValueError(f"first expects 1 to {n} experiences, or 'all'; got {first!r}.")
    inner = recipe.benchmark
    cut = FirstExperiences(
        of=inner,
        stream=type(inner).__name__,
        first=first,
        n_experiences=n,
        train_per_experience=inner.train_per_experience,
        validation=True,
    )
    return dataclasses.replace(recipe, benchmark=cut, baselines=())
