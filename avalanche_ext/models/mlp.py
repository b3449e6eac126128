"""The multi-layer perceptron of the small benchmarks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor, nn

__all__ = ["MLP"]


class MLP(nn.Module):
    """Fully connected network with ReLU: flatten, hidden layers, a linear classifier.

    ``MLP(784, (100, 100), 10)`` is the network of the paper's MNIST analysis and of the Split
    MNIST protocols (89,610 parameters). No dropout, no normalisation.

    Args:
        in_features: Numbers per sample after flattening.
        hidden: Width of each hidden layer.
        n_classes: Outputs; 0 for the last hidden layer's (``num_features`` of them).

    Shapes:
        input ``(B, ...)`` with ``in_features`` numbers per sample, output ``(B, n_classes)``.

    Raises:
        ValueError: If a width is not positive, or there is neither a hidden layer nor a class.
    """

    def __init__(self, in_features: int, hidden: Sequence[int], n_classes: int) -> None:
        super().__init__()
        widths = [in_features, *hidden]
        if min(widths) < 1 or n_classes < 0 or not (hidden or n_classes):
            raise ValueError(f"MLP expects positive widths; got {widths} and {n_classes} classes.")
        layers: list[nn.Module] = []
        for wide, narrow in itertools.pairwise(widths):
            layers += [nn.Linear(wide, narrow), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.num_features = widths[-1]
        self.classifier = nn.Linear(widths[-1], n_classes) if n_classes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Logits of a batch."""
        return self.classifier(self.features(x.flatten(1)))
