"""The sign of DRL's within-class term, measured: when does Eq. 3 as printed diverge, who gains?

    python examples/drl_sign.py

1. Steps until the loss is no longer finite, on the first two digits of MNIST (no replay, batch 10,
   one epoch): the printed form (``eq3``) against the plus sign (``drl``).
2. Final accuracy of BER on the small Split MNIST protocol with neither, with the printed sign at
   weights small enough to stay finite, and with the plus sign.

Writes ``OUT/sign.json``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import tempfile
from pathlib import Path

import torch
from avalanche.training.plugins import SupervisedPlugin
from avalanche.training.supervised import Naive

from avalanche_ext import MLP, DRLPlugin
from avalanche_ext.evaluation.tables import aggregate
from avalanche_ext.experiments.provenance import versions
from avalanche_ext.experiments.run import run_seed
from avalanche_ext.recipes import find_recipe


class Steps(SupervisedPlugin):
    """Count the finished steps."""

    def __init__(self) -> None:
        super().__init__()
        self.done = 0

    def after_update(self, strategy, **kwargs) -> None:
        """One more."""
        self.done += 1


def steps_until_divergence(experience, features: int, form: str, lr: float, lam: float):
    """Finished steps before the first value that is not finite; ``None`` if all are finite."""
    torch.manual_seed(0)
    model = MLP(features, (100, 100), 10)
    steps = Steps()
    strategy = Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr),
        criterion=torch.nn.CrossEntropyLoss(),
        train_mb_size=10,
        plugins=[DRLPlugin(lam, form=form), steps],
        evaluator=None,
    )
    try:
        strategy.train(experience, eval_streams=[])
    except ValueError as error:
        if "no longer finite" not in str(error):
            raise
        return steps.done
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/drl_sign"))
    parser.add_argument("--smoke", action="store_true", help="scikit-learn's digits, few images")
    options = parser.parse_args()

    name = "drl_ber/split_digits" if options.smoke else "drl_ber/split_mnist_small"
    small = find_recipe(name).smoke() if options.smoke else find_recipe(name)
    full = small if options.smoke else find_recipe("drl_ber/split_mnist")
    first = full.benchmark.build(0).train_stream[0]
    divergence = []
    for form in ("eq3", "drl"):
        for lr in (0.01, 0.05, 0.1):
            for lam in (1e-4, 1e-3):
                steps = steps_until_divergence(
                    first, math.prod(full.benchmark.in_shape), form, lr, lam
                )
                divergence.append({"form": form, "lr": lr, "lam": lam, "steps": steps})
                print(f"{form} lr {lr:g} lam {lam:g}: {steps or 'finite throughout'}", flush=True)
    accuracy = []
    for form, lam in (("drl", 0.0), ("eq3", 1e-5), ("eq3", 2e-5), ("drl", 1e-3)):
        recipe = dataclasses.replace(small, form=form, lam=lam)
        values = []
        for seed in options.seeds[:1] if options.smoke else options.seeds:
            with tempfile.TemporaryDirectory() as folder:
                try:
                    values.append(run_seed(recipe, seed, Path(folder) / "run")["average_accuracy"])
                except ValueError as error:
                    print(f"seed {seed}: {error}")
        row = {"form": form, "lam": lam, "finished": len(values), "seeds": len(options.seeds)}
        if values:
            row["average_accuracy"] = aggregate(values)
        accuracy.append(row)
        print(row, flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    record = {
        "first_experience_steps": -(-len(first.dataset) // 10),
        "divergence": divergence,
        "accuracy": accuracy,
        "recipe": small.name,
        "versions": versions(),
    }
    path = options.out / "sign.json"
    path.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    print(path)


if __name__ == "__main__":
    main()
