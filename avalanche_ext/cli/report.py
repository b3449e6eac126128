"""``avalanche-ext report DIR``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

__all__ = ["add_parser"]

_FORMATS = ("terminal", "markdown", "latex", "csv", "html")


def add_parser(commands: Any) -> None:
    """Declare the subcommand."""
    parser = commands.add_parser("report", help="table, pictures and page of a finished run")
    parser.add_argument(
        "folders", metavar="DIR", type=Path, nargs="+",
        help="folder of a run; several, of one protocol, give one table",
    )  # fmt: skip
    parser.add_argument(
        "--format", choices=_FORMATS, default="terminal",
        help="terminal prints the table and writes report.md, report.html and the pictures; "
        "markdown, latex and csv print the table and write nothing; html writes report.html",
    )  # fmt: skip
    parser.set_defaults(execute=execute)


def execute(options: argparse.Namespace) -> int:
    """Print the table; write the report's files beside the records."""
    from avalanche_ext.experiments.report import report, table, write_page

    folders = options.folders
    if options.format == "html":
        for folder in folders:
            print(write_page(folder))
    elif options.format == "terminal" and len(folders) == 1:
        text, files = report(folders[0])
        print(f"{text}\n")
        for file in files:
            print(file)
    else:
        print(table(folders, options.format))
    return 0
