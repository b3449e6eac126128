"""What a sweep found: ``sweep.json``, a table, and the command that runs the best settings."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Any

from avalanche_ext.evaluation.tables import aggregate
from avalanche_ext.experiments.provenance import versions
from avalanche_ext.experiments.search_space import value_text
from avalanche_ext.experiments.sweep import (
    Sweep,
    is_finished,
    is_lost,
    load,
    open_study,
    write_json,
)

__all__ = ["objective", "record", "table"]


def objective(sweep: Sweep) -> str:
    """The protocol in words."""
    recipe = sweep.trial_recipe({})
    n = recipe.benchmark.n_experiences
    part = f"the first {sweep.first} of {n}" if sweep.first is not None else f"all {n}"
    seeds = ", ".join(map(str, recipe.seeds))
    return (
        f"average accuracy on held-out training images after {part} experiences, mean of seeds "
        f"{seeds}; the test set is not touched"
    )


def record(folder: Path) -> dict[str, Any]:
    """Write ``sweep.json`` of a sweep, finished or not, and give what is in it."""
    sweep, study = load(folder), open_study(folder)
    trials = study.get_trials(deepcopy=False)
    rows = [_row(t) for t in trials]
    complete = [row for row in rows if row["state"] == "complete"]
    best = max(complete, key=lambda row: row["accuracy"]["mean"], default=None)
    data = {
        "recipe": sweep.recipe,
        "objective": objective(sweep),
        "sweep": dataclasses.asdict(sweep),
        "finished": is_finished(sweep, trials),
        "trials": rows,
        "best": best,
        "command": None if best is None else _command(sweep, best["params"], folder),
        "versions": versions(),
    }
    write_json(folder / "sweep.json", data)
    return data


def table(data: dict[str, Any]) -> str:
    """The trials for a terminal, best first; a lost trial is shown where it was taken up."""
    repeated = {row["retried_from"] for row in data["trials"]}
    shown = [row for row in data["trials"] if row["number"] not in repeated]
    shown.sort(key=lambda row: -row["accuracy"]["mean"] if row["accuracy"] else 1.0)
    names = list(data["sweep"]["grid"] or data["sweep"]["search"])
    # Of no interest where every trial trains the same network.
    sized = len({row["parameters_mean"] for row in shown} - {None}) > 1
    size = ["parameters"] if sized else []
    cells = [["trial", *names, "accuracy %", *size, "train s", "state"]]
    cells += [
        [
            str(row["number"]),
            *(_short(row["params"].get(name, "")) for name in names),
            _percent(row["accuracy"]),
            *([f"{row['parameters_mean'] or 0:,.0f}"] if sized else []),
            f"{row['seconds']:.1f}" if row["seconds"] is not None else "",
            row["state"] if row["error"] is None else f"{row['state']}: {row['error']}",
        ]
        for row in shown
    ]
    widths = [max(len(line[k]) for line in cells) for k in range(len(cells[0]) - 1)]
    lines = [
        "  ".join([*(c.rjust(w) for c, w in zip(line, widths, strict=False)), line[-1]])
        for line in cells
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _row(trial: Any) -> dict[str, Any]:
    own = trial.user_attrs
    params = trial.params or own.get("params", {})
    values = own.get("values")
    return {
        "number": trial.number,
        "state": "lost" if is_lost(trial) else trial.state.name.lower().replace("fail", "failed"),
        "params": {name: value_text(value) for name, value in params.items()},
        "accuracy": aggregate(values) if trial.state.name == "COMPLETE" else None,
        "parameters_mean": own.get("parameters_mean"),
        "seconds": own.get("seconds"),
        "worker": own.get("worker"),
        "retried_from": own.get("retried_from"),
        "error": own.get("error"),
        "folder": f"trials/{own.get('first_try', trial.number):04d}",
    }


def _command(sweep: Sweep, params: dict[str, str], folder: Path) -> str:
    """The run of the whole protocol, test set and all, with these settings."""
    settings = {k: v for k, v in sweep.settings.items() if k != "benchmark.validation"}
    words = ["avalanche-ext", "run", sweep.recipe, "--set"]
    words += [f"{name}={value}" for name, value in {**settings, **params}.items()]
    if sweep.seeds is not None:
        words += ["--seeds", *map(str, sweep.seeds)]
    if sweep.smoke:
        words.append("--smoke")
    if sweep.device != "cpu":
        words += ["--device", sweep.device]
    return shlex.join([*words, "--out", str(folder / "best")])


def _short(text: str) -> str:
    """A value to four digits; what is no number as it is."""
    try:
        return f"{float(text):.4g}"
    except ValueError:
        return text


def _percent(value: dict[str, Any] | None) -> str:
    if value is None:
        return ""
    mean = f"{100 * value['mean']:.2f}"
    return mean if value["sd"] is None else f"{mean} ± {100 * value['sd']:.2f}"
