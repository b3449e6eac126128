"""Tables of results: mean and sample standard deviation over seeds.

A row is a mapping: ``title``, ``seeds``, and per field what ``aggregate`` returns. With
``published`` figures (see ``comparison``) it gains three columns for each: the figure, the gap,
the verdict.
"""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from avalanche_ext.evaluation.comparison import Comparison, differing, published_of

__all__ = [
    "ALL_COLUMNS",
    "COLUMNS",
    "FORMATS",
    "OPTIONAL_COLUMNS",
    "aggregate",
    "as_csv",
    "as_latex",
    "as_markdown",
    "as_text",
    "footnotes",
    "formatted",
    "measured_fields",
    "table_cells",
]

Rows = Sequence[Mapping[str, Any]]

# (field of a row, heading, factor, digits)
COLUMNS: tuple[tuple[str, str, float, int], ...] = (
    ("average_accuracy", "accuracy %", 100, 1),
    ("average_incremental_accuracy", "incremental %", 100, 1),
    ("forgetting", "forgetting %", 100, 1),
    ("seconds", "train s", 1, 1),
    ("bytes_remembered", "memory bytes", 1, 0),
    ("samples_trained", "samples", 1, 0),
)

# The same for what only some records hold.
OPTIONAL_COLUMNS: tuple[tuple[str, str, float, int], ...] = (
    ("test_accuracy", "test accuracy %", 100, 1),
    ("average_validation_accuracy", "average valid %", 100, 1),
    ("average_accuracy_after_5", "accuracy % after 5", 100, 1),
    ("average_incremental_accuracy_samples", "incremental % (samples)", 100, 1),
    ("backward_transfer_gem", "BWT (GEM) %", 100, 1),
    ("backward_transfer_expandable_der", "BWT (ExpandableDER) %", 100, 1),
    ("forward_transfer_gem", "FWT (GEM) %", 100, 1),
    ("forward_transfer_expandable_der", "FWT (ExpandableDER) %", 100, 1),
    ("intransigence", "intransigence %", 100, 1),
    ("generator_accuracy_after_5", "generator accuracy % after 5", 100, 1),
    ("generator_accuracy", "generator accuracy %", 100, 1),
    ("reverse_accuracy", "reverse accuracy %", 100, 1),
    ("critic_accuracy", "critic accuracy %", 100, 1),
    ("generator_distance", "Fréchet distance", 1, 2),
    ("generator_precision", "generator precision %", 100, 1),
    ("generator_recall", "generator recall %", 100, 1),
    ("flops_per_sample", "FLOPs per sample", 1, 0),
    ("parameters_mean", "parameters (mean)", 1, 0),
    ("peak_rss_bytes", "peak memory bytes", 1, 0),
    ("peak_device_bytes", "peak device bytes", 1, 0),
)

ALL_COLUMNS = (
    OPTIONAL_COLUMNS[:3] + COLUMNS[:3] + OPTIONAL_COLUMNS[3:9] + COLUMNS[3:] + OPTIONAL_COLUMNS[9:]
)


def aggregate(values: Sequence[float]) -> dict[str, Any]:
    """Mean and sample standard deviation (``None`` for one value), with the values."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "sd": deviation, "values": list(values)}


def measured_fields(results: Rows) -> dict[str, dict[str, Any]]:
    """Aggregate over seeds every field of a table that all results hold; none without results."""
    return {
        field: aggregate([result[field] for result in results])
        for field, *_ in ALL_COLUMNS
        if results and all(isinstance(r.get(field), int | float) for r in results)
    }


def table_cells(rows: Rows) -> list[list[str]]:
    """The table as text: a row of headings, then one per system."""
    shown = _shown(rows)
    figures = [published_of(row, [c[0] for c in ALL_COLUMNS]) for row in rows]
    head = ["method", "seeds"]
    body = [[str(row["title"]), str(row["seeds"])] for row in rows]
    for field, heading, factor, digits in shown:
        head.append(heading)
        for cells, row in zip(body, rows, strict=True):
            cells.append(_number(row.get(field), factor, digits))
        if not any(field in found for found in figures):
            continue
        head += [f"{heading} published", "gap", "verdict"]
        for cells, found in zip(body, figures, strict=True):
            cells += _published(found.get(field), factor, digits)
    return [head, *body]


def as_text(rows: Rows) -> str:
    """The rows as a table for a terminal."""
    cells = table_cells(rows)
    widths = [max(len(row[k]) for row in cells) for k in range(len(cells[0]))]
    lines = []
    for first, *others in cells:
        aligned = [c.rjust(w) for c, w in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *aligned]))
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def as_markdown(rows: Rows) -> str:
    """The rows as a Markdown table."""
    head, *body = [[c.replace("|", "\\|") for c in row] for row in table_cells(rows)]
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, rule, *body])


def as_latex(rows: Rows) -> str:
    """The rows as a LaTeX ``tabular``, with the notes as comments."""
    head, *body = [" & ".join(_escaped(c) for c in row) + r" \\" for row in table_cells(rows)]
    columns = "l" + "r" * (len(table_cells(rows)[0]) - 1)
    return "\n".join(
        [
            r"% \usepackage{booktabs}",
            *(f"% {note}" for note in footnotes(rows)),
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            head,
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
        ]
    )


def as_csv(rows: Rows) -> str:
    """The rows as comma-separated values in the record's own units and full precision.

    Per field ``_mean``, ``_sd`` and, where a figure was published, ``_published``,
    ``_published_sd``, ``_gap``, ``_verdict`` and ``_source``; empty where there is none.
    """
    figures = [published_of(row, [c[0] for c in ALL_COLUMNS]) for row in rows]
    lines = []
    for row, found in zip(rows, figures, strict=True):
        line = {"method": row["title"], "recipe": row.get("recipe", ""), "seeds": row["seeds"]}
        line["parameters"] = row.get("parameters", "")
        for field, *_ in _shown(rows):
            value = row.get(field) or {"mean": None, "sd": None}
            line |= {f"{field}_mean": value["mean"], f"{field}_sd": value["sd"]}
            if any(field in others for others in figures):
                line |= _csv_of(field, found.get(field))
        lines.append(line)
    file = io.StringIO()
    writer = csv.DictWriter(file, list(lines[0]) if lines else ["method"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return file.getvalue().rstrip("\n")


def footnotes(rows: Rows) -> list[str]:
    """What a reader of the table must know: where figures come from, what does not compare."""
    notes = []
    for row in rows:
        for field, figure in published_of(row, [c[0] for c in ALL_COLUMNS]).items():
            notes.append(f"{row['title']}, published {_heading(field)}: {figure.source}")
        if row.get("published") and row.get("changed"):
            notes.append(
                f"{row['title']} was not run in the protocol that its published figures are for; "
                f"changed: {', '.join(row['changed'])}."
            )
    if notes:
        notes.append(
            "Verdict: whether the measured mean ± its standard error and the published value ± its "
            "deviation overlap (within), or ours lies below or above."
        )
    protocols = [(repr(row["title"]), row["protocol"]) for row in rows if row.get("protocol")]
    unequal = differing(protocols) if protocols else []
    if unequal:
        notes.append(f"Not all rows share one protocol: {'; '.join(unequal)}.")
    return list(dict.fromkeys(notes))


def formatted(value: float, factor: float = 1, digits: int = 0) -> str:
    """A number as the tables print it."""
    return f"{factor * value:,.{digits}f}"


FORMATS: dict[str, Callable[[Rows], str]] = {
    "terminal": as_text,
    "markdown": as_markdown,
    "latex": as_latex,
    "csv": as_csv,
}


def _shown(rows: Rows) -> list[tuple[str, str, float, int]]:
    held = {*(field for row in rows for field in row)}
    sizes = {row["parameters_mean"]["mean"] for row in rows if "parameters_mean" in row}
    if len(sizes) < 2:  # of interest where networks differ in size
        held.discard("parameters_mean")
    held |= {figure["quantity"] for row in rows for figure in row.get("published") or ()}
    return [c for c in ALL_COLUMNS if c[0] in held]


def _heading(field: str) -> str:
    return next(c[1] for c in ALL_COLUMNS if c[0] == field)


def _number(value: Mapping[str, Any] | None, factor: float, digits: int) -> str:
    if value is None:
        return ""
    mean = formatted(value["mean"], factor, digits)
    if value["sd"] is None or digits == 0:
        return mean
    return f"{mean} ± {factor * value['sd']:.{digits}f}"


def _published(figure: Comparison | None, factor: float, digits: int) -> list[str]:
    if figure is None:
        return ["", "", ""]
    value = _number({"mean": figure.value, "sd": figure.deviation}, factor, digits)
    gap = "" if figure.gap is None else f"{factor * figure.gap:+,.{digits}f}"
    return [value, gap, figure.verdict]


def _csv_of(field: str, figure: Comparison | None) -> dict[str, Any]:
    names = ("published", "published_sd", "gap", "verdict", "source")
    values = (None,) * 5 if figure is None else (
        figure.value, figure.deviation, figure.gap, figure.verdict, figure.source
    )  # fmt: skip
    return {f"{field}_{name}": value for name, value in zip(names, values, strict=True)}


_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$",
}  # fmt: skip


def _escaped(text: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in text)
