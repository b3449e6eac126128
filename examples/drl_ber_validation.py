"""Choose learning rate and ``lam`` of DRL+BER on held-out training images, never on the test set.

    python examples/drl_ber_validation.py drl_ber/split_mnist_small --lr 0.05 0.1 --lam 0 3e-4 1e-3

Trains every combination and tests on what the benchmark holds out with ``validation=True`` (a
fifth of the training images; on CORe50 other sessions), and writes mean and sample standard
deviation to ``OUT/validation.json``. ``lam`` 0 is the replay alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import tempfile
from pathlib import Path

from avalanche_ext.evaluation.tables import aggregate
from avalanche_ext.experiments.provenance import versions
from avalanche_ext.experiments.run import run_seed
from avalanche_ext.recipes import find_recipe, with_settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", nargs="?", default="drl_ber/split_digits")
    parser.add_argument("--lr", type=float, nargs="+", default=[0.02, 0.05, 0.1])
    parser.add_argument("--lam", type=float, nargs="+", default=[0.0, 3e-4, 1e-3, 3e-3])
    parser.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE", dest="settings")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/drl_ber_validation"))
    parser.add_argument("--smoke", action="store_true", help="one cell, few images")
    options = parser.parse_args()

    settings = dict(text.split("=", 1) for text in options.settings)
    recipe = with_settings(find_recipe(options.recipe), settings)
    if options.smoke:
        recipe = recipe.smoke()
        options.lr, options.lam, options.seeds = options.lr[:1], options.lam[-1:], [0]
    held_out = dataclasses.replace(recipe.benchmark, validation=True)
    rows = []
    for lr, lam in itertools.product(options.lr, options.lam):
        cell = dataclasses.replace(recipe, benchmark=held_out, lr=lr, lam=lam)
        accuracies = []
        for seed in options.seeds:
            with tempfile.TemporaryDirectory() as folder:
                result = run_seed(cell, seed, Path(folder) / "run")
            accuracies.append(result.get("test_accuracy", result["average_accuracy"]))
        rows.append({"lr": lr, "lam": lam, "average_accuracy": aggregate(accuracies)})
        cell_result = rows[-1]["average_accuracy"]
        deviation = cell_result["sd"] or 0.0
        print(f"lr {lr:g}  lam {lam:g}  {100 * cell_result['mean']:.2f} ± {100 * deviation:.2f} %")
    options.out.mkdir(parents=True, exist_ok=True)
    record = {
        "recipe": recipe.name,
        "settings": settings,
        "tested_on": "what the benchmark holds out with validation=true",
        "seeds": options.seeds,
        "rows": rows,
        "versions": versions(),
    }
    path = options.out / "validation.json"
    path.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    print(path)


if __name__ == "__main__":
    main()
