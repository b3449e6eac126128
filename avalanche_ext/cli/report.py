"""``avalanche-ext report DIR``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    """Declare the subcommand."""
    parser = commands.add_parser("report", help="table and pictures of a finished run")
    parser.add_argument("folder", metavar="DIR", type=Path, help="folder of a run")
    parser.set_defaults(execute=execute)


def execute(options: argparse.Namespace) -> int:
    """Print the table; write the report's files beside the records."""
    from avalanche_ext.experiments.report import report

    table, files = report(options.folder)
    print(f"{table}\n")
    for file in files:
        print(file)
    return 0
