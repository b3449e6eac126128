"""Recipes from text and back: ``field=value``, YAML files, JSON.

All ways lead through ``with_settings``, so a file, a command line and a call in Python that say
the same give the same recipe.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from avalanche_ext.recipes.base import Recipe
from avalanche_ext.recipes.names import lookup
from avalanche_ext.recipes.streams import BENCHMARKS

__all__ = ["completed", "from_settings", "is_file", "read_settings", "to_json", "with_settings"]

# What a file says about itself, not about its baselines.
_OWN = ("like", "name", "method", "title", "baselines", "source", "published")


def with_settings(recipe: Recipe, settings: Mapping[str, Any]) -> Recipe:
    """A recipe with some fields changed.

    Args:
        recipe: The recipe.
        settings: Values, or text that is read as the field's type, by field. A field of the
            benchmark is reached by a dot or by a mapping: ``{"lam": "1e-3",
            "benchmark.validation": True}`` or ``{"benchmark": {"validation": True}}``.

    Raises:
        ValueError: For an unknown field (near matches are listed) or a value of another type.
    """
    for path, value in _flat(settings).items():
        recipe = _set(recipe, path.split("."), value, path)
    return recipe


def is_file(name: str) -> bool:
    """Whether the name is that of a recipe's file: ``.yaml``, ``.yml`` or ``.json``."""
    return Path(name).suffix in (".yaml", ".yml", ".json")


def read_settings(path: Path) -> dict[str, Any]:
    """The fields that a recipe's file sets, and under ``like`` the recipe it starts from.

    A run's ``recipe.json`` is such a file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds no mapping.
    """
    import yaml

    if not path.is_file():
        raise FileNotFoundError(f"there is no recipe file {path}.")
    try:
        data = yaml.safe_load(path.read_text("utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is neither YAML nor JSON: {error}") from error
    if not isinstance(data, dict) or not all(isinstance(k, str) for k in data):
        raise ValueError(
            f"{path} expects fields of a recipe, such as 'like: er/split_digits' and 'lr: 0.05'; "
            f"got {type(data).__name__}."
        )
    if not isinstance(data.get("like", data.get("name")), str):
        raise ValueError(
            f"{path} expects 'like: RECIPE', the recipe that it starts from; 'avalanche-ext list' "
            f"shows them all."
        )
    return data


def from_settings(
    data: Mapping[str, Any], table: Mapping[str, Recipe]
) -> tuple[Recipe, dict[str, Any]]:
    """The recipe that a file describes, and what its baselines are to share of it.

    Args:
        data: What ``read_settings`` gives.
        table: The registered recipes.

    Raises:
        ValueError: For unknown names and fields, and values of another type.
    """
    start = lookup("recipe", data.get("like", data.get("name")), table)
    changes = {k: v for k, v in data.items() if k != "like"}
    shared = {k: v for k, v in changes.items() if k not in _OWN}
    return with_settings(start, changes), shared


def to_json(recipe: Any) -> dict[str, Any]:
    """A recipe as plain data, with the benchmark's kind."""
    data = dataclasses.asdict(recipe)
    data["benchmark"] = {"kind": type(recipe.benchmark).__name__, **data["benchmark"]}
    return json.loads(json.dumps(data))


def completed(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """A recorded recipe with the defaults of the fields that came after it was recorded."""
    from avalanche_ext.recipes import RECIPES

    recipe = RECIPES.get(recorded.get("name", ""))
    kind = BENCHMARKS.get(recorded["benchmark"].get("kind"))
    benchmark = {**(_defaults(kind) if kind else {}), **recorded["benchmark"]}
    known = _defaults(Recipe if recipe is None else type(recipe))
    return {**known, **recorded, "benchmark": benchmark}


def _defaults(kind: type) -> dict[str, Any]:
    given = {f.name: f.default for f in dataclasses.fields(kind)}
    return json.loads(json.dumps({k: v for k, v in given.items() if v is not dataclasses.MISSING}))


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for field, value in settings.items():
        if isinstance(value, Mapping):
            inner = _flat(value)
            # First the kind, then the fields that only this kind has.
            for name in sorted(inner, key=lambda n: n != "kind"):
                flat[f"{field}.{name}"] = inner[name]
        else:
            flat[field] = value
    return flat


def _set(target: Any, path: list[str], value: Any, full: str) -> Any:
    fields = typing.get_type_hints(type(target))
    names = [f.name for f in dataclasses.fields(target)]
    head, *rest = path
    if head == "kind" and type(target).__name__ in BENCHMARKS:
        kind = lookup("benchmark", value, BENCHMARKS)
        return target if type(target) is kind else kind()
    if head not in names:
        near = difflib.get_close_matches(head, names, n=3, cutoff=0.4)
        raise ValueError(
            f"{type(target).__name__} has no field {full!r}. "
            f"{'Close: ' + ', '.join(near) + '. ' if near else ''}Fields: {', '.join(names)}."
        )
    if not next(f for f in dataclasses.fields(target) if f.name == head).init:
        if value == getattr(target, head):  # as a run's own record says
            return target
        raise ValueError(f"field {full!r} follows from the other fields and cannot be set.")
    if rest:
        inner = getattr(target, head)
        if not dataclasses.is_dataclass(inner):
            raise ValueError(f"field {head!r} has no fields of its own; got {full!r}.")
        value = _set(inner, rest, value, full)
    else:
        value = _parse(value, fields[head], full)
    return dataclasses.replace(target, **{head: value})


def _parse(value: Any, kind: Any, field: str) -> Any:
    """Read the value, or the text of one, as the field's type."""
    from jsonargparse import ArgumentError, ArgumentParser

    if dataclasses.is_dataclass(kind):
        raise ValueError(f"field {field!r} is a group; set one of its fields, {field}.FIELD.")
    optional = type(None) in typing.get_args(kind)
    if optional and value in (None, "None", "null"):
        return None
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=kind)
    try:
        # None would pass as "not given" where the type does not allow it.
        parsed = None if value is None else parser.parse_object({"value": value})
        if parsed is not None:
            return parser.instantiate_classes(parsed)["value"]
    except ArgumentError:
        pass
    expected = kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else kind
    raise ValueError(f"field {field!r} expects {expected}; got {value!r}.")
