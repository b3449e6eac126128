"""Protocols as typed data: one file per paper, one frozen dataclass per protocol."""

from __future__ import annotations

from avalanche_ext.recipes.base import Recipe, lookup, with_settings
from avalanche_ext.recipes.drl_ber import RECIPES as _DRL_BER

__all__ = ["RECIPES", "Recipe", "find_recipe", "with_settings"]

RECIPES: dict[str, Recipe] = {**_DRL_BER}


def find_recipe(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        ValueError: If there is none; near matches are listed.
    """
    return lookup("recipe", name, RECIPES)
