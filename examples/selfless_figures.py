"""The figures of selfless sequential learning: accuracy per task, sparsity, the weight of SLNI.

    python examples/selfless_figures.py --out runs/selfless_figures
    python examples/selfless_figures.py --only-records # Figs. 1 and 2 alone, nothing is trained
    python examples/selfless_figures.py --smoke        # seconds, no MNIST needed

``fig1.png``, ``fig2.png``: accuracy of each task after the last one, the paper's Figs. 1 and 2,
from the records of ``avalanche-ext run slni/permuted_mnist_5_small`` and ``slni/cifar100_10_small``
(``--fig1``, ``--fig2``; one that is not there is left out). The paper prints no numbers of them.

The others train MAS alone and with SLNI, SLNID, L1-Rep and DeCov on five permutations of MNIST:
``sparsity.png``: share of units active per sample and used at all, and of weights of next to no
importance, after each task; ``activations.png``: how large hidden activations are after the first
task; ``lam.png``: accuracy and sparsity against the weight of SLNI, on held-out training images;
``importance.png``: importance of the units, sorted, after each task of SLNID.

Reference:
    Aljundi, Rohrbach, Tuytelaars (2018), Selfless Sequential Learning, Sec. 4, Figs. 1 and 2.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from avalanche.training.determinism.rng_manager import RNGManager
from avalanche.training.plugins import EvaluationPlugin

from avalanche_ext import SparsityMetrics
from avalanche_ext.evaluation.metrics.device import accuracy_metrics
from avalanche_ext.evaluation.metrics.sparsity import HISTOGRAM_EDGES
from avalanche_ext.evaluation.tables import aggregate
from avalanche_ext.experiments.build import build_strategy
from avalanche_ext.experiments.provenance import commit, versions
from avalanche_ext.recipes import Recipe, find_recipe

RESULTS = Path(__file__).parent / "results"
METHODS = ("mas", "slni", "slnid", "l1_rep", "decov")
LAMS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
# Of each layer's largest importance: below this a weight is as good as free.
FREE = 0.01
# How the paper's legend tells its methods apart.
_HATCHES = {"representation": "", "parameter": "//", "activation": ".."}
_KINDS = {
    "SLNI": "representation", "SLNID": "representation", "SNI": "representation",
    "SNID": "representation", "L1-Rep": "representation", "DeCov": "representation",
    "OrthReg": "parameter", "L2-WD": "parameter", "L1-Param": "parameter",
}  # fmt: skip


def observed(recipe: Recipe, seed: int) -> dict[str, Any]:
    """Train a recipe; after each task, accuracies and how sparse the network is."""
    benchmark = recipe.benchmark.build(seed)
    RNGManager.set_random_seeds(seed)
    sparsity = SparsityMetrics(histogram=True)
    strategy = build_strategy(
        recipe,
        evaluator=EvaluationPlugin(
            accuracy_metrics(experience=True), sparsity, loggers=[], strict_checks=False
        ),
    )
    anchor = next(p for p in strategy.plugins if hasattr(p, "anchors"))
    found: dict[str, list[Any]] = {
        k: [] for k in ("accuracies", "active", "used", "free", "histograms", "importance")
    }
    for k, experience in enumerate(benchmark.train_stream):
        strategy.train(experience, eval_streams=[])
        # Sparsity is that on the first task's images, accuracy that on every task's.
        metrics = strategy.eval(benchmark.test_stream)
        names = sorted(n for n in metrics if n.startswith("Top1_Acc_Exp/eval_phase/test"))
        found["accuracies"].append([metrics[n] for n in names[: k + 1]])
        strategy.eval(benchmark.test_stream[:1])
        values = sparsity.result()
        for name in ("active", "used"):
            key = f"{name.capitalize()}Share_"
            found[name].append([v for n, v in values.items() if n.startswith(key)])
        weights = {n: v for n, v in anchor.importance.items() if v.ndim > 1}
        found["free"].append(
            [float((v < FREE * v.max()).double().mean()) for v in weights.values()]
        )
        found["histograms"].append([h.tolist() for h in sparsity.histograms.values()])
        units = [p.importance for p in strategy.plugins if type(p).__name__ == "SLNIPlugin"]
        found["importance"].append([v.tolist() for u in units for v in u.values()])
    return found


def measure(stream: str, seeds: list[int], smoke: bool) -> dict[str, Any]:
    """Everything the four figures show."""
    made: dict[str, Any] = {"methods": {}, "lam": []}

    def recipe(key: str, **changes: Any) -> Recipe:
        found = find_recipe(f"{key}/{stream}")
        found = found.smoke() if smoke else found
        return dataclasses.replace(found, **changes)

    for key in METHODS:
        made["methods"][key] = [observed(recipe(key), seed) for seed in seeds]
        last = [100 * float(np.mean(r["accuracies"][-1])) for r in made["methods"][key]]
        print(f"{key:8s} average accuracy {np.mean(last):.1f} %", flush=True)
    for lam in LAMS[:2] if smoke else LAMS:
        settings = dataclasses.replace(recipe("slni").benchmark, validation=True)
        runs = [observed(recipe("slni", lam=lam, benchmark=settings), s) for s in seeds]
        made["lam"].append(
            {
                "lam": lam,
                "first_task": aggregate([r["accuracies"][0][0] for r in runs]),
                "average": aggregate([float(np.mean(r["accuracies"][-1])) for r in runs]),
                "active": aggregate([float(np.mean(r["active"][0])) for r in runs]),
            }
        )
        print(f"SLNI at {lam:g}: {100 * made['lam'][-1]['average']['mean']:.1f} %", flush=True)
    return made


# drawing ------------------------------------------------------------------------------------


def draw_accuracies(summary: dict[str, Any], title: str, path: Path) -> None:
    """Bars per task, one for each method, with the sample deviation over seeds."""
    import matplotlib.pyplot as plt

    rows = summary["rows"]
    n = len(rows[0]["accuracy_matrices"][0][-1])
    figure, axes = plt.subplots(figsize=(max(8, 1.9 * n), 4.6), layout="constrained")
    width, lowest = 0.86 / len(rows), 100.0
    for k, row in enumerate(rows):
        last = 100 * np.array([matrix[-1] for matrix in row["accuracy_matrices"]])
        mean = last.mean(0)
        spread = last.std(0, ddof=1) if len(last) > 1 else np.zeros(n)
        lowest = min(lowest, float(mean.min()))
        axes.bar(
            np.arange(n) + (k - (len(rows) - 1) / 2) * width, mean, width, yerr=spread,
            color=plt.get_cmap("tab20")(k), edgecolor="black", linewidth=0.4,
            hatch=_HATCHES[_KINDS.get(row["title"], "activation")], error_kw={"linewidth": 0.8},
            label=f"{row['title']}: {last.mean():.1f}",
        )  # fmt: skip
    axes.set_xticks(range(n), [f"T{k + 1}" for k in range(n)])
    axes.set_ylim(max(0.0, lowest - 3), min(100.0, axes.get_ylim()[1]))
    axes.set_ylabel("accuracy % after learning all tasks")
    axes.set_title(title)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _over_seeds(runs: list[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of ``(tasks, layers)``."""
    a = 100 * np.array([run[name] for run in runs])
    return a.mean(0), a.std(0, ddof=1) if len(a) > 1 else np.zeros(a.shape[1:])


def draw_sparsity(methods: dict[str, Any], path: Path) -> None:
    """Three shares after each task, for both hidden layers."""
    import matplotlib.pyplot as plt

    texts = {"active": "units active per sample, %", "used": "units active on > 1 % of images, %",
             "free": f"weights with importance below {FREE:g} of the largest, %"}  # fmt: skip
    figure, grid = plt.subplots(2, 3, figsize=(13, 7), layout="constrained", sharex=True)
    for column, (name, text) in enumerate(texts.items()):
        for layer in range(2):
            axes = grid[layer][column]
            for k, (key, runs) in enumerate(methods.items()):
                mean, spread = _over_seeds(runs, name)
                tasks = np.arange(1, len(mean) + 1)
                axes.errorbar(
                    tasks, mean[:, layer], spread[:, layer], label=key, marker="osd^v"[k],
                    color=plt.get_cmap("tab10")(k), capsize=2,
                )  # fmt: skip
            axes.set_ylim(0, 105)
            axes.set_xticks(tasks)
            axes.set_title(f"layer {layer + 1}: {text}", fontsize=9)
            if layer:
                axes.set_xlabel("after task")
    grid[0][0].legend(fontsize=8, loc="center right")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_activations(methods: dict[str, Any], path: Path) -> None:
    """How often activations are how large, after the first task; the first bin holds zeros."""
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", sharey=True)
    for layer, axes in enumerate(grid):
        for k, (key, runs) in enumerate(methods.items()):
            counts = np.array([run["histograms"][0][layer] for run in runs]).sum(0)
            axes.step(
                range(len(counts)), 100 * counts / counts.sum(), where="mid", label=key,
                color=plt.get_cmap("tab10")(k),
            )  # fmt: skip
        axes.set_yscale("log")
        places = range(0, len(HISTOGRAM_EDGES), 3)
        axes.set_xticks(list(places), [f"{HISTOGRAM_EDGES[p]:g}" for p in places], fontsize=8)
        axes.set_xlabel("activation up to")
        axes.set_title(f"layer {layer + 1}, after task 1")
    grid[0].set_ylabel("% of activations")
    grid[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_lam(rows: list[dict[str, Any]], path: Path) -> None:
    """First task's accuracy, average accuracy and active share against the weight of SLNI."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.4), layout="constrained")
    lams = [row["lam"] for row in rows]
    texts = {"first_task": "first task, when just learnt", "average": "all tasks, at the end",
             "active": "units active per sample"}  # fmt: skip
    for k, (name, text) in enumerate(texts.items()):
        mean = [100 * row[name]["mean"] for row in rows]
        spread = [100 * (row[name]["sd"] or 0.0) for row in rows]
        axes.errorbar(lams, mean, spread, label=text, marker="osd"[k], capsize=2)
    axes.set_xscale("log")
    axes.set_ylim(0, 100)
    axes.set_xlabel("lam of SLNI")
    axes.set_ylabel("% (accuracy on held-out training images)")
    axes.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_importance(runs: list[dict[str, Any]], path: Path) -> None:
    """Importance of the units of both layers, sorted, after each task; of the first seed."""
    import matplotlib.pyplot as plt

    tasks = runs[0]["importance"]
    figure, grid = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for layer, axes in enumerate(grid):
        for k, layers in enumerate(tasks):
            axes.plot(
                sorted(layers[layer], reverse=True), color=plt.get_cmap("viridis")(k / len(tasks)),
                label=f"after task {k + 1}",
            )  # fmt: skip
        axes.set_yscale("symlog", linthresh=1e-2)
        axes.set_xlabel(f"units of layer {layer + 1}, most important first")
    grid[0].set_ylabel("importance")
    grid[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--fig1", type=Path, default=RESULTS / "selfless_permuted_mnist_small")
    parser.add_argument("--fig2", type=Path, default=RESULTS / "selfless_cifar100")
    parser.add_argument("--out", type=Path, default=Path("runs/selfless_figures"))
    parser.add_argument("--only-records", action="store_true", help="Figs. 1 and 2 alone")
    parser.add_argument("--smoke", action="store_true", help="few images, one epoch, one seed")
    options = parser.parse_args()
    import matplotlib

    matplotlib.use("Agg")
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    titles = {
        "fig1": "Five permutations of MNIST",
        "fig2": "Split CIFAR-100, ten tasks of 500 images",
    }
    for name, title in titles.items():
        path = getattr(options, name) / "summary.json"
        if path.exists():
            summary = json.loads(path.read_text("utf-8"))
            draw_accuracies(summary, title, options.out / f"{name}.png")
        else:
            print(f"{name}.png is left out: there is no {path}")
    if options.only_records:
        return
    stream = "split_digits" if options.smoke else "permuted_mnist_5_small"
    seeds = options.seeds[:1] if options.smoke else options.seeds
    made = measure(stream, seeds, options.smoke)
    draw_sparsity(made["methods"], options.out / "sparsity.png")
    draw_activations(made["methods"], options.out / "activations.png")
    draw_lam(made["lam"], options.out / "lam.png")
    draw_importance(made["methods"]["slnid"], options.out / "importance.png")
    record = {
        "stream": stream, "seeds": seeds, "versions": versions(), "commit": commit(),
        "lam": made["lam"],
        "methods": {
            key: {
                name: [[aggregate(v) for v in zip(*(r[name][t] for r in runs), strict=True)]
                       for t in range(len(runs[0][name]))]
                for name in ("accuracies", "active", "used", "free")
            }
            for key, runs in made["methods"].items()
        },
    }  # fmt: skip
    (options.out / "figures.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    print(f"figures and figures.json are in {options.out}")


if __name__ == "__main__":
    main()
