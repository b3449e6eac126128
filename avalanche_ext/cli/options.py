"""Options that several subcommands share."""

from __future__ import annotations

import argparse
from typing import Any

__all__ = ["add_recipe", "check_device", "pair", "recipe_of"]


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """Declare the options that make a recipe: its name or file, and what is changed in it."""
    parser.add_argument(
        "recipe", metavar="RECIPE", help="a recipe of 'avalanche-ext list', or a YAML or JSON file"
    )
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of the recipe's")
    parser.add_argument(
        "--order-seeds", type=int, nargs="+", metavar="SEED",
        help="seeds of the order of the classes: one, or one for each of --seeds",
    )  # fmt: skip
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="FIELD=VALUE", dest="settings", action="extend",
        help="change fields of the recipe and of its baselines, such as lam=1e-4 or "
        "benchmark.validation=true",
    )  # fmt: skip
    parser.add_argument("--device", default="cpu", help="where to train, such as cuda")
    parser.add_argument("--smoke", action="store_true", help="few images, one epoch, one seed")


def recipe_of(options: argparse.Namespace) -> tuple[Any, list[Any]]:
    """The recipe of ``add_recipe``'s options, and its baselines.

    Raises:
        FileNotFoundError: If the recipe is a file that is not there.
        ValueError: For unknown names and fields, and values of another type.
    """
    from avalanche_ext.recipes import load_recipe

    return load_recipe(
        options.recipe, dict(pair(text) for text in options.settings), seeds=options.seeds,
        order_seeds=options.order_seeds, smoke=options.smoke,
    )  # fmt: skip


def pair(text: str, option: str = "--set", example: str = "lam=1e-4") -> tuple[str, str]:
    """``FIELD=VALUE`` as its two halves.

    Raises:
        ValueError: If it is not of that form.
    """
    field, separator, value = text.partition("=")
    if not separator or not field:
        raise ValueError(f"{option} expects FIELD=VALUE, such as {example}; got {text!r}.")
    return field, value


def check_device(name: str) -> None:
    """Raise unless torch can put something on the device.

    Raises:
        ValueError: If it cannot.
    """
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name!r} cannot be used here: {error}") from error
