"""How well bridges lead back to earlier embeddings: trained in a row, and trained apart.

    python examples/alignment_figure.py --out runs/alignment_figure
    python examples/alignment_figure.py --smoke        # seconds, digits instead of MNIST

Five tasks of two digits, a network 784-256-64 and a head per task. Either one embedder learns the
tasks in turn, each from where the last one left it, or five networks learn one task each,
independently. In both cases only the last embedder is kept, and heads are asked behind bridges:

- none: every head on the last embedding as it is;
- chain: affine maps from each embedding to the one before, fitted on the newer task's images, or
  on images of all tasks;
- direct: one map from the last embedding to each earlier one, fitted on the same images.

Writes ``alignment.png`` and ``alignment.json``: accuracy per task, and the share of variance that
features led back over n tasks have lost, on test images of all tasks. Old embedders are kept for
this measurement alone.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from avalanche.training.determinism.rng_manager import RNGManager
from avalanche.training.supervised import Naive
from torch import Tensor, nn

from avalanche_ext import MLP, DeviceDataPlugin
from avalanche_ext.benchmarks import split_digits, split_mnist
from avalanche_ext.evaluation.tables import aggregate
from avalanche_ext.experiments.provenance import commit, versions
from avalanche_ext.functional.linear_map import r_squared
from avalanche_ext.models.bridges import Bridges, align

BRIDGES = (
    "none", "chain, new task's images", "chain, all tasks' images", "direct, all tasks' images",
    "own embedder",
)  # fmt: skip


def trained(benchmark: Any, width: int, epochs: int, seed: int, apart: bool) -> list[MLP]:
    """The network after each task: the same one, or another for each."""
    RNGManager.set_random_seeds(seed)
    networks: list[MLP] = []
    for experience in benchmark.train_stream:
        model = MLP(width, (256, 64), 2)
        if networks and not apart:
            model.features = copy.deepcopy(networks[-1].features)
        strategy = Naive(
            model=model, optimizer=torch.optim.Adam(model.parameters(), 1e-3),
            criterion=nn.CrossEntropyLoss(), train_mb_size=64, train_epochs=epochs,
            plugins=[DeviceDataPlugin()], evaluator=None,
        )  # fmt: skip
        strategy.train(experience, eval_streams=[])
        networks.append(model.eval())
    return networks


def images(stream: Any) -> list[tuple[Tensor, Tensor]]:
    parts = []
    for experience in stream:
        data = experience.dataset.eval()
        parts.append((torch.stack([x for x, *_ in data]), torch.tensor(list(data.targets))))
    return parts


@torch.no_grad()
def compared(
    networks: list[MLP], train: list[tuple[Tensor, Tensor]], test: list[tuple[Tensor, Tensor]]
) -> dict[str, dict[str, list[float]]]:
    """For each kind of bridge, accuracy per task and what is lost against the chain's length."""

    def features(k: int, x: Tensor) -> Tensor:
        return networks[k].features(x.flatten(1))

    n = len(networks)
    everything = torch.cat([x[::n] for x, _ in train])  # as many as one task has
    one_by_one = Bridges()
    for old, new in itertools.pairwise(range(n)):
        x = train[new][0]
        one_by_one.extend(features(new, x), features(old, x))
    paired = [features(k, everything) for k in range(n)]
    chain, direct = align(paired), align(paired, compose="direct")
    ways = {
        "none": lambda u, k: u, "chain, new task's images": one_by_one,
        "chain, all tasks' images": chain, "direct, all tasks' images": direct,
    }  # fmt: skip
    all_test = torch.cat([x for x, _ in test])
    found: dict[str, dict[str, list[float]]] = {}
    for name in BRIDGES:
        accuracies, lost = [], []
        for k, (x, y) in enumerate(test):
            own = name == "own embedder"
            u = features(k, x) if own else ways[name](features(n - 1, x), k)
            guesses = networks[k].classifier(u).argmax(1)
            accuracies.append(float((guesses == y).double().mean()))
            if not own:
                led = ways[name](features(n - 1, all_test), k)
                lost.append(1 - float(r_squared(led, features(k, all_test))))
        found[name] = {"accuracy": accuracies, "lost": lost[::-1]}
    return found


def draw(record: dict[str, Any], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(2, 2, figsize=(12, 7.5), layout="constrained", sharey="row")
    for column, (mode, rows) in enumerate(record["modes"].items()):
        for row, (field, text) in enumerate(
            [("accuracy", "accuracy % of each task"), ("lost", "share of variance lost")]
        ):
            axes = grid[row][column]
            for k, (name, found) in enumerate(rows.items()):
                values = np.array(found[field])
                if not values.size:
                    continue
                values = 100 * values if row == 0 else values
                spread = values.std(0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1])
                steps = range(1, values.shape[1] + 1) if row == 0 else range(values.shape[1])
                axes.errorbar(
                    steps, values.mean(0), spread, label=name, marker="osd^v"[k], capsize=2,
                )  # fmt: skip
            axes.set_title(f"{mode}: {text}", fontsize=10)
            axes.set_xticks(list(steps))
            axes.set_xlabel("task" if row == 0 else "tasks led back over")
            axes.grid(alpha=0.3)
            if row:
                axes.set_ylim(0, 2)
    grid[0][0].legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/alignment_figure"))
    parser.add_argument("--smoke", action="store_true", help="digits, one seed")
    options = parser.parse_args()
    import matplotlib

    matplotlib.use("Agg")
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    split, width = (split_digits, 64) if options.smoke else (split_mnist, 784)
    benchmark = split(scenario="domain")  # the first or the second of two digits?
    seeds = options.seeds[:1] if options.smoke else options.seeds
    train, test = images(benchmark.train_stream), images(benchmark.test_stream)
    modes: dict[str, dict[str, dict[str, list[list[float]]]]] = {}
    for mode in ("in a row", "apart"):
        made = [
            compared(trained(benchmark, width, options.epochs, s, mode == "apart"), train, test)
            for s in seeds
        ]
        modes[mode] = {
            name: {field: [one[name][field] for one in made] for field in ("accuracy", "lost")}
            for name in BRIDGES
        }
        for name, found in modes[mode].items():
            means = [100 * float(np.mean(values)) for values in found["accuracy"]]
            told = aggregate(means)
            spread = "" if told["sd"] is None else f" ± {told['sd']:.1f}"
            print(f"{mode:10s} {name:26s} {told['mean']:.1f}{spread} %", flush=True)
    record = {
        "seeds": seeds, "epochs": options.epochs, "versions": versions(), "commit": commit(),
        "modes": modes,
    }  # fmt: skip
    draw(record, options.out / "alignment.png")
    (options.out / "alignment.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    print(f"alignment.png and alignment.json are in {options.out}")


if __name__ == "__main__":
    main()
