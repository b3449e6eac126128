"""A measured number beside a published one, and rows of different runs beside each other.

Verdict. The published interval is the paper's value ± its deviation (the value alone where the
paper gives none); the measured one is our mean ± its standard error, the sample deviation over the
root of the number of seeds (the mean alone for one seed). ``within``: the two overlap. ``below``,
``above``: ours lies wholly below or above. With one seed and no deviation there is no interval
on either side, and the verdict is ``undecided``; where our settings are not the paper's it is
``other protocol``. Below and above are meant as numbers: less forgetting is better.

The gap is measured minus published. A published number stands beside ours and enters no mean.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["VERDICTS", "Comparison", "compare", "differing", "merge", "published_of"]

VERDICTS = ("within", "below", "above", "undecided", "other protocol")
_SHARES = ("accuracy", "forgetting", "transfer", "intransigence")


@dataclass(frozen=True)
class Comparison:
    """A published figure, the gap to ours (``None`` without ours), and the verdict."""

    value: float
    deviation: float | None
    source: str
    gap: float | None
    verdict: str


def compare(
    measured: Mapping[str, Any] | None, published: Mapping[str, Any], *, same_protocol: bool = True
) -> Comparison:
    """Hold a mean over seeds to a paper's figure; see the module for the verdict.

    Args:
        measured: ``mean``, ``sd`` and ``values``, as ``aggregate`` gives them; or nothing.
        published: ``value``, ``deviation`` (or ``None``) and ``source``, in the same unit.
        same_protocol: Whether ours were measured in the protocol that the figure is for.
    """
    value, deviation = float(published["value"]), published.get("deviation")
    source = str(published.get("source", ""))
    if measured is None:
        return Comparison(value, deviation, source, None, "")
    mean, sd = measured["mean"], measured["sd"]
    if not same_protocol:
        return Comparison(value, deviation, source, mean - value, "other protocol")
    error = 0.0 if sd is None else sd / math.sqrt(len(measured["values"]))
    reach = error + (deviation or 0.0)
    if sd is None and deviation is None:
        verdict = "undecided"
    elif mean + reach < value:
        verdict = "below"
    elif mean - reach > value:
        verdict = "above"
    else:
        verdict = "within"
    return Comparison(value, deviation, source, mean - value, verdict)


def published_of(row: Mapping[str, Any], fields: Sequence[str]) -> dict[str, Comparison]:
    """A row's published figures by the field they are for.

    Args:
        row: Of a table, with ``published`` (see ``recipes.base.Published``) and, where its
            settings are not those that the figures are for, ``changed``.
        fields: What a table can show.

    Raises:
        ValueError: For an unknown quantity, two figures for one, or a percentage where the record
            holds a share of 1.
    """
    found: dict[str, Comparison] = {}
    for figure in row.get("published") or ():
        field = figure["quantity"]
        if field not in fields:
            near = difflib.get_close_matches(field, fields, n=3, cutoff=0.3)
            hint = f"Close: {', '.join(near)}." if near else f"There are {', '.join(fields)}."
            raise ValueError(f"{row['title']}: no column for the published {field!r}. {hint}")
        if field in found:
            raise ValueError(
                f"{row['title']}: two published figures for {field!r}; a table has one column for "
                f"them. Keep the one that the recipe is held to."
            )
        if abs(figure["value"]) > 1 and any(word in field for word in _SHARES):
            raise ValueError(
                f"{row['title']}: published {field} is a share, at most 1, as in the record; got "
                f"{figure['value']}. Is it in percent?"
            )
        found[field] = compare(row.get(field), figure, same_protocol=not row.get("changed"))
    return found


def merge(tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """The rows of several runs as one table.

    Args:
        tables: Rows by the name of their run. Each has its ``protocol``: what must be equal, as
            a flat mapping. Rows with one title get the run's name behind it.

    Raises:
        ValueError: If the protocols differ; the message names the fields. Also for a row whose
            protocol is not known.
    """
    rows = [(name, row) for name, table in tables.items() for row in table]
    for name, row in rows:
        if not row.get("protocol"):
            raise ValueError(
                f"the protocol of {row['title']!r} in {name} is not on record (no settings in its "
                f"summary, no recipe.json); its row cannot stand beside rows of another run."
            )
    unequal = differing((f"{row['title']!r} in {name}", row["protocol"]) for name, row in rows)
    if unequal:
        raise ValueError(
            f"rows of unequal protocol are not merged into one table; {'; '.join(unequal)}. "
            f"Report these runs one by one."
        )
    titles = [row["title"] for _, row in rows]
    return [
        {**row, "title": f"{row['title']} ({name})"} if titles.count(row["title"]) > 1 else {**row}
        for name, row in rows
    ]


def differing(protocols: Iterable[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """For each field in which a protocol differs from the first one: where, and both values."""
    (first, reference), *others = protocols
    found: dict[str, str] = {}
    for name, protocol in others:
        for field in sorted({*reference, *protocol}):
            ours, theirs = (p.get(field, "(absent)") for p in (reference, protocol))
            if ours != theirs:
                found.setdefault(field, f"{field} is {ours} for {first}, {theirs} for {name}")
    return list(found.values())
