"""Find an entry by name; near matches help who misspells it."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TypeVar

__all__ = ["lookup"]

Item = TypeVar("Item")


def lookup(kind: str, name: str, table: Mapping[str, Item]) -> Item:
    """The entry of that name.

    Raises:
        ValueError: If there is none; near matches are listed.
    """
    if name in table:
        return table[name]
    near = difflib.get_close_matches(name, table, n=4, cutoff=0.4)
    hint = f"Close: {', '.join(near)}. " if near else ""
    shown = (
        "'avalanche-ext list' shows them all."
        if kind in ("recipe", "method")
        else f"There are {', '.join(table)}."
    )
    raise ValueError(f"there is no {kind} {name!r}. {hint}{shown}")
