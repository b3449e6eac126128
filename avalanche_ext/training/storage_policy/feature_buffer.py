"""A memory of features that keeps samples: a class-balanced reservoir of activations."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from avalanche_ext.training.checks import check_count
from avalanche_ext.training.storage_policy.ledger import Ledger

__all__ = ["FeatureBuffer"]

_LABEL_BYTES = 8


class FeatureBuffer:
    """Features and their classes under a budget, as many of each class as of any other.

    Every sample draws a uniform priority once, and a class keeps those of highest priority: so what
    is kept of it is at any moment a uniform random subset of all that it had.

    Args:
        mem: Budget in samples.
        mem_bytes: Or in bytes, features and labels together.

    Raises:
        ValueError: If both or none are given; when the budget holds fewer samples than classes.
    """

    def __init__(self, mem: int | None = None, *, mem_bytes: int | None = None) -> None:
        if (mem is None) == (mem_bytes is None):
            raise ValueError(
                f"FeatureBuffer expects mem or mem_bytes; got mem={mem} and mem_bytes={mem_bytes}."
            )
        check_count("FeatureBuffer", mem=mem, mem_bytes=mem_bytes)
        self.mem = mem
        self.mem_bytes = mem_bytes
        self._ledger = Ledger()
        self._features: Tensor | None = None
        self._labels = torch.zeros(0, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self._ledger)

    @property
    def classes(self) -> list[int]:
        """Classes of which something is kept, in the order of arrival."""
        return [int(key) for key in self._ledger.index().keys]  # type: ignore[arg-type]

    @property
    def nbytes(self) -> int:
        """Bytes of the samples that are kept, and their labels."""
        return 0 if self._features is None else len(self) * _row_bytes(self._features)

    def write(self, u: Tensor, y: Tensor, generator: Generator | None = None) -> None:
        """Let samples compete for the budget.

        Args:
            u: Features.
            y: Their classes.
            generator: Random numbers, on the CPU.

        Shapes:
            u ``(N, D)``, y ``(N,)``.
        """
        budget = self.mem if self.mem_bytes is None else self.mem_bytes // _row_bytes(u)
        assert budget is not None
        labels = y.unique().tolist()
        known = {unit[1] for unit in self._ledger.units_of(None)}
        if budget < len({*known, *labels}):
            raise ValueError(
                f"a memory of {budget} samples of {_row_bytes(u)} bytes cannot hold one of each "
                f"of the {len({*known, *labels})} classes so far; enlarge mem or mem_bytes."
            )
        unit_of = torch.searchsorted(torch.tensor(labels), y.cpu())
        priority = torch.rand(len(y), generator=generator, dtype=torch.float64)
        units = [(None, label) for label in labels]
        chosen, slots = self._ledger.admit(units, unit_of, priority, budget)
        if self._features is None:
            self._features = u.new_empty((0, u.shape[1]))
        more = self._ledger.size - len(self._features)
        self._features = torch.cat([self._features, u.new_empty((more, u.shape[1]))])
        self._labels = torch.cat([self._labels, torch.zeros(more, dtype=torch.int64)])
        self._features[slots.to(u.device)] = u[chosen.to(u.device)]
        self._labels[slots] = y.cpu()[chosen]

    def sample(self, n: int, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
        """``n`` samples with replacement, and their classes, which take turns.

        Args:
            n: How many.
            generator: Random numbers, on the CPU.

        Shapes:
            results ``(n, D)`` and ``(n,)``.

        Raises:
            ValueError: If nothing has been written.
        """
        if self._features is None:
            raise ValueError("a FeatureBuffer that is empty cannot be sampled; write to it first.")
        index = self._ledger.index()
        k = len(index.counts)
        turn = (torch.arange(n) + torch.randint(k, (1,), generator=generator)) % k
        counts = index.counts[turn]
        within = (torch.rand(n, generator=generator, dtype=torch.float64) * counts).long()
        slots = index.slots[(index.counts.cumsum(0) - index.counts)[turn] + within]
        u = self._features[slots.to(self._features.device)]
        return u, self._labels[slots].to(u.device)


def _row_bytes(u: Tensor) -> int:
    return u.shape[1] * u.element_size() + _LABEL_BYTES
