"""What every recipe states: benchmark, network, optimisation, seeds, and what it is held to.

A recipe is a frozen dataclass: one protocol, complete. Changing a field makes another recipe.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

__all__ = [
    "BenchmarkSettings",
    "PermutedMNIST",
    "Published",
    "Recipe",
    "SplitDigits",
    "SplitMNIST",
    "lookup",
    "to_json",
    "with_settings",
]


Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class BenchmarkSettings:
    """Settings of a benchmark; ``build`` makes it.

    ``validation=True`` tests on held-out training images: for choosing settings.
    """

    n_experiences: int = 5
    train_per_experience: int | None = None
    validation: bool = False

    @property
    def input_features(self) -> int:
        """Numbers per image."""
        return 784

    @property
    def n_outputs(self) -> int:
        """Units of the head."""
        return 10

    def build(self, seed: int) -> Any:
        """The Avalanche benchmark; ``seed`` decides which images a thinned stream keeps."""
        raise NotImplementedError

    def smoke(self) -> BenchmarkSettings:
        """The same benchmark with a few images, for a check in seconds."""
        return dataclasses.replace(self, train_per_experience=40)


@dataclass(frozen=True, kw_only=True)
class SplitDigits(BenchmarkSettings):
    """``benchmarks.split_digits``: scikit-learn's digits, nothing to download."""

    scenario: str = "class"

    @property
    def input_features(self) -> int:
        """Numbers per image."""
        return 64

    @property
    def n_outputs(self) -> int:
        """Units of the head."""
        return 10 if self.scenario == "class" else 10 // self.n_experiences

    def build(self, seed: int) -> Any:
        """See ``BenchmarkSettings``."""
        from avalanche_ext.benchmarks import split_digits

        return split_digits(
            self.n_experiences,
            scenario=self.scenario,
            train_per_experience=self.train_per_experience,
            validation=self.validation,
            seed=seed,
        )


@dataclass(frozen=True, kw_only=True)
class SplitMNIST(SplitDigits):
    """``benchmarks.split_mnist``."""

    download: bool = False

    @property
    def input_features(self) -> int:
        """Numbers per image."""
        return 784

    def build(self, seed: int) -> Any:
        """See ``BenchmarkSettings``."""
        from avalanche_ext.benchmarks import split_mnist

        return split_mnist(
            self.n_experiences,
            scenario=self.scenario,
            train_per_experience=self.train_per_experience,
            validation=self.validation,
            seed=seed,
            download=self.download,
        )


@dataclass(frozen=True, kw_only=True)
class PermutedMNIST(BenchmarkSettings):
    """``benchmarks.permuted_mnist``; the permutations are the same for every seed of a run."""

    n_experiences: int = 10
    download: bool = False

    def build(self, seed: int) -> Any:
        """See ``BenchmarkSettings``."""
        from avalanche_ext.benchmarks import permuted_mnist

        return permuted_mnist(
            self.n_experiences,
            train_per_experience=self.train_per_experience,
            validation=self.validation,
            download=self.download,
            seed=seed,
        )


@dataclass(frozen=True)
class Published:
    """A figure of a paper that the recipe is held to."""

    quantity: str
    value: float
    deviation: float | None
    source: str


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One protocol.

    Args:
        name: ``catalog key/benchmark``, or with a third part for a variant.
        method: Catalog key.
        benchmark: The stream.
        hidden: Widths of the MLP's hidden layers.
        lr: Learning rate of SGD.
        momentum: Its momentum.
        batch_size: Current samples per step.
        epochs: Passes over each experience.
        seeds: Seeds of initialisation, order and draws; one run each.
        baselines: Recipes that run beside this one and share its table.
        source: Where the protocol comes from.
        published: The paper's figures; empty where none could be verified.
    """

    name: str
    method: str
    benchmark: BenchmarkSettings
    hidden: tuple[int, ...] = (100, 100)
    lr: float = 0.1
    momentum: float = 0.0
    batch_size: int = 10
    epochs: int = 1
    seeds: tuple[int, ...] = (0, 1, 2)
    baselines: tuple[str, ...] = ()
    source: str = ""
    published: tuple[Published, ...] = ()

    def smoke(self) -> Recipe:
        """The same recipe with few images, one epoch and one seed."""
        return dataclasses.replace(
            self, benchmark=self.benchmark.smoke(), epochs=1, seeds=self.seeds[:1]
        )


def lookup(kind: str, name: str, table: Mapping[str, Item]) -> Item:
    """The entry of that name.

    Raises:
        ValueError: If there is none; near matches are listed.
    """
    if name in table:
        return table[name]
    near = difflib.get_close_matches(name, table, n=4, cutoff=0.4)
    hint = f"Close: {', '.join(near)}. " if near else ""
    raise ValueError(f"there is no {kind} {name!r}. {hint}'avalanche-ext list' shows them all.")


def with_settings(recipe: Recipe, settings: dict[str, str]) -> Recipe:
    """A recipe with some fields changed, from text: ``{"lam": "1e-3", "benchmark.validation": "true"}``.

    Raises:
        ValueError: For an unknown field (near matches are listed) or a value of another type.
    """  # noqa: E501 - the example is one line
    for path, text in settings.items():
        recipe = _set(recipe, path.split("."), text, path)
    return recipe


def to_json(recipe: Any) -> dict[str, Any]:
    """A recipe as plain data, with the benchmark's kind."""
    data = dataclasses.asdict(recipe)
    data["benchmark"] = {"kind": type(recipe.benchmark).__name__, **data["benchmark"]}
    return json.loads(json.dumps(data))


def _set(target: Any, path: list[str], text: str, full: str) -> Any:
    fields = typing.get_type_hints(type(target))
    names = [f.name for f in dataclasses.fields(target)]
    head, *rest = path
    if head not in names:
        near = difflib.get_close_matches(head, names, n=3, cutoff=0.4)
        raise ValueError(
            f"{type(target).__name__} has no field {full!r}. "
            f"{'Close: ' + ', '.join(near) + '. ' if near else ''}Fields: {', '.join(names)}."
        )
    if rest:
        value = _set(getattr(target, head), rest, text, full)
    else:
        value = _parse(text, fields[head], full)
    return dataclasses.replace(target, **{head: value})


def _parse(text: str, kind: Any, field: str) -> Any:
    """Read ``text`` as the field's type: JSON where it is JSON, a bare word otherwise."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = {"True": True, "False": False, "None": None}.get(text, text)
    if isinstance(value, list):
        value = tuple(value)
    if _fits(value, kind):
        return value
    if type(value) is int and _fits(float(value), kind):
        return float(value)
    expected = getattr(kind, "__name__", None) if not typing.get_args(kind) else str(kind)
    raise ValueError(f"field {field!r} expects {expected}; got {text!r}.")


def _fits(value: Any, kind: Any) -> bool:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in args)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(v, args[0]) for v in value)
    if kind in (int, float):
        return type(value) is kind
    return isinstance(value, kind)
