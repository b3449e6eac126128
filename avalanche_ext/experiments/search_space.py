"""What a sweep varies: fields of a recipe, as lists of values or as ranges to search.

Values stay text, as after ``--set``, until they reach the recipe: what was tried is what the
command line of the final run says.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["distribution", "examples", "grid_points", "parse_axis", "split_values", "value_text"]

# Fields that say what a sweep is, not how the method is set.
_FIXED = ("name", "method", "seeds", "baselines", "source", "published", "benchmark.validation")
_RANGES = {"uniform": float, "loguniform": float, "int": int, "logint": int}
_EXPECTED = (
    "uniform:LOW:HIGH, loguniform:LOW:HIGH, int:LOW:HIGH, logint:LOW:HIGH or choice:VALUE,VALUE"
)


def parse_axis(option: str, text: str) -> tuple[str, str]:
    """``"lam=1e-4,1e-3"`` as field and values.

    Raises:
        ValueError: If it is not of that form, or the field cannot be varied.
    """
    field, separator, values = text.partition("=")
    if not separator or not field or not values:
        shape = "FIELD=VALUE,VALUE" if option == "--grid" else "FIELD=DISTRIBUTION"
        raise ValueError(f"{option} expects {shape}, such as {_SAMPLES[option]}; got {text!r}.")
    if field in _FIXED:
        raise ValueError(
            f"{option} cannot vary {field!r}, which says what the sweep is; it varies settings "
            f"such as lam, lr or mem."
        )
    return field, values


_SAMPLES = {"--grid": "lam=1e-4,1e-3", "--search": "lam=loguniform:1e-5:1e-2"}


def split_values(text: str) -> tuple[str, ...]:
    """The values of a list, separated by commas outside brackets."""
    return tuple(re.findall(r"(?:\[[^\]]*\]|[^,\[])+", text))


def grid_points(grid: Mapping[str, Sequence[str]]) -> list[dict[str, str]]:
    """Every combination, the last field varying fastest."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def examples(field: str, spec: str) -> list[str]:
    """Values at the ends of a range, or all choices, as text: to be tried on the recipe at once.

    Raises:
        ValueError: If ``spec`` is no distribution.
    """
    kind, *parts = spec.split(":")
    if kind == "choice" and len(parts) >= 1 and ":".join(parts):
        return list(split_values(":".join(parts)))
    if kind in _RANGES and len(parts) == 2:
        try:
            low, high = (_RANGES[kind](part) for part in parts)
        except ValueError:
            low, high = 1, 0
        if low < high and (low > 0 or not kind.startswith("log")):
            return [value_text(low), value_text(high)]
    raise ValueError(
        f"--search {field}= expects {_EXPECTED}, with LOW < HIGH (and LOW > 0 for the "
        f"logarithmic ones); got {spec!r}."
    )


def distribution(field: str, spec: str) -> Any:
    """Optuna's distribution for ``spec``."""
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    ends = examples(field, spec)
    kind = spec.split(":")[0]
    if kind == "choice":
        return CategoricalDistribution(ends)
    log = kind.startswith("log")
    if _RANGES[kind] is int:
        return IntDistribution(int(ends[0]), int(ends[1]), log=log)
    return FloatDistribution(float(ends[0]), float(ends[1]), log=log)


def value_text(value: Any) -> str:
    """A value as ``--set`` reads it back exactly."""
    return value if isinstance(value, str) else repr(value)
