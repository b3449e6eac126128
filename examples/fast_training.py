"""Replay on Split CIFAR-100 with a ResNet-18, as fast as the hardware goes.

    python examples/fast_training.py --method er --experiences 2 --precision bf16
    python examples/fast_training.py --method er --experiences 2 --as-avalanche-comes

Each run prints and records the accuracy and the seconds per training step; the second command is
the same training without the plugins that make it fast. ``--smoke`` runs on scikit-learn's digits
with a small network, in seconds.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
from avalanche.training.supervised import Naive

from avalanche_ext import (
    MLP,
    BERPlugin,
    CompilePlugin,
    DeviceDataPlugin,
    DRLPlugin,
    ERPlugin,
    PrecisionPlugin,
)
from avalanche_ext.benchmarks import split_cifar100, split_digits
from avalanche_ext.evaluation.metrics.device import accuracy_metrics

METHODS = {
    "naive": lambda mem: [],
    "er": lambda mem: [ERPlugin(mem, mem_scope="total")],
    "ber": lambda mem: [BERPlugin(mem, mem_scope="total", mode="balanced")],
    "drl_ber": lambda mem: [
        DRLPlugin(1e-4),
        BERPlugin(mem, mem_scope="total", mode="balanced"),
    ],
}


class Steps(SupervisedPlugin):
    """Count the training steps."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        """One more."""
        self.count += 1


def resnet18(classes: int) -> torch.nn.Module:
    """ResNet-18 for 32 x 32 images: a 3 x 3 stem of stride 1, no pooling behind it."""
    from torchvision.models import resnet18 as imagenet_resnet18

    model = imagenet_resnet18(num_classes=classes)
    model.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = torch.nn.Identity()
    return model


def main() -> None:
    options = arguments()
    torch.manual_seed(0)
    if options.smoke:
        benchmark, model = split_digits(), MLP(64, (100,), 10)
    else:
        benchmark, model = split_cifar100(10, root=options.root), resnet18(100)
    torch.manual_seed(0)
    steps = Steps()
    plugins = [*METHODS[options.method](options.mem), steps]
    if not options.as_avalanche_comes:
        plugins = [DeviceDataPlugin(), PrecisionPlugin(options.precision), *plugins]
    if options.compile:
        plugins.append(CompilePlugin())
    strategy = Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=options.lr, momentum=0.9),
        criterion=torch.nn.CrossEntropyLoss(),
        train_mb_size=options.batch,
        train_epochs=options.epochs,
        eval_mb_size=256,
        device=options.device,
        plugins=plugins,
        evaluator=EvaluationPlugin(accuracy_metrics(stream=True), strict_checks=False),
    )
    seconds = 0.0
    experiences = benchmark.train_stream[: options.experiences]
    for experience in experiences:
        start = time.perf_counter()
        strategy.train(experience, eval_streams=[])
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds += time.perf_counter() - start
        metrics = strategy.eval(benchmark.test_stream[: strategy.clock.train_exp_counter])
        accuracy = next(v for k, v in metrics.items() if k.startswith("Top1_Acc_Stream"))
        print(
            f"experience {strategy.clock.train_exp_counter}: accuracy {100 * accuracy:.1f} %, "
            f"{1e3 * seconds / steps.count:.2f} ms per step",
            flush=True,
        )
    record = {
        **{k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()},
        "accuracy": accuracy,
        "steps": steps.count,
        "seconds": seconds,
        "torch": torch.__version__,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "fast_training.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=METHODS, default="er")
    parser.add_argument("--experiences", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=0.03)
    parser.add_argument("--mem", type=int, default=2000)
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--as-avalanche-comes", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--root", type=Path, default=None, help="folder of CIFAR-100")
    parser.add_argument("--smoke", action="store_true", help="small images, a few seconds")
    parser.add_argument("--out", type=Path, default=Path("runs/fast_training"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
