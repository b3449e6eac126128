"""What the benchmarks of recipes share, and those on scikit-learn's digits and MNIST."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

__all__ = ["BenchmarkSettings", "PermutedMNIST", "SplitDigits", "SplitMNIST"]


@dataclass(frozen=True, kw_only=True)
class BenchmarkSettings:
    """Settings of a benchmark; ``build`` makes it.

    ``validation=True`` tests on held-out training images: for choosing settings.
    """

    n_experiences: int = 5
    train_per_experience: int | None = None
    validation: bool = False

    @property
    def in_shape(self) -> tuple[int, ...]:
        """Shape of one image."""
        return (1, 28, 28)

    @property
    def units(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel that images are normalised by."""
        return (0.0,), (1.0,)

    @property
    def value_range(self) -> tuple[float, float]:
        """Lowest and highest value of the images as they reach the network."""
        units = list(zip(*self.units, strict=True))
        return min(-m / s for m, s in units), max((1 - m) / s for m, s in units)

    @property
    def n_outputs(self) -> int:
        """Units of the head."""
        return 10

    @property
    def multi_head(self) -> bool:
        """Whether each experience has a task label, and so a head of its own."""
        return getattr(self, "scenario", "class") == "task"

    def build(self, seed: int, order_seed: int | None = None) -> Any:
        """The Avalanche benchmark.

        Args:
            seed: Decides which images a thinned stream keeps.
            order_seed: Decides the order of the classes (or the permutations of the pixels);
                ``None`` is the recipe's own order.
        """
        raise NotImplementedError

    def smoke(self) -> BenchmarkSettings:
        """The same benchmark with a few images, for a check in seconds."""
        return dataclasses.replace(self, train_per_experience=40)


@dataclass(frozen=True, kw_only=True)
class SplitDigits(BenchmarkSettings):
    """``benchmarks.split_digits``: scikit-learn's digits, nothing to download.

    Args:
        n_experiences: Length of the stream.
        train_per_experience: Random training images to keep of each experience.
        validation: Test on held-out training images.
        scenario: ``"class"``-, ``"task"``- or ``"domain"``-incremental.
        class_order: The classes in the order of arrival; ascending by default.
    """

    scenario: str = "class"
    class_order: tuple[int, ...] | None = None

    @property
    def n_classes(self) -> int:
        """Classes of the data set that the stream brings."""
        return 10 if self.class_order is None else len(self.class_order)

    @property
    def in_shape(self) -> tuple[int, ...]:
        """Shape of one image."""
        return (1, 8, 8)

    @property
    def n_outputs(self) -> int:
        """Units of the head."""
        return self.n_classes if self.scenario == "class" else self.n_classes // self.n_experiences

    def ordered(self, order_seed: int | None) -> tuple[int, ...] | None:
        """The order of the classes: the recipe's own, or its classes shuffled by ``order_seed``.

        NumPy's legacy generator shuffles: seed 1993 on 100 classes gives 68, 56, 78, ..., the
        order of iCaRL's successors.
        """
        if order_seed is None:
            return self.class_order
        import numpy as np

        classes = range(self.n_classes) if self.class_order is None else sorted(self.class_order)
        # The literature's orders come from this generator and no other.
        drawn = np.random.RandomState(order_seed).permutation(len(classes))
        return tuple(classes[i] for i in drawn)

    def options(self, seed: int, order_seed: int | None) -> dict[str, Any]:
        """Arguments of the benchmark's function."""
        return {
            "scenario": self.scenario,
            "class_order": self.ordered(order_seed),
            "train_per_experience": self.train_per_experience,
            "validation": self.validation,
            "seed": seed,
        }

    def build(self, seed: int, order_seed: int | None = None) -> Any:
        """See ``BenchmarkSettings``."""
        from avalanche_ext.benchmarks import split_digits

        return split_digits(self.n_experiences, **self.options(seed, order_seed))


@dataclass(frozen=True, kw_only=True)
class SplitMNIST(SplitDigits):
    """``benchmarks.split_mnist``."""

    download: bool = False

    @property
    def in_shape(self) -> tuple[int, ...]:
        """Shape of one image."""
        return (1, 28, 28)

    def build(self, seed: int, order_seed: int | None = None) -> Any:
        """See ``BenchmarkSettings``."""
        from avalanche_ext.benchmarks import split_mnist

        return split_mnist(
            self.n_experiences, download=self.download, **self.options(seed, order_seed)
        )


@dataclass(frozen=True, kw_only=True)
class PermutedMNIST(BenchmarkSettings):
    """``benchmarks.permuted_mnist``; other permutations for every seed, or ``order_seed``."""

    n_experiences: int = 10
    download: bool = False

    def build(self, seed: int, order_seed: int | None = None) -> Any:
        """See ``BenchmarkSettings``."""
        from avalanche_ext.benchmarks import permuted_mnist

        return permuted_mnist(
            self.n_experiences,
            train_per_experience=self.train_per_experience,
            validation=self.validation,
            download=self.download,
            seed=seed,
            permutation_seed=order_seed,
        )
