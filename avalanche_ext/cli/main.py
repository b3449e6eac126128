"""``avalanche-ext``: list, card, doctor, run, sweep, report."""

from __future__ import annotations

import argparse
import os
import sys

from avalanche_ext.cli import card, doctor, list_methods, report, run, sweep

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    """Run the command.

    Returns:
        0 on success, 1 where the command itself found something wrong (a doctor's error, a sweep
        with trials left), 2 with one clear line on a mistake of the user's.
    """
    parser = argparse.ArgumentParser(
        prog="avalanche-ext", description="Continual-learning methods as Avalanche plugins."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (list_methods, card, doctor, run, sweep, report):
        module.add_parser(commands)
    options = parser.parse_args(arguments)
    try:
        status = options.execute(options)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # whoever reads has seen enough, as in '... | head'
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        print(f"avalanche-ext: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\navalanche-ext: stopped; the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
