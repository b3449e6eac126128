"""Protocols as typed data: one file per paper, one frozen dataclass per protocol."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from avalanche_ext.recipes.base import Recipe
from avalanche_ext.recipes.core50 import RECIPES as _CORE50
from avalanche_ext.recipes.drl_ber import RECIPES as _DRL_BER
from avalanche_ext.recipes.expandable_der import RECIPES as _EXPANDABLE_DER
from avalanche_ext.recipes.generative import RECIPES as _GENERATIVE
from avalanche_ext.recipes.hat import RECIPES as _HAT
from avalanche_ext.recipes.latent import RECIPES as _LATENT
from avalanche_ext.recipes.names import lookup
from avalanche_ext.recipes.online import RECIPES as _ONLINE
from avalanche_ext.recipes.selfless import RECIPES as _SELFLESS
from avalanche_ext.recipes.settings import from_settings, is_file, read_settings, with_settings

__all__ = ["RECIPES", "Recipe", "find_recipe", "load_recipe", "with_settings"]

RECIPES: dict[str, Recipe] = {
    **_DRL_BER, **_CORE50, **_EXPANDABLE_DER, **_HAT, **_SELFLESS, **_GENERATIVE, **_LATENT,
    **_ONLINE,
}  # fmt: skip


def find_recipe(name: str) -> Recipe:
    """The registered recipe of that name, or the recipe of a YAML or JSON file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If there is no such recipe; near matches are listed.
    """
    if is_file(name):
        return from_settings(read_settings(Path(name)), RECIPES)[0]
    return lookup("recipe", name, RECIPES)


def load_recipe(
    name: str,
    settings: Mapping[str, Any] | None = None,
    *,
    seeds: Sequence[int] | None = None,
    order_seeds: Sequence[int] | None = None,
    smoke: bool = False,
) -> tuple[Recipe, list[Recipe]]:
    """A recipe as a command line states it, and its baselines with the same changes.

    Args:
        name: A registered recipe, or a YAML or JSON file.
        settings: Changed fields, see ``with_settings``; they go before those of the file. A
            baseline takes those that it has.
        seeds: Instead of the recipe's.
        order_seeds: Instead of the recipe's.
        smoke: Few images, one epoch, one seed.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: For unknown names and fields, and values of another type.
    """
    shared: dict[str, Any] = {}
    if is_file(name):
        recipe, shared = from_settings(read_settings(Path(name)), RECIPES)
    else:
        recipe = find_recipe(name)
    own = dict(settings or {})
    drawn = {
        field: tuple(dict.fromkeys(values))
        for field, values in (("seeds", seeds), ("order_seeds", order_seeds))
        if values is not None
    }
    recipe = with_settings(recipe, own)
    # Both at once: one without the other may not pair up.
    recipe = dataclasses.replace(recipe.smoke() if smoke else recipe, **drawn)
    pairs = {"seeds": recipe.seeds, "order_seeds": recipe.order_seeds}
    baselines = []
    for baseline in map(find_recipe, recipe.baselines):
        fields = {f.name for f in dataclasses.fields(baseline)}
        changes = {
            k: v for k, v in {**shared, **own}.items()
            if k.split(".")[0] in fields and k not in pairs
        }  # fmt: skip
        changed = with_settings(baseline, changes)
        baselines.append(dataclasses.replace(changed.smoke() if smoke else changed, **pairs))
    return recipe, baselines
