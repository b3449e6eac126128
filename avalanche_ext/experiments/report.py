"""Read run folders again: tables, pictures and a page from the records alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from avalanche_ext.evaluation.accuracy_matrix import draw_accuracy_matrix, filled
from avalanche_ext.evaluation.comparison import merge
from avalanche_ext.evaluation.tables import FORMATS, as_markdown, as_text, footnotes
from avalanche_ext.experiments.html_report import page
from avalanche_ext.experiments.run_folder import Run, read_run, with_all_metrics

__all__ = ["report", "table", "table_rows", "write_page"]


def report(folder: Path) -> tuple[str, list[Path]]:
    """Write ``report.md``, ``report.html`` and the mean accuracy matrix of each method.

    Returns:
        The table for a terminal, and the files written: the table, the page, the pictures.

    Raises:
        FileNotFoundError: If the folder holds no finished run.
    """
    run = read_run(folder)
    text = folder / "report.md"
    notes = [f"\n{note}\n" for note in footnotes(run.rows)]
    text.write_text("".join([as_markdown(run.rows) + "\n", *notes]), "utf-8")
    files = [text, write_page(folder)]
    for row in run.rows:
        matrices = row["accuracy_matrices"]
        path = folder / f"accuracy_matrix_{row['recipe'].replace('/', '__')}.png"
        title = f"{row['title']}: accuracy %, mean of {len(matrices)}"
        mean = np.mean([filled(m) for m in matrices], axis=0).tolist()
        draw_accuracy_matrix(mean, title).savefig(path, dpi=110)
        files.append(path)
    return "\n".join([as_text(run.rows), *(f"\n{note}" for note in footnotes(run.rows))]), files


def table(folders: Sequence[Path], form: str) -> str:
    """The rows of one run, or of several in one protocol, as text.

    The values separated by commas are all that is on record; the other forms show the main ones,
    with their notes (in LaTeX as comments).

    Args:
        folders: Of runs.
        form: ``terminal``, ``markdown``, ``latex`` or ``csv``.

    Raises:
        FileNotFoundError: If a folder holds no finished run.
        ValueError: If the runs' protocols differ.
    """
    runs = [read_run(folder) for folder in folders]
    tables = {str(r.folder): _rows(r, form) for r in runs}
    rows = merge(tables) if len(tables) > 1 else tables[str(runs[0].folder)]
    if len({r.device for r in runs}) > 1:  # times of different devices do not compare
        rows = [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
    notes = footnotes(rows) if form in ("terminal", "markdown") else []
    return "\n".join([FORMATS[form](rows), *(f"\n{note}" for note in notes)])


def write_page(folder: Path) -> Path:
    """Write ``report.html``, one file that needs no other.

    Raises:
        FileNotFoundError: If the folder holds no finished run.
    """
    path = folder / "report.html"
    path.write_text(page(read_run(folder)), "utf-8")
    return path


def table_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's ``summary.json``, with the recipes' published figures.

    Raises:
        FileNotFoundError: If there is none.
    """
    return read_run(folder).rows


def _rows(run: Run, form: str) -> list[dict[str, Any]]:
    return with_all_metrics(run) if form == "csv" else run.rows
