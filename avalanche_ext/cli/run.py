"""``avalanche-ext run RECIPE``."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    """Declare the subcommand."""
    parser = commands.add_parser("run", help="run a recipe over its seeds, with its baselines")
    parser.add_argument("recipe", metavar="RECIPE", help="a recipe of 'avalanche-ext list'")
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of the recipe's")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="FIELD=VALUE", dest="settings", action="extend",
        help="change fields of the recipe and of its baselines, such as lam=1e-4 or "
        "benchmark.validation=true",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="folder of the run; runs/RECIPE by default")
    parser.add_argument("--device", default="cpu", help="where to train, such as cuda")
    parser.add_argument(
        "--checkpoint-every", type=int, metavar="STEPS",
        help="save behind every so many training steps too, not only behind every experience",
    )  # fmt: skip
    parser.add_argument(
        "--trust-checkpoint", action="store_true",
        help="load a checkpoint with pickled state, which can run code: only one of your own",
    )  # fmt: skip
    parser.add_argument("--smoke", action="store_true", help="few images, one epoch, one seed")
    parser.add_argument("--no-baselines", action="store_true", help="the recipe alone")
    parser.add_argument("--overwrite", action="store_true", help="delete an earlier run first")
    parser.set_defaults(execute=execute)


def execute(options: argparse.Namespace) -> int:
    """Run, then print the table and where everything is."""
    from avalanche_ext.recipes import find_recipe, with_settings

    settings = dict(_pair(text) for text in options.settings)
    recipe = with_settings(find_recipe(options.recipe), settings)
    names = () if options.no_baselines else recipe.baselines
    baselines = [with_settings(find_recipe(name), settings) for name in names]
    if options.smoke:
        recipe, baselines = recipe.smoke(), [b.smoke() for b in baselines]
    if options.seeds:
        recipe = dataclasses.replace(recipe, seeds=tuple(dict.fromkeys(options.seeds)))
    baselines = [dataclasses.replace(b, seeds=recipe.seeds) for b in baselines]
    out = options.out or Path("runs") / (
        recipe.name.replace("/", "__") + ("__smoke" if options.smoke else "")
    )
    _check_device(options.device)
    print(
        f"{recipe.name}: {len(baselines) + 1} systems, seeds {list(recipe.seeds)}, folder {out}",
        flush=True,
    )

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


def _pair(text: str) -> tuple[str, str]:
    field, separator, value = text.partition("=")
    if not separator or not field:
        raise ValueError(f"--set expects FIELD=VALUE, such as lam=1e-4; got {text!r}.")
    return field, value


def _check_device(name: str) -> None:
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name!r} cannot be used here: {error}") from error
