"""Units that compete in blocks: only the largest of each block is passed on.

Reference:
    Goodfellow et al. (2013), Maxout Networks; Srivastava et al. (2013), Compete to Compute; as the
    activation functions that Aljundi et al. (2018), Selfless Sequential Learning, Sec. 3, compares.

Faithfulness:
    1. Blocks are of two units, and no ReLU comes before or behind, as in the released networks.
    2. A winner passes its signed value; of equal units the first wins; nothing is padded.
    3. Behind Maxout the next layer sees half as many units: at equal widths before the competition
       the network is smaller than one with ReLU, as in the released code.

Cost: one comparison per unit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["LWTA", "CompetitiveMLP", "Maxout"]


class _Blocks(nn.Module):
    """Blocks of ``k`` units that follow one another along axis 1."""

    def __init__(self, k: int = 2) -> None:
        super().__init__()
        if isinstance(k, bool) or not isinstance(k, int):
            raise TypeError(f"{type(self).__name__} expects a whole number k >= 1; got {k!r}.")
        if k < 1:
            raise ValueError(f"{type(self).__name__} expects k >= 1; got {k}.")
        self.k = k

    def extra_repr(self) -> str:
        """The size of a block."""
        return f"k={self.k}"

    def _split(self, h: Tensor) -> Tensor:
        if h.ndim < 2 or h.shape[1] % self.k:
            raise ValueError(
                f"{type(self).__name__}(k={self.k}) expects (B, N, ...) with N a multiple of "
                f"{self.k}; got {tuple(h.shape)}. Change the width of the layer before it."
            )
        return h.unflatten(1, (-1, self.k))


class Maxout(_Blocks):
    """The largest of each block of ``k`` consecutive units; replaces the activation function.

    Args:
        k: Units per block, >= 1. Paper: 2.

    Shapes:
        input ``(B, N, ...)``, output ``(B, N / k, ...)``.

    Raises:
        ValueError: If ``k`` does not divide ``N``: nothing is padded.

    References:
        Goodfellow et al. (2013).
    """

    def forward(self, h: Tensor) -> Tensor:
        """The winners."""
        return self._split(h).max(dim=2).values


class LWTA(_Blocks):
    """Local winner takes all: of each block only the largest unit keeps its value, signed.

    The others become 0. No gradient goes through the choice; of equal units the first wins.

    Args:
        k: Units per block, >= 1. Paper: 2.

    Shapes:
        input and output ``(B, N, ...)``.

    Raises:
        ValueError: If ``k`` does not divide ``N``.

    References:
        Srivastava et al. (2013).
    """

    def forward(self, h: Tensor) -> Tensor:
        """Winners at their places, zeros elsewhere."""
        blocks = self._split(h)
        winners = blocks.argmax(dim=2, keepdim=True)
        places = torch.arange(self.k, device=h.device).view(-1, *[1] * (blocks.ndim - 3))
        return torch.where(winners == places, blocks, 0.0).flatten(1, 2)


class CompetitiveMLP(nn.Module):
    """Fully connected network whose hidden units compete in blocks instead of passing a ReLU.

    ``CompetitiveMLP(784, (256, 128), 10)`` is the released maxout network of width 128:
    784-256, pooled to 128, 128-128, pooled to 64, 64-10.

    Args:
        in_features: Numbers per sample after flattening.
        hidden: Width of each hidden layer before the competition; multiples of ``k``.
        n_classes: Outputs.
        activation: ``"maxout"`` (the next layer sees ``N / k`` units) or ``"lwta"`` (all ``N``).
        k: Units per block.

    Shapes:
        input ``(B, ...)`` with ``in_features`` numbers per sample, output ``(B, n_classes)``.

    Raises:
        ValueError: For widths that are not positive multiples of ``k`` or an unknown activation.
    """

    def __init__(
        self,
        in_features: int,
        hidden: Sequence[int],
        n_classes: int,
        *,
        activation: str = "maxout",
        k: int = 2,
    ) -> None:
        super().__init__()
        if activation not in ("maxout", "lwta"):
            raise ValueError(
                f"CompetitiveMLP expects activation 'maxout' or 'lwta'; got {activation!r}."
            )
        bad = [width for width in hidden if k < 1 or width < 1 or width % k]
        if not hidden or bad or min(in_features, n_classes, k) < 1:
            raise ValueError(
                f"CompetitiveMLP expects positive widths, hidden ones multiples of k >= 1; got "
                f"k={k}, {in_features}, {list(hidden)} and {n_classes} classes."
            )
        competition = Maxout if activation == "maxout" else LWTA
        shrink = k if activation == "maxout" else 1
        seen = [in_features, *(width // shrink for width in hidden)]
        layers: list[nn.Module] = []
        for wide, narrow in zip(seen[:-1], hidden, strict=True):
            layers += [nn.Linear(wide, narrow), competition(k)]
        self.features = nn.Sequential(*layers)
        self.num_features = seen[-1]
        self.classifier = nn.Linear(seen[-1], n_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of a batch."""
        return self.classifier(self.features(x.flatten(1)))
