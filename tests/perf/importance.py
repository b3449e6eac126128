"""Importance passes and anchored training, over one epoch of plain training on the same samples.

Processor time. ``pass`` is what EWC and MAS do once per experience; Avalanche's, on batch means and
with its own settings, stand beside them. ``epoch`` is an experience of one epoch with the method,
its pass included, when it has an anchor already. Every network sees the same random images.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from avalanche.models import SlimResNet18
from avalanche.training.plugins import EWCPlugin as AvalanchesEWC
from avalanche.training.plugins import MASPlugin as AvalanchesMAS

from avalanche_ext.models.mlp import MLP
from avalanche_ext.training.importances import Fisher, Importance, OutputNorm
from avalanche_ext.training.plugins.parameter_anchor import (
    EWCPlugin,
    L2TransferPlugin,
    MASPlugin,
    RWalkPlugin,
    SynapticIntelligencePlugin,
)
from tests.conftest import class_stream, naive
from tests.perf.timing import arguments, interleaved_samples, record

LAM = 1e-6  # small enough for any importance; the work is the same
METHODS = {
    "l2_transfer": L2TransferPlugin,
    "ewc": EWCPlugin,
    "si": SynapticIntelligencePlugin,
    "mas": MASPlugin,
    "rwalk": RWalkPlugin,
}
# Samples, numbers per sample, batch, and the network.
NETWORKS: dict[str, tuple[int, int, int, Callable[[], torch.nn.Module]]] = {
    "mlp": (2000, 784, 64, lambda: MLP(784, (100, 100), 10)),
    "slim_resnet18": (
        100, 3 * 32 * 32, 25,
        lambda: torch.nn.Sequential(torch.nn.Unflatten(1, (3, 32, 32)), SlimResNet18(10)),
    ),
}  # fmt: skip


def learnt(make: Callable[[], torch.nn.Module], experience: Any, batch: int, plugins: list[Any]):
    """A strategy that has learnt the experience once."""
    torch.manual_seed(0)
    strategy = naive(make(), plugins, lr=0.01, batch=batch)
    strategy.train(experience)
    return strategy


def importance_pass(measure: Importance, strategy: Any, experience: Any) -> None:
    strategy.experience = experience
    measure.finish(strategy)


def avalanches_ewc(strategy: Any, experience: Any) -> None:
    AvalanchesEWC(LAM).compute_importances(
        strategy.model, strategy._criterion, strategy.optimizer, experience.dataset,
        strategy.device, strategy.train_mb_size,
    )  # fmt: skip


def avalanches_mas(strategy: Any, experience: Any) -> None:
    strategy.experience = experience
    AvalanchesMAS()._get_importance(strategy)


def processor_time(run: Callable[[], Any]) -> Callable[[], float]:
    def timed() -> float:
        start = time.process_time()
        run()
        return time.process_time() - start

    return timed


def variants(
    make: Callable[[], torch.nn.Module], experience: Any, batch: int
) -> dict[str, Callable[[], Any]]:
    """What is timed, by name; ``plain`` is what the rest is divided by."""
    plain = learnt(make, experience, batch, [])
    found: dict[str, Callable[[], Any]] = {"plain": partial(plain.train, experience)}
    for mode in ("sampled", "empirical", "argmax"):
        found[f"pass_fisher_{mode}"] = partial(importance_pass, Fisher(mode), plain, experience)
    found["pass_output_norm"] = partial(importance_pass, OutputNorm(), plain, experience)
    found["pass_avalanches_ewc"] = partial(avalanches_ewc, plain, experience)
    found["pass_avalanches_mas"] = partial(avalanches_mas, plain, experience)
    for key, method in METHODS.items():
        strategy = learnt(make, experience, batch, [method(LAM)])
        found[f"epoch_{key}"] = partial(strategy.train, experience)
    return found


def main() -> None:
    options = arguments(__doc__.splitlines()[0])
    rows = []
    for name, (n, width, batch, make) in list(NETWORKS.items())[: 1 if options.quick else None]:
        n = n // 10 if options.quick else n
        (experience,) = class_stream(1, n_per_class=n // 10, n_classes=10, width=width).train_stream
        clocks = {k: processor_time(v) for k, v in variants(make, experience, batch).items()}
        samples = interleaved_samples(clocks, options.repeats)
        seconds = {key: statistics.median(values) for key, values in samples.items()}
        ratios = {key: s / seconds["plain"] for key, s in seconds.items()}
        rows.append(
            {
                "network": name,
                "samples": n,
                "batch": batch,
                "seconds": seconds,
                "over_plain": ratios,
            }
        )
        print(f"{name}: a plain epoch of {n} samples takes {1000 * seconds['plain']:.0f} ms")
        for key, ratio in ratios.items():
            print(f"  {key:21} {ratio:6.2f}", flush=True)
    record(options, "importance", rows)


if __name__ == "__main__":
    main()
