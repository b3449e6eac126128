"""``avalanche-ext card KEY``."""

from __future__ import annotations

import argparse
from typing import Any

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    """Declare the subcommand."""
    parser = commands.add_parser("card", help="a method, and where it departs from its paper")
    parser.add_argument("key", metavar="KEY", help="a key of 'avalanche-ext list'")
    parser.set_defaults(execute=execute)


def execute(options: argparse.Namespace) -> int:
    """Print the card."""
    from avalanche_ext.catalog import find_card

    print(find_card(options.key).text())
    return 0
