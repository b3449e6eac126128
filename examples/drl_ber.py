"""DRL + BER with Avalanche's own loop, loggers and metrics, in thirty lines.

python examples/drl_ber.py
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from avalanche.evaluation.metrics import accuracy_metrics, forgetting_metrics
from avalanche.logging import InteractiveLogger, TensorboardLogger
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.supervised import Naive

from avalanche_ext import MLP, BERPlugin, DRLPlugin
from avalanche_ext.benchmarks import split_digits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lam", type=float, default=1e-3)
    parser.add_argument("--mem", type=int, default=10, help="exemplars per experience")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/drl_ber_example"))
    parser.add_argument("--smoke", action="store_true", help="few images")
    options = parser.parse_args()

    benchmark = split_digits(train_per_experience=40 if options.smoke else None)
    torch.manual_seed(0)
    model = MLP(64, (100, 100), 10)
    strategy = Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        criterion=torch.nn.CrossEntropyLoss(),
        train_mb_size=10,
        train_epochs=1 if options.smoke else 10,
        eval_mb_size=256,
        device=options.device,
        plugins=[DRLPlugin(lam=options.lam), BERPlugin(mem=options.mem)],
        evaluator=EvaluationPlugin(
            accuracy_metrics(stream=True),
            forgetting_metrics(stream=True),
            loggers=[InteractiveLogger(), TensorboardLogger(str(options.out / "tensorboard"))],
        ),
    )
    history = []
    for experience in benchmark.train_stream:
        strategy.train(experience, eval_streams=[])
        history.append(strategy.eval(benchmark.test_stream))
    (options.out / "metrics.json").write_text(json.dumps(history, indent=1), "utf-8")
    print(f"metrics after each experience: {options.out / 'metrics.json'}")


if __name__ == "__main__":
    main()
