"""``avalanche-ext list``."""

from __future__ import annotations

import argparse
from typing import Any

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    """Declare the subcommand."""
    parser = commands.add_parser("list", help="the methods and their recipes")
    parser.set_defaults(execute=execute)


def execute(options: argparse.Namespace) -> int:
    """Print every key with its summary and its recipes."""
    from avalanche_ext.catalog import CATALOG

    for card in CATALOG.values():
        print(f"{card.key:15s} {card.title}: {card.summary}")
        for recipe in card.recipes:
            print(f"{'':15s}   {recipe.name}")
    return 0
