"""``avalanche-ext doctor RECIPE``."""

from __future__ import annotations

import argparse
from typing import Any

from avalanche_ext.cli.options import add_recipe, recipe_of

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    """Declare the subcommand."""
    parser = commands.add_parser("doctor", help="examine a recipe before a long run")
    add_recipe(parser)
    parser.set_defaults(execute=execute)


def execute(options: argparse.Namespace) -> int:
    """Print the findings and the forecast; 1 if there is an error."""
    recipe, _ = recipe_of(options)

    from avalanche_ext.experiments.doctor import examine_recipe, forecast_text, memory_text

    examination = examine_recipe(recipe, device=options.device)
    for finding in examination.findings:
        print(f"{finding.level:<8}{finding.check:<11}{finding.text}")
    needs = examination.forecast
    if needs is not None:
        print(f"\n{forecast_text(needs)}\n\n{memory_text(needs)}\n")
        seeds = len(recipe.runs)
        print(
            f"one seed  {needs.total:,.1f} s: training {needs.training:,.1f} s, "
            f"{len(needs.experiences)} evaluations of {needs.evaluation:,.2f} s"
        )
        print(f"{seeds} seeds   {seeds * needs.total:,.1f} s, without baselines")
    count = {
        level: sum(f.level == level for f in examination.findings) for level in ("error", "warning")
    }
    print(f"\n{count['error']} errors, {count['warning']} warnings")
    return 0 if examination.healthy else 1
