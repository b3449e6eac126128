"""Read a run folder: its table rows with what they are held to, and its seeds' results."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from avalanche_ext.evaluation.accuracy_matrix import matrix_metrics
from avalanche_ext.evaluation.tables import measured_fields
from avalanche_ext.recipes import RECIPES, Recipe
from avalanche_ext.recipes.settings import completed, to_json

__all__ = ["Run", "changed_settings", "protocol_of", "read_run", "with_all_metrics"]

# What names a recipe or says what it is held to; two recipes that differ in nothing else are one
# protocol.
_IDENTITY = {"name", "method", "title", "seeds", "baselines", "source", "published"}
# Fields of methods' recipes that are nevertheless the protocol's.
_SHARED = {"mem", "mem_scope"}
_VERSIONS = ("avalanche_ext", "torch", "avalanche-lib")


@dataclass(frozen=True)
class Run:
    """A finished run.

    Args:
        folder: Where it is.
        recipe: Name of its main recipe.
        device: Where it was trained.
        versions: Of what its numbers depend on.
        rows: Its table, the main recipe last; with ``published``, ``changed`` and ``protocol``
            where the recipes are on record.
        settings: The resolved recipes on record, by name.
        results: The ``result.json`` of each seed on record, by recipe.
        samples: Pictures of what the generator of the first seed makes, by recipe: name and PNG.
    """

    folder: Path
    recipe: str
    device: str
    versions: dict[str, str]
    rows: list[dict[str, Any]]
    settings: dict[str, dict[str, Any]]
    results: dict[str, list[dict[str, Any]]]
    samples: dict[str, list[tuple[str, bytes]]]


def read_run(folder: Path) -> Run:
    """Read ``summary.json``, and of ``recipe.json`` and ``seed_*/result.json`` what there is.

    Raises:
        FileNotFoundError: If the folder holds no finished run; the message says what it holds.
        ValueError: If a file cannot be read as what it should be.
    """
    path = folder / "summary.json"
    if not path.exists():
        raise FileNotFoundError(_what_is_missing(folder))
    summary = _json(path)
    if not isinstance(summary, dict) or not isinstance(summary.get("rows"), list):
        raise ValueError(f"{path} has no 'rows'; it is not the summary of a run.")
    name, versions = summary.get("recipe", ""), summary.get("versions", {})
    rows, settings, results, samples = [], {}, {}, {}
    for row in summary["rows"]:
        recipe = row["recipe"]
        home = folder if recipe == name else folder / "baselines" / recipe.replace("/", "__")
        recorded = row.get("settings") or _settings(home, recipe)
        recorded = completed(recorded) if recorded else None
        results[recipe] = _results(home, recipe, recorded)
        samples[recipe] = _samples(home, results[recipe])
        extra: dict[str, Any] = {}
        if recorded:
            settings[recipe] = recorded
            extra["protocol"] = protocol_of(recorded, versions)
            if recorded.get("published"):
                extra["published"] = recorded["published"]
                extra["changed"] = changed_settings(recorded)
        rows.append({**row, **extra})
    return Run(folder, name, summary.get("device", ""), versions, rows, settings, results, samples)


def with_all_metrics(run: Run) -> list[dict[str, Any]]:
    """The run's rows with every metric that the matrices and the results on record give."""
    rows = []
    for row in run.rows:
        metrics = [matrix_metrics(m) for m in row["accuracy_matrices"]]
        rows.append(
            {**measured_fields(run.results[row["recipe"]]), **measured_fields(metrics), **row}
        )
    return rows


def changed_settings(settings: Mapping[str, Any]) -> list[str]:
    """Settings in which a recorded recipe differs from the registered one of its name.

    Empty where there is none of that name. Seeds are no setting of a protocol.
    """
    if settings["name"] not in RECIPES:
        return []
    registered = _flat(to_json(RECIPES[settings["name"]]))
    recorded = _flat(settings)
    return [
        field
        for field, value in recorded.items()
        if field in registered and field not in _IDENTITY and registered[field] != value
    ]


def protocol_of(settings: Mapping[str, Any], versions: Mapping[str, str]) -> dict[str, Any]:
    """What must be equal for two rows to stand in one table, as a flat mapping.

    The benchmark, the network, the optimisation (every field of the base recipe that does not
    name it), the size of the memory, and the versions of this package, torch and Avalanche. The
    fields that a method's own recipe adds are free.
    """
    fields = {f.name for f in dataclasses.fields(Recipe)} - _IDENTITY | _SHARED
    kept = {k: v for k, v in _flat(settings).items() if k.split(".")[0] in fields}
    return kept | {f"versions.{k}": versions[k] for k in _VERSIONS if k in versions}


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for field, value in settings.items():
        if isinstance(value, Mapping):
            flat |= {f"{field}.{k}": v for k, v in _flat(value).items()}
        else:
            flat[field] = value
    return flat


def _settings(home: Path, recipe: str) -> dict[str, Any] | None:
    path = home / "recipe.json"
    found = _json(path) if path.exists() else None
    return found if found and found.get("name") == recipe else None


def _results(home: Path, recipe: str, settings: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    found = [_json(path) for path in home.glob("seed_*/result.json")]
    seeds = None if settings is None else settings.get("seeds")
    orders = [] if settings is None else settings.get("order_seeds")
    mine = [
        r for r in found
        if r["recipe"] == recipe
        and (seeds is None or r["seed"] in seeds)
        and (not orders or r.get("order_seed") in orders)
    ]  # fmt: skip
    return sorted(mine, key=lambda result: (result["seed"], result.get("order_seed") or 0))


def _samples(home: Path, results: list[dict[str, Any]]) -> list[tuple[str, bytes]]:
    """Strips of the first seed: the real samples, then those after each experience."""
    if not results or "generation_per_experience" not in results[0]:
        return []
    seed, order = results[0]["seed"], results[0].get("order_seed")
    folder = home / (f"seed_{seed}" + ("" if order is None else f"_order_{order}")) / "samples"
    names = ["real", *(f"exp_{k}" for k in range(len(results[0]["generation_per_experience"])))]
    paths = [folder / f"{name}.png" for name in names]
    return [(path.stem, path.read_bytes()) for path in paths if path.exists()]


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); was it cut short?") from error


def _what_is_missing(folder: Path) -> str:
    makes = f"'avalanche-ext run RECIPE --out {folder}' makes or finishes one."
    if not folder.exists():
        return f"{folder} does not exist, so it holds no finished run. {makes}"
    if not folder.is_dir():
        return f"{folder} is a file and holds no finished run; name the run's folder."
    if (folder / "result.json").exists():
        return f"{folder} is one seed and holds no finished run; name the folder that it lies in."
    if (folder / "recipe.json").exists():
        seeds = len(list(folder.glob("seed_*/result.json")))
        return (
            f"{folder} holds no finished run: a recipe, {seeds} finished seeds and no summary.json "
            f"(or it is a baseline of the run above it). The command that began it finishes it."
        )
    return f"{folder} holds no finished run (no summary.json). {makes}"
