"""Protocols as typed data: one file per paper, one frozen dataclass per protocol."""

from __future__ import annotations

import difflib

from avalanche_ext.recipes.base import Recipe, with_settings
from avalanche_ext.recipes.drl_ber import RECIPES as _DRL_BER

__all__ = ["RECIPES", "Recipe", "find_recipe", "with_settings"]

RECIPES: dict[str, Recipe] = {**_DRL_BER}


def find_recipe(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        ValueError: If there is none; near matches are listed.
    """
    if name in RECIPES:
        return RECIPES[name]
    near = difflib.get_close_matches(name, RECIPES, n=4, cutoff=0.4)
    raise ValueError(
        f"there is no recipe {name!r}. {'Close: ' + ', '.join(near) + '. ' if near else ''}"
        f"'avalanche-ext list' shows all {len(RECIPES)}."
    )
