"""A memory of features that keeps no sample: a density for every class."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from avalanche_ext.functional.feature_density import (
    diagonal_gaussian,
    draw_gaussian,
    drift_of,
    k_means,
    low_rank_gaussian,
    map_gaussian,
    pooled_gaussian,
)
from avalanche_ext.functional.linear_map import ridge
from avalanche_ext.models.generators.base import normal_noise

__all__ = ["GaussianMemory"]


@dataclass
class _Gaussian:
    mean: Tensor
    factor: Tensor
    count: int


class GaussianMemory:
    r"""Gaussians of features, one or several for each class, from which features are drawn.

    A density is written when its class has been learnt and is not trained again, so there is
    nothing that it could forget. When a class comes back, the densities of all its samples are
    made from those that there are and the new ones: while there are more than ``components``, the
    two whose means are nearest become the Gaussian of both (exactly, but for directions that were
    left out). Several are drawn from by their numbers of samples.

    Where all features have been >= 0, as behind a ReLU, drawn ones below 0 are set to 0.

    Args:
        covariance: Its most important directions, that many of them; ``"full"``, all of them; or
            ``"diagonal"``.
        components: Gaussians per class, one for each cluster of k-means.

    Attributes:
        classes: What has been written, in the order of arrival.

    Raises:
        ValueError: For a bad argument; for features that are not finite.
    """

    def __init__(self, covariance: int | str = 20, *, components: int = 1) -> None:
        whole = isinstance(covariance, int) and not isinstance(covariance, bool)
        if not (whole and int(covariance) >= 1) and covariance not in ("full", "diagonal"):
            raise ValueError(
                f"GaussianMemory expects covariance='diagonal', 'full' or a whole number of "
                f"directions >= 1; got {covariance!r}."
            )
        if isinstance(components, bool) or not isinstance(components, int) or components < 1:
            raise ValueError(
                f"GaussianMemory expects a whole number components >= 1; got {components!r}."
            )
        self.covariance = covariance
        self.components = components
        self.nonnegative = True
        self._gaussians: dict[int, list[_Gaussian]] = {}

    @property
    def classes(self) -> list[int]:
        """See the class."""
        return list(self._gaussians)

    @property
    def nbytes(self) -> int:
        """Bytes of means and factors."""
        return sum(g.mean.nbytes + g.factor.nbytes for g in self._all())

    def write(self, u: Tensor, y: Tensor, generator: Generator | None = None) -> None:
        """Add samples of the classes in ``y``; densities of other classes stay as they are.

        Args:
            u: Features.
            y: Their classes.
            generator: Random numbers, on the CPU; only several components need them.

        Shapes:
            u ``(N, D)``, y ``(N,)``.
        """
        if not bool(torch.isfinite(u).all()):
            raise ValueError(
                "GaussianMemory expects finite features; training has diverged. Lower the "
                "learning rate."
            )
        self.nonnegative = self.nonnegative and bool((u >= 0).all())
        for label in y.unique().tolist():
            mine = u[y == label]
            cluster = torch.zeros(len(mine), dtype=torch.int64, device=u.device)
            if self.components > 1:
                cluster = k_means(mine, self.components, generator)
            new = [self._fit(mine[cluster == c]) for c in cluster.unique()]
            self._gaussians[label] = self._pooled([*self._gaussians.get(label, []), *new])

    def sample(self, n: int, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
        """``n`` features and their classes, which take turns: any stretch of them is even.

        Args:
            n: How many.
            generator: Random numbers, on the CPU.

        Shapes:
            results ``(n, D)`` and ``(n,)``.

        Raises:
            ValueError: If nothing has been written.
        """
        if not self._gaussians:
            raise ValueError("a GaussianMemory that is empty cannot be sampled; write to it first.")
        like = next(iter(self._all())).mean
        widths = [len(g.factor) for g in self._all()]  # as many for a diagonal as for all rows
        noise = normal_noise((n, max(widths)), generator, like)
        u = like.new_empty((n, len(like)))
        k = len(self._gaussians)
        turn = (torch.arange(n) + torch.randint(k, (1,), generator=generator)) % k
        for c, gaussians in enumerate(self._gaussians.values()):
            rows = torch.nonzero(turn == c)[:, 0]
            for gaussian, mine in _shared_out(gaussians, rows, generator):
                at = mine.to(u.device)
                u[at] = draw_gaussian(
                    gaussian.mean, gaussian.factor, noise[at, : len(gaussian.factor)]
                )
        y = torch.tensor(self.classes)[turn].to(u.device)
        return u.clamp_min_(0) if self.nonnegative else u, y

    def move(self, weight: Tensor, bias: Tensor) -> None:
        """Follow a space that has moved by an affine map.

        Shapes:
            weight ``(D, D)``, bias ``(D,)``.
        """
        for g in self._all():
            g.mean, g.factor = map_gaussian(g.mean, g.factor, weight, bias)

    def follow(self, before: Tensor, after: Tensor, kind: str) -> None:
        """Follow the space of some samples from one state to the next.

        Args:
            before: Their features before.
            after: And after it.
            kind: ``"linear"``: an affine map by ridge regression, that leaves alone the directions
                in which these samples do not vary; ``"sdc"``: every mean moves as the samples
                close to it.

        Shapes:
            both ``(N, D)``.
        """
        if kind == "linear":
            self.move(*ridge(before, after, towards_identity=True))
            return
        for g in self._all():
            g.mean = g.mean + drift_of(g.mean, before, after)

    def mean(self, label: int) -> Tensor:
        """Mean of a class ``(D,)``."""
        parts = self._gaussians[label]
        total = sum(g.count for g in parts)
        return torch.stack([g.count / total * g.mean for g in parts]).sum(0)

    def shift(self, label: int, by: Tensor) -> None:
        """Move all means of a class by a vector ``(D,)``."""
        for g in self._gaussians[label]:
            g.mean = g.mean + by

    def _all(self) -> list[_Gaussian]:
        return [g for gaussians in self._gaussians.values() for g in gaussians]

    def _fit(self, u: Tensor) -> _Gaussian:
        if self.covariance == "diagonal":
            mean, factor = diagonal_gaussian(u)
        else:
            mean, factor = low_rank_gaussian(u, self._rank)
        return _Gaussian(mean, factor.contiguous(), len(u))

    @property
    def _rank(self) -> int | None:
        return self.covariance if isinstance(self.covariance, int) else None

    def _pooled(self, gaussians: list[_Gaussian]) -> list[_Gaussian]:
        """At most ``components`` of them."""
        while len(gaussians) > self.components:
            means = torch.stack([g.mean for g in gaussians])
            pairs = list(itertools.combinations(range(len(gaussians)), 2))
            i, j = min(pairs, key=lambda p: float((means[p[0]] - means[p[1]]).square().sum()))
            one, other = gaussians[i], gaussians[j]
            mean, factor = pooled_gaussian(
                (one.mean, one.factor, one.count), (other.mean, other.factor, other.count),
                self._rank,
            )  # fmt: skip
            both = _Gaussian(mean, factor.contiguous(), one.count + other.count)
            gaussians = [both, *(g for k, g in enumerate(gaussians) if k not in (i, j))]
        return gaussians


def _shared_out(
    gaussians: list[_Gaussian], rows: Tensor, generator: Generator | None
) -> list[tuple[_Gaussian, Tensor]]:
    """Which rows each of a class's Gaussians fills: by chance, by numbers of samples."""
    if len(gaussians) == 1 or not len(rows):
        return [(gaussians[0], rows)]
    counts = torch.tensor([g.count for g in gaussians], dtype=torch.float64)
    which = torch.multinomial(counts, len(rows), replacement=True, generator=generator)
    return [(g, rows[which == i]) for i, g in enumerate(gaussians)]
