"""Recipes of HAT, with a task label in training and at test, beside one network with many heads.

Settings were chosen on held-out training images.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from avalanche_ext.recipes.base import Recipe
from avalanche_ext.recipes.streams import SplitCIFAR100, SplitDigits, SplitMNIST

__all__ = ["RECIPES", "HATRecipe"]


@dataclass(frozen=True, kw_only=True)
class HATRecipe(Recipe):
    """A protocol of HAT.

    Args:
        lam: Weight of the capacity term.
        s_max: Scale of the gates in the last batch of an epoch.
    """

    lam: float = 0.75
    s_max: float = 400.0
    source: str = "Serra et al. (2018), Overcoming Catastrophic Forgetting with Hard Attention"


def _rows(stream: str, **protocol: Any) -> dict[str, Recipe]:
    plain, main = f"naive/{stream}_task", f"hat/{stream}"
    return {
        plain: Recipe(name=plain, method="naive", title="Naive, a head per task", **protocol),
        main: HATRecipe(name=main, method="hat", baselines=(plain,), **protocol),
    }


_DIGITS: dict[str, Any] = {
    "benchmark": SplitDigits(scenario="task"), "hidden": (64, 64), "epochs": 10, "lr": 0.1,
}  # fmt: skip
_MNIST = {**_DIGITS, "benchmark": SplitMNIST(scenario="task"), "hidden": (100, 100), "epochs": 1}
_CIFAR100 = {
    **_DIGITS, "benchmark": SplitCIFAR100(scenario="task"), "backbone": "conv_mlp",
    "hidden": (256,), "epochs": 20, "lr": 0.05, "batch_size": 64,
}  # fmt: skip

RECIPES: dict[str, Recipe] = {
    **_rows("split_digits", **_DIGITS),
    **_rows("split_mnist", **_MNIST),
    **_rows("cifar100_10", **_CIFAR100),
}
