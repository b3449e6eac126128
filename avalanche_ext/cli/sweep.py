"""``avalanche-ext sweep RECIPE``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from avalanche_ext.cli.options import check_device, pair

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    """Declare the subcommand."""
    parser = commands.add_parser(
        "sweep", help="try settings of a recipe on held-out training images"
    )
    parser.add_argument("recipe", metavar="RECIPE", nargs="?", help="of 'avalanche-ext list'")
    parser.add_argument(
        "--grid", nargs="+", default=[], action="extend", metavar="FIELD=VALUE,VALUE",
        help="every combination of these values, such as lam=1e-4,1e-3 lr=0.05,0.1",
    )  # fmt: skip
    parser.add_argument(
        "--search", nargs="+", default=[], action="extend", metavar="FIELD=DISTRIBUTION",
        help="let Optuna choose: uniform:LOW:HIGH, loguniform:LOW:HIGH, int:LOW:HIGH, "
        "logint:LOW:HIGH, choice:VALUE,VALUE",
    )  # fmt: skip
    parser.add_argument("--trials", type=int, help="how many trials of a search")
    parser.add_argument("--workers", type=int, default=1, help="processes (with --slurm: jobs)")
    parser.add_argument("--first", default="2", help="experiences to train on, or 'all'")
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of the recipe's")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="FIELD=VALUE", dest="settings", action="extend",
        help="change fields of the recipe in every trial",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="folder of the sweep; runs/RECIPE__sweep else")
    parser.add_argument("--storage", metavar="URL", help="database instead of a file in the folder")
    parser.add_argument("--device", default="cpu", help="where to train, such as cuda")
    parser.add_argument("--seed", type=int, default=0, help="seed of the search")
    parser.add_argument("--smoke", action="store_true", help="few images, one epoch, one seed")
    parser.add_argument(
        "--slurm", nargs="*", metavar="KEY=VALUE",
        help="submit the workers as jobs; parameters of submitit such as timeout_min=60 "
        "slurm_partition=gpu",
    )  # fmt: skip
    parser.add_argument("--join", type=Path, metavar="DIR", help="work on a sweep that is there")
    parser.set_defaults(execute=execute)


def execute(options: argparse.Namespace) -> int:
    """Make or join the sweep, work on it, then print the table and the command of the best."""
    if (options.join is None) == (options.recipe is None):
        raise ValueError(
            f"sweep expects a RECIPE, or --join DIR to work on a sweep that is there; got "
            f"{'both' if options.recipe else 'neither'}."
        )
    if options.workers < 1:
        raise ValueError(f"--workers expects 1 or more; got {options.workers}.")
    jobs = None if options.slurm is None else dict(_job_option(text) for text in options.slurm)

    if jobs is None:
        check_device(options.device)

    from avalanche_ext.experiments.sweep import load, prepare, work
    from avalanche_ext.experiments.sweep_record import objective, record
    from avalanche_ext.experiments.sweep_workers import launch, submit

    folder = options.join
    if folder is None:
        folder = options.out or Path("runs") / f"{options.recipe.replace('/', '__')}__sweep"
        prepare(_sweep(options), folder)
    sweep = load(folder)
    print(f"{sweep.recipe}: {objective(sweep)}\nfolder {folder}", flush=True)
    data = record(folder)
    if data["finished"]:
        print("this sweep is finished")
    elif jobs is not None:
        numbers = submit(folder, options.workers, jobs)
        print(f"submitted {', '.join(numbers)}; 'avalanche-ext sweep --join {folder}' helps them")
        print("and prints the table when all trials are done")
        return 0
    elif options.workers > 1:
        launch(folder, options.workers, lambda text: print(text, flush=True))
        data = record(folder)
    else:
        work(folder, lambda text: print(text, flush=True))
        data = record(folder)
    return _show(data, folder)


def _show(data: dict[str, Any], folder: Path) -> int:
    from avalanche_ext.experiments.sweep_record import table

    print(f"\n{table(data)}\n")
    if data["best"] is not None:
        print(f"best      trial {data['best']['number']}; on the test set, once:")
        print(f"          {data['command']}")
    print(f"records   {folder}/sweep.json, {folder}/trials/*")
    if not data["finished"]:
        print("trials are left to do: the same command goes on with them")
    return 0 if data["finished"] and data["best"] is not None else 1


def _sweep(options: argparse.Namespace) -> Any:
    from avalanche_ext.experiments.search_space import parse_axis, split_values
    from avalanche_ext.experiments.sweep import Sweep

    grid = [parse_axis("--grid", text) for text in options.grid]
    search = [parse_axis("--search", text) for text in options.search]
    fields = [name for name, _ in grid + search]
    twice = sorted({name for name in fields if fields.count(name) > 1})
    if twice:
        raise ValueError(f"{twice} are given twice; give each field once, with all its values.")
    if options.first != "all" and not options.first.isdigit():
        raise ValueError(f"--first expects a number of experiences or 'all'; got {options.first}.")
    return Sweep(
        recipe=options.recipe,
        settings=dict(pair(text) for text in options.settings),
        grid={name: tuple(dict.fromkeys(split_values(values))) for name, values in grid},
        search=dict(search),
        trials=options.trials,
        seeds=None if options.seeds is None else tuple(dict.fromkeys(options.seeds)),
        first=None if options.first == "all" else int(options.first),
        smoke=options.smoke,
        device=options.device,
        storage=options.storage,
        seed=options.seed,
    )


def _job_option(text: str) -> tuple[str, Any]:
    """A parameter of submitit's: a number where it is one."""
    key, value = pair(text, "--slurm", "timeout_min=60")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value
