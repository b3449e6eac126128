"""Read run folders again: tables and pictures from the records alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from avalanche_ext.evaluation.accuracy_matrix import draw_accuracy_matrix
from avalanche_ext.evaluation.tables import as_markdown, as_text

__all__ = ["report", "table_rows"]


def report(folder: Path) -> tuple[str, list[Path]]:
    """Write ``report.md`` and the mean accuracy matrix of each method.

    Returns:
        The table for a terminal, and the files written.

    Raises:
        FileNotFoundError: If the folder holds no finished run.
    """
    rows = table_rows(folder)
    written = []
    for row in rows:
        matrices = row["accuracy_matrices"]
        path = folder / f"accuracy_matrix_{row['recipe'].replace('/', '__')}.png"
        title = f"{row['title']}: accuracy %, mean of {len(matrices)}"
        draw_accuracy_matrix(np.mean(matrices, axis=0).tolist(), title).savefig(path, dpi=110)
        written.append(path)
    text = folder / "report.md"
    text.write_text(as_markdown(rows) + "\n", "utf-8")
    return as_text(rows), [text, *written]


def table_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's ``summary.json``.

    Raises:
        FileNotFoundError: If there is none.
    """
    path = folder / "summary.json"
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist; {folder} holds no finished run. 'avalanche-ext run RECIPE "
            f"--out {folder}' makes or finishes one."
        )
    return json.loads(path.read_text("utf-8"))["rows"]
