"""Recipes of online generative memory: what the outputs were is kept while a stream goes by once.

The source (Skorokhodov, 2019) proposes the three ideas and prints no figures.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from avalanche_ext.recipes.base import Recipe
from avalanche_ext.recipes.drl_ber import ReplayRecipe
from avalanche_ext.recipes.streams import SplitDigits, SplitMNIST

__all__ = ["RECIPES", "OnlineRecipe"]


@dataclass(frozen=True, kw_only=True)
class OnlineRecipe(Recipe):
    """A protocol of online generative memory.

    Args:
        mem: Inputs in the reservoir; no labels.
        n_inputs: Inputs per step.
        lam: Size of the extra steps over the optimizer's rate.
        steps: How many of them.
        eps: Bound on the change of each layer's outputs, of a projected step.
        eps_on: ``"step"`` or ``"gradient"``.
    """

    lr: float = 0.05
    hidden: tuple[int, ...] = (400, 400)
    batch_size: int = 32
    mem: int = 500
    n_inputs: int = 32
    lam: float = 0.1
    steps: int = 10
    eps: float = 0.0
    eps_on: str = "step"
    source: str = "Skorokhodov (2019), Generative Memory for Continual Learning"


_OWN: dict[str, dict[str, Any]] = {
    "online_lookahead": {"steps": 1},
    "online_distillation": {"n_inputs": 64},
    "online_projection": {"n_inputs": 16},
}


def _table(stream: str, **protocol: Any) -> dict[str, Recipe]:
    """The three of them between no memory and one with labels; one table."""
    made: dict[str, Recipe] = {}
    for key, own in _OWN.items():
        name = f"{key}/{stream}"
        made[name] = OnlineRecipe(name=name, method=key, **{**protocol, **own})
    main = made.pop(f"online_projection/{stream}")
    assert isinstance(main, OnlineRecipe)
    shared = {f.name: getattr(main, f.name) for f in dataclasses.fields(Recipe)}
    for method in ("naive", "er"):
        name = f"{method}/{stream}_online"
        made[name] = ReplayRecipe(**{**shared, "name": name, "method": method}, mem=main.mem)
    bounded = f"{main.name}_bounded"
    made[bounded] = dataclasses.replace(
        main, name=bounded, eps=1.0, eps_on="gradient", n_inputs=64,
        title="Online projection, bounded",
    )  # fmt: skip
    made[main.name] = dataclasses.replace(main, baselines=tuple(made))
    return made


RECIPES: dict[str, Recipe] = {
    **{
        f"{key}/split_digits": OnlineRecipe(
            name=f"{key}/split_digits", method=key, benchmark=SplitDigits(), hidden=(100, 100),
            batch_size=10, epochs=1, mem=200, **own,
        )
        for key, own in _OWN.items()
    },
    **_table("split_mnist_small", benchmark=SplitMNIST(train_per_experience=2000), epochs=1),
}  # fmt: skip
