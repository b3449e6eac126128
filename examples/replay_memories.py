"""Three ways to draw from a memory, and four memories to draw from.

python examples/replay_memories.py

Trains ER, BER and Shuffle on Split digits with an experience-balanced, a class-balanced and a
reservoir memory of ours and with Avalanche's class-balanced buffer, 50 exemplars each.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from avalanche.training.storage_policy import ClassBalancedBuffer
from avalanche.training.supervised import Naive

from avalanche_ext import (
    MLP,
    BERPlugin,
    ClassBalancedMemory,
    ERPlugin,
    ExperienceBalancedMemory,
    ReservoirMemory,
    ShuffleReplayPlugin,
)
from avalanche_ext.benchmarks import split_digits

MEMORIES = (ExperienceBalancedMemory, ClassBalancedMemory, ReservoirMemory, ClassBalancedBuffer)


def accuracy(plugin, benchmark, epochs: int) -> float:
    torch.manual_seed(0)
    model = MLP(64, (100, 100), 10)
    strategy = Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        criterion=torch.nn.CrossEntropyLoss(),
        train_mb_size=10,
        train_epochs=epochs,
        plugins=[plugin],
        evaluator=None,
    )
    for experience in benchmark.train_stream:
        strategy.train(experience, eval_streams=[])
    model.eval()
    images = [sample for e in benchmark.test_stream for sample in e.dataset]
    with torch.no_grad():
        guesses = model(torch.stack([x for x, *_ in images])).argmax(1)
    return (guesses == torch.tensor([y for _, y, *_ in images])).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mem", type=int, default=50, help="exemplars in all")
    parser.add_argument("--out", type=Path, default=Path("runs/replay_memories"))
    parser.add_argument("--smoke", action="store_true", help="few images, one epoch")
    options = parser.parse_args()

    benchmark = split_digits(train_per_experience=40 if options.smoke else None)
    results = {}
    for memory in MEMORIES:
        for plugin in (ERPlugin, BERPlugin, ShuffleReplayPlugin):
            # A reservoir keeps no groups: BER then balances by the labels of what it holds.
            groupless = plugin is BERPlugin and memory is ReservoirMemory
            more = {"group_by": "class"} if groupless else {}
            made = plugin(storage_policy=memory(options.mem), **more)
            name = f"{made} from {memory.__name__}"
            results[name] = accuracy(made, benchmark, 1 if options.smoke else 10)
            print(f"{name:45s} {100 * results[name]:.1f} %")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "accuracy.json").write_text(json.dumps(results, indent=1), "utf-8")


if __name__ == "__main__":
    main()
