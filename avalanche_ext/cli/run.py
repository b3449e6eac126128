"""``avalanche-ext run RECIPE``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from avalanche_ext.cli.options import add_recipe, check_device, recipe_of

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    """Declare the subcommand."""
    parser = commands.add_parser("run", help="run a recipe over its seeds, with its baselines")
    add_recipe(parser)
    parser.add_argument("--out", type=Path, help="folder of the run; runs/RECIPE by default")
    parser.add_argument(
        "--checkpoint-every", type=int, metavar="STEPS",
        help="save behind every so many training steps too, not only behind every experience",
    )  # fmt: skip
    parser.add_argument(
        "--trust-checkpoint", action="store_true",
        help="load a checkpoint with pickled state, which can run code: only one of your own",
    )  # fmt: skip
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved recipe and its runs, then stop"
    )
    parser.add_argument("--no-baselines", action="store_true", help="the recipe alone")
    parser.add_argument("--overwrite", action="store_true", help="delete an earlier run first")
    parser.set_defaults(execute=execute)


def execute(options: argparse.Namespace) -> int:
    """Run, then print the table and where everything is."""
    recipe, baselines = recipe_of(options)
    baselines = [] if options.no_baselines else baselines
    out = options.out or Path("runs") / (
        recipe.name.replace("/", "__") + ("__smoke" if options.smoke else "")
    )
    check_device(options.device)
    orders = f", order seeds {list(recipe.order_seeds)}" if recipe.order_seeds else ""
    print(
        f"{recipe.name}: {len(baselines) + 1} systems, seeds {list(recipe.seeds)}{orders}, "
        f"folder {out}",
        flush=True,
    )
    if options.dry_run:
        _describe(recipe, baselines, out)
        return 0

    from avalanche_ext.experiments.report import report
    from avalanche_ext.experiments.run import FinishedError, run_recipe

    try:
        run_recipe(
            recipe, out, baselines=baselines, overwrite=options.overwrite, device=options.device,
            checkpoint_every=options.checkpoint_every, trust_checkpoint=options.trust_checkpoint,
            say=lambda text: print(text, flush=True),
        )  # fmt: skip
    except FinishedError as finished:
        print(finished)
        return 0
    table, files = report(out)
    print(f"\n{table}\n")
    print(f"records      {out}/summary.json, {out}/seed_*/result.json")
    print(f"table        {files[0]}")
    print(f"page         {files[1]}")
    print(f"pictures     {out}/accuracy_matrix_*.png ({len(files) - 2})")
    print(f"TensorBoard  tensorboard --logdir {out}")
    return 0


def _describe(recipe: Any, baselines: list[Any], out: Path) -> None:
    import yaml

    from avalanche_ext.catalog import find_card
    from avalanche_ext.experiments.run import member_folders, run_folders
    from avalanche_ext.recipes.settings import to_json

    for folder, member in member_folders(out, recipe, baselines):
        find_card(member.method)
        homes = run_folders(folder, recipe).values()
        done = sum((home / "result.json").exists() for home in homes)
        print(f"{member.name}: {len(homes)} runs, {done} of them finished, in {folder}")
    print(f"\n{yaml.safe_dump(to_json(recipe), sort_keys=False).strip()}")
