"""Tables of results: mean and sample standard deviation over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["COLUMNS", "aggregate", "as_markdown", "as_text"]

# (field of a row, heading, factor, digits)
COLUMNS: tuple[tuple[str, str, float, int], ...] = (
    ("average_accuracy", "accuracy %", 100, 1),
    ("average_incremental_accuracy", "incremental %", 100, 1),
    ("forgetting", "forgetting %", 100, 1),
    ("seconds", "train s", 1, 1),
    ("bytes_remembered", "memory bytes", 1, 0),
    ("samples_trained", "samples", 1, 0),
)


def aggregate(values: Sequence[float]) -> dict[str, Any]:
    """Mean and sample standard deviation (``None`` for one value), with the values."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "sd": deviation, "values": list(values)}


def as_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a table for a terminal."""
    cells = _cells(rows)
    widths = [max(len(row[k]) for row in cells) for k in range(len(cells[0]))]
    lines = []
    for first, *others in cells:
        aligned = [c.rjust(w) for c, w in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *aligned]))
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def as_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a Markdown table."""
    head, *body = _cells(rows)
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, rule, *body])


def _cells(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    shown = [c for c in COLUMNS if any(c[0] in row for row in rows)]
    body = [
        [str(row["title"]), str(row["seeds"])]
        + [_number(row.get(field), factor, digits) for field, _, factor, digits in shown]
        for row in rows
    ]
    return [["method", "seeds", *(heading for _, heading, _, _ in shown)], *body]


def _number(value: Mapping[str, Any] | None, factor: float, digits: int) -> str:
    if value is None:
        return ""
    mean = f"{factor * value['mean']:,.{digits}f}"
    if value["sd"] is None or digits == 0:
        return mean
    return f"{mean} ± {factor * value['sd']:.{digits}f}"
