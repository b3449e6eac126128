"""What differs between these importance methods and Avalanche's of the same names, in numbers.

    python examples/importance_methods.py

On Split digits, one network and one seed: how far the weights are from plain training with a huge
weight of SI's penalty (0 if nothing is measured); the trace of EWC's Fisher information for
different batch sizes; how far batch statistics move while MAS measures; in which share of
training's forward passes the network is in train mode under RWalk.
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from avalanche.training import plugins as theirs
from avalanche.training.plugins import SupervisedPlugin
from avalanche.training.supervised import Naive

import avalanche_ext as ours
from avalanche_ext import MLP, build_backbone
from avalanche_ext.benchmarks import split_digits
from avalanche_ext.experiments.provenance import commit, versions

EPOCHS = 5


class Modes(SupervisedPlugin):
    """In which mode the network is in each training forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.modes: list[bool] = []

    def before_forward(self, strategy: Any, **kwargs: Any) -> None:
        """Note the mode."""
        self.modes.append(strategy.model.training)


class Statistics(SupervisedPlugin):
    """Batch statistics when the last epoch ends, before importance is measured."""

    def __init__(self) -> None:
        super().__init__()
        self.values: list[torch.Tensor] = []

    def after_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        """Copy them."""
        self.values = statistics(strategy.model)


def statistics(model: torch.nn.Module) -> list[torch.Tensor]:
    return [b.detach().clone() for n, b in model.named_buffers() if "running_mean" in n]


def trained(
    plugins: list[Any], *, convnet: bool = False, batch: int = 10, epochs: int = EPOCHS,
    experiences: int = 2, lr: float = 0.05, smoke: bool = False,
) -> Naive:  # fmt: skip
    torch.manual_seed(0)
    benchmark = split_digits(train_per_experience=40 if smoke else None)
    model = build_backbone("small_convnet", 10, (1, 8, 8)) if convnet else MLP(64, (64,), 10)
    strategy = Naive(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr),
        criterion=torch.nn.CrossEntropyLoss(), train_mb_size=batch,
        train_epochs=1 if smoke else epochs, plugins=plugins, evaluator=None,
    )  # fmt: skip
    for experience in benchmark.train_stream[:experiences]:
        strategy.train(experience, eval_streams=[])
    return strategy


def weights(strategy: Naive) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in strategy.model.parameters()])


def si(smoke: bool) -> dict[str, float]:
    """Largest difference of a weight from plain training, at a penalty of 1e6 (1 for ours)."""
    plain = weights(trained([], smoke=smoke))
    found = {
        "avalanche": theirs.SynapticIntelligencePlugin(1e6),
        "here": ours.SynapticIntelligencePlugin(1.0),
    }
    return {
        name: float((weights(trained([p], smoke=smoke)) - plain).abs().max())
        for name, p in found.items()
    }


def fisher(smoke: bool) -> dict[str, dict[str, float]]:
    """Trace of the Fisher information of one network, measured with batches of different sizes."""
    found: dict[str, dict[str, float]] = {"avalanche": {}, "here": {}}
    for batch in (1, 10, 100):
        strategy = trained([], experiences=1, smoke=smoke)
        strategy.train_mb_size = batch
        experience = split_digits(train_per_experience=40 if smoke else None).train_stream[0]
        plugin = theirs.EWCPlugin(1.0)
        values = plugin.compute_importances(
            strategy.model, strategy._criterion, strategy.optimizer, experience.dataset,
            strategy.device, batch,
        )  # fmt: skip
        found["avalanche"][str(batch)] = float(sum(v.data.sum() for v in values.values()))
        mine = ours.EWCPlugin(1.0, fisher="empirical")
        # One more epoch at rate 0 measures the same network.
        for group in strategy.optimizer.param_groups:
            group["lr"] = 0.0
        strategy.plugins.append(mine)
        strategy.train_epochs = 1
        strategy.train(experience, eval_streams=[])
        found["here"][str(batch)] = float(sum(v.sum() for v in mine.importance.values()))
    return found


def batch_statistics(smoke: bool) -> dict[str, float]:
    """Largest move of a running mean between the end of training and that of the experience."""
    found = {}
    for name, plugin in (("avalanche", theirs.MASPlugin()), ("here", ours.MASPlugin())):
        watch = Statistics()
        strategy = trained([watch, plugin], convnet=True, experiences=1, smoke=smoke)
        after = statistics(strategy.model)
        found[name] = max(
            float((a - b).abs().max()) for a, b in zip(after, watch.values, strict=True)
        )
    return found


def train_mode(smoke: bool) -> dict[str, float]:
    """Share of training's forward passes in train mode, under RWalk."""
    found = {}
    for name, plugin in (("avalanche", theirs.RWalkPlugin()), ("here", ours.RWalkPlugin())):
        watch = Modes()
        trained([plugin, watch], smoke=smoke)
        found[name] = sum(watch.modes) / len(watch.modes)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/importance_methods"))
    parser.add_argument("--smoke", action="store_true", help="few images, one epoch")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    record = {
        "si": si(options.smoke),
        "fisher": fisher(options.smoke),
        "batch_statistics": batch_statistics(options.smoke),
        "train_mode": train_mode(options.smoke),
        "versions": versions(),
        "commit": commit(),
    }
    for name in ("si", "fisher", "batch_statistics", "train_mode"):
        print(name, record[name])
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "importance_methods.json"
    path.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    print(path)


if __name__ == "__main__":
    main()
