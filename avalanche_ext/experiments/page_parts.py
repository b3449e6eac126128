"""Pieces of the report's page: tables that scroll on a narrow screen, captioned charts, bars."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

__all__ = ["bars", "details", "figure", "settings_table", "strips", "table"]


def table(
    cells: Sequence[Sequence[str]],
    names: Sequence[str],
    label: str,
    cell: Callable[[str], str] = escape,
) -> str:
    """A table of numbers; its last row is the main system's.

    Args:
        cells: A row of headings, then one per system.
        names: HTML for the first column.
        label: What the table is, for whoever does not see it.
        cell: HTML of a cell.
    """
    head, *body = cells
    lines = []
    for name, row in zip(names, body, strict=True):
        main = ' class="main"' if row is body[-1] and len(body) > 1 else ""
        values = "".join(f"<td>{cell(text)}</td>" for text in row[1:])
        lines.append(f'<tr{main}><th scope="row">{name}</th>{values}</tr>')
    headings = "".join(f'<th scope="col">{_heading(text)}</th>' for text in head)
    return _scroll(
        label,
        f"<table><thead><tr>{headings}</tr></thead><tbody>{''.join(lines)}</tbody></table>",
    )


def figure(title: str, text: str, body: str) -> str:
    """A chart in a card; ``title`` is HTML, ``text`` is not."""
    return f"<figure><figcaption><strong>{title}</strong>{escape(text)}</figcaption>{body}</figure>"


def details(title: str, body: str) -> str:
    """What opens on demand."""
    return f"<details><summary>{escape(title)}</summary>{body}</details>"


def bars(
    names: Sequence[tuple[str, int]], values: Sequence[Mapping[str, Any] | None], unit: str
) -> str:
    """One bar per system, as long as its mean, with the number beside its name.

    Args:
        names: Name and colour of each system.
        values: Its ``mean`` and ``sd``, or nothing.
        unit: ``"B"`` is printed in KiB, MiB and so on too.
    """
    largest = max((v["mean"] for v in values if v is not None), default=0) or 1
    lines = []
    for (name, color), value in zip(names, values, strict=True):
        share = 0 if value is None else 100 * value["mean"] / largest
        told = "not on record" if value is None else _amount(value, unit)
        bar = f'<i style="width:{share:.2f}%"></i>' if share else ""
        lines.append(
            f'<li class="s{color}"><div class="name"><span>{escape(name)}</span>'
            f'<span>{told}</span></div><div class="track" aria-hidden="true">'
            f"{bar}</div></li>"
        )
    return f'<ul class="bars">{"".join(lines)}</ul>'


def strips(pictures: Sequence[tuple[str, bytes]]) -> str:
    """Pictures (PNG) one below the other, each with its name in front."""
    lines = []
    for name, png in pictures:
        data = base64.b64encode(png).decode("ascii")
        lines.append(
            f"<li><span>{escape(name)}</span>"
            f'<img alt="samples, {escape(name)}" src="data:image/png;base64,{data}"></li>'
        )
    return f'<ul class="strips">{"".join(lines)}</ul>'


def settings_table(recipes: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """The settings of the recipes; one value where all agree, one per system where they do not."""
    fields = list(dict.fromkeys(field for _, settings in recipes for field in settings))
    lines = []
    for field in fields:
        values = [(title, settings.get(field)) for title, settings in recipes]
        first = values[0][1]
        if field == "baselines" or all(v == first for _, v in values):
            text = _setting(first)
        else:
            text = "<br>".join(f"{escape(title)}: {_setting(v)}" for title, v in values)
        lines.append(f'<tr><th scope="row">{escape(field)}</th><td>{text}</td></tr>')
    return _scroll("Settings", f'<table class="settings"><tbody>{"".join(lines)}</tbody></table>')


def _heading(text: str) -> str:
    return escape(text).replace(" %", "&nbsp;%")


def _setting(value: Any) -> str:
    if isinstance(value, list):
        return ("; " if dict in map(type, value) else ", ").join(map(_setting, value)) or "none"
    if isinstance(value, Mapping) and "quantity" in value:
        spread = "" if value.get("deviation") is None else f" ± {value['deviation']}"
        return escape(f"{value['quantity']} {value['value']}{spread} ({value.get('source', '')})")
    if isinstance(value, Mapping):
        return ", ".join(f"{escape(str(k))}: {_setting(v)}" for k, v in value.items())
    if value is None:
        return "none"
    return escape(value if isinstance(value, str) else json.dumps(value))


def _amount(value: Mapping[str, Any], unit: str) -> str:
    mean, sd = value["mean"], value["sd"]
    if unit == "s":
        digits = 1 if mean >= 1 else 3
        return f"{mean:,.{digits}f}" + ("" if sd is None else f" ± {sd:,.{digits}f}") + " s"
    if unit == "B":
        return _binary(mean)
    if unit == "FLOP":
        return _decimal(mean)
    return f"{mean:,.0f} {unit}".strip()


def _decimal(number: float) -> str:
    for power, unit in ((9, "GFLOP"), (6, "MFLOP"), (3, "kFLOP")):
        if number >= 10**power:
            return f"{number / 10**power:,.3g} {unit}"
    return f"{number:,.0f} FLOP"


def _binary(number: float) -> str:
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if number >= 1024**power:
            return f"{number / 1024**power:,.1f} {unit}"
    return f"{number:,.0f} B"


def _scroll(label: str, body: str) -> str:
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}">{body}</div>'
    )
