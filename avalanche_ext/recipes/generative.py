"""Recipes of generative replay: DGR and its baselines on MNIST, and what a CPU finishes.

Settings of ``split_mnist_paper`` are those of van de Ven & Tolias (2018), whose figures for DGR
are on record (20 seeds); the others are sized for a CPU. Steps are Adam's, as in the papers.
``noise``, ``exact`` and no replay are the source's baselines; its "ER" is exact replay.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from avalanche_ext.recipes.base import Published, Recipe
from avalanche_ext.recipes.streams import PermutedMNIST, SplitDigits, SplitMNIST

__all__ = ["RECIPES", "GenerativeRecipe"]

_SOURCE = "Shin, Lee, Kim, Kim (2017), Continual Learning with Deep Generative Replay"


@dataclass(frozen=True, kw_only=True)
class GenerativeRecipe(Recipe):
    """A protocol of generative replay.

    Args:
        replay: Where samples come from: ``"generator"``, ``"noise"`` or ``"exact"``.
        generator: Its name in ``models.generators.build``.
        labels: ``"hard"`` or ``"soft"`` of the last solver, or ``"source"``.
        r: Weight of the new data: ``"1/t"``, ``"class_ratio"`` or a number.
        generator_r: The same for the generator's own training.
        generator_lr: The generator's learning rate, where it is not its own.
        generator_epochs: The generator's passes over an experience, where it learns by itself.
        schedule: When it learns: ``"interleaved"``, ``"before"`` or ``"after"``.
        prefetch: Steps for which samples are made at once.
    """

    optimizer: str = "adam"
    lr: float = 1e-3
    hidden: tuple[int, ...] = (400, 400)
    batch_size: int = 64
    replay: str = "generator"
    generator: str = "small_vae"
    labels: str = "hard"
    r: str = "1/t"
    generator_r: str = "1/t"
    generator_lr: float | None = None
    generator_epochs: int = 1
    schedule: str | None = None
    prefetch: int = 1
    source: str = _SOURCE


def _with_baselines(
    stream: str, rows: dict[str, dict[str, Any]], **protocol: Any
) -> dict[str, Recipe]:
    """Variants of DGR by the suffix of their name, no replay and joint training; one table."""
    main = GenerativeRecipe(name=f"dgr/{stream}", method="dgr", **protocol)
    shared = {f.name: getattr(main, f.name) for f in dataclasses.fields(Recipe)}
    made: dict[str, Recipe] = {}
    for method in ("naive", "joint"):
        name = f"{method}/{stream}_generative"
        made[name] = Recipe(**{**shared, "name": name, "method": method, "published": ()})
    for suffix, changes in rows.items():
        name = f"dgr/{stream}_{suffix}"
        made[name] = dataclasses.replace(main, name=name, published=(), **changes)
    made[main.name] = dataclasses.replace(main, baselines=tuple(made))
    return made


_NOISE = {"replay": "noise", "title": "Noise replay"}
_EXACT = {"replay": "exact", "labels": "source", "title": "Exact replay"}
_SOFT = {"labels": "soft", "title": "DGR, soft labels"}
_CONDITIONAL = {"generator": "small_cvae", "labels": "source", "title": "DGR, conditional"}

RECIPES: dict[str, Recipe] = {
    "dgr/split_digits": GenerativeRecipe(
        name="dgr/split_digits", method="dgr", benchmark=SplitDigits(), hidden=(100,),
        batch_size=16, epochs=20, lr=3e-3, generator="tiny_vae",
    ),
    **_with_baselines(
        "split_mnist",
        {"noise": _NOISE, "exact": _EXACT, "soft": _SOFT, "conditional": _CONDITIONAL},
        benchmark=SplitMNIST(), epochs=3,
    ),
    **_with_baselines(
        "split_mnist_10", {"exact": _EXACT, "soft": _SOFT},
        benchmark=SplitMNIST(n_experiences=10), epochs=6,
    ),
    **_with_baselines(
        "permuted_mnist_5",
        {"noise": {**_NOISE, "labels": "soft"}, "exact": _EXACT,
         "hard": {"labels": "hard", "title": "DGR, hard labels"}},
        benchmark=PermutedMNIST(n_experiences=5, train_per_experience=10_000), epochs=2,
        labels="soft",
    ),
    "dgr/split_mnist_paper": GenerativeRecipe(
        name="dgr/split_mnist_paper", method="dgr", benchmark=SplitMNIST(), generator="vae",
        batch_size=128, epochs=21, seeds=tuple(range(20)),
        published=(
            Published("average_accuracy", 0.9124, None,
                      "van de Ven, Tolias (2018), Generative replay with feedback connections"),
        ),
    ),
}  # fmt: skip
