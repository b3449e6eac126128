"""Bridges from one embedding to an earlier one, and rows of them.

The spaces of a row are numbered from 0, the oldest; features come in the newest.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn.utils import skip_init

from avalanche_ext.functional.linear_map import r_squared, ridge
from avalanche_ext.models.mlp import MLP

__all__ = ["Bridges", "align"]

_HIDDEN, _STEPS, _BATCH, _RATE = 128, 400, 256, 2e-3  # of a bridge that is a network


class Bridges(nn.Module):
    r"""Maps from the newest of several embeddings to every earlier one.

    Args:
        kind: ``"linear"``: affine, by ridge regression; ``"mlp"``: one hidden layer, trained on the
            squared distance.
        compose: ``"chain"``: one bridge between neighbours, applied one after the other;
            ``"direct"``: one map to each earlier space, fitted again when a space is added.
        lam: Weight of the ridge, over the sum of squared distances of all samples.

    Raises:
        ValueError: For a bad argument.
    """

    def __init__(self, kind: str = "linear", *, compose: str = "chain", lam: float = 1e-2) -> None:
        super().__init__()
        if kind not in ("linear", "mlp") or compose not in ("chain", "direct") or not lam >= 0:
            raise ValueError(
                f"Bridges expects kind 'linear' or 'mlp', compose 'chain' or 'direct' and lam >= "
                f"0; got kind={kind!r}, compose={compose!r}, lam={lam}."
            )
        self.kind = kind
        self.compose = compose
        self.lam = lam
        self.maps = nn.ModuleList()

    @property
    def newest(self) -> int:
        """Number of the space that features come in."""
        return len(self.maps)

    @torch.no_grad()
    def forward(self, u: Tensor, space: int) -> Tensor:
        """Features in an earlier space.

        Args:
            u: In the newest.
            space: Number of the earlier one; the newest leaves them as they are.

        Shapes:
            u ``(B, D)``, result ``(B, E)`` with the size of that space.

        Raises:
            ValueError: If there is no such space.
        """
        if not 0 <= space <= self.newest:
            raise ValueError(
                f"there are bridges to spaces 0 to {self.newest}; got a request for {space}."
            )
        if self.compose == "direct":
            return self.maps[space](u) if space < self.newest else u
        for k in reversed(range(space, self.newest)):
            u = self.maps[k](u)
        return u

    def extend(self, new: Tensor, old: Tensor, generator: Generator | None = None) -> float:
        """Add a space, from features of the same samples in it and in the newest so far.

        Args:
            new: In the space that is added.
            old: In the newest so far.
            generator: Random numbers, on the CPU; only networks need them.

        Shapes:
            new ``(N, D)``, old ``(N, E)``.

        Returns:
            R squared of the bridge between the two, on these samples.
        """
        if self.compose == "chain":
            self.maps.append(self._fit(new, old, generator))
        else:
            targets = [*(self(old, k) for k in range(self.newest)), old]
            self.maps = nn.ModuleList(self._fit(new, target, generator) for target in targets)
        return float(r_squared(self(new, self.newest - 1), old))

    def _fit(self, x: Tensor, y: Tensor, generator: Generator | None) -> nn.Module:
        return _affine(x, y, self.lam) if self.kind == "linear" else _network(x, y, generator)


def align(
    features: Sequence[Tensor],
    kind: str = "linear",
    *,
    compose: str = "chain",
    lam: float = 1e-2,
    generator: Generator | None = None,
) -> Bridges:
    """Bridges between networks that were trained apart, from the last to every other.

    Prediction of network ``k``'s task from the last embedder: ``head_k(bridges(f_last(x), k))``.

    Args:
        features: For each network its features of the same samples, ``(N, D)``. They should be
            samples of all tasks: a bridge that is fitted on one task's data alone does not hold
            for another's, where networks have never seen each other's data.
        kind: See ``Bridges``.
        compose: See ``Bridges``; here direct maps are fitted to the networks' own features.
        lam: See ``Bridges``.
        generator: See ``Bridges.extend``.

    Raises:
        ValueError: If there are fewer than two networks.
    """
    if len(features) < 2:
        raise ValueError(f"align expects features of at least two networks; got {len(features)}.")
    bridges = Bridges(kind, compose=compose, lam=lam)
    if compose == "chain":
        for old, new in itertools.pairwise(features):
            bridges.extend(new, old, generator)
    else:
        last = features[-1]
        bridges.maps.extend(bridges._fit(last, old, generator) for old in features[:-1])
    return bridges


def _affine(x: Tensor, y: Tensor, lam: float) -> nn.Module:
    weight, bias = ridge(x, y, lam)
    layer: Any = skip_init(nn.Linear, x.shape[1], y.shape[1], dtype=y.dtype, device=y.device)
    layer.weight.data.copy_(weight)
    layer.bias.data.copy_(bias)
    return layer.requires_grad_(False)


@torch.enable_grad()
def _network(x: Tensor, y: Tensor, generator: Generator | None) -> nn.Module:
    with torch.random.fork_rng(devices=[]):  # layers draw from the global random state
        if generator is not None:
            torch.default_generator.manual_seed(generator.initial_seed())
        network = MLP(x.shape[1], (_HIDDEN,), y.shape[1]).to(y)
    x, y = x.detach(), y.detach()
    optimizer = torch.optim.Adam(network.parameters(), _RATE)
    for _ in range(_STEPS):
        rows = torch.randint(len(x), (min(_BATCH, len(x)),), generator=generator).to(x.device)
        loss = (network(x[rows]) - y[rows]).square().sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    optimizer.zero_grad()
    return network.requires_grad_(False)
