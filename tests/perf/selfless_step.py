"""A training step with SLNI, its rivals and importance methods over the step without.

Networks and batch of the recipes: the MLP 784-128-128-10 of permuted MNIST, the ConvNet with two
hidden layers of 256 of CIFAR-100 (random images, 200 a step). Processor time of an epoch of the
second experience, so that importance methods have something to hold; variants take turns.
"""

from __future__ import annotations

import statistics
import time

import torch
from avalanche.training.determinism.rng_manager import RNGManager
from avalanche.training.supervised import Naive

from avalanche_ext import (
    DeCovPlugin,
    DeviceDataPlugin,
    EWCPlugin,
    L1RepPlugin,
    MASPlugin,
    OrthRegPlugin,
    SLNIPlugin,
    SynapticIntelligencePlugin,
    build_backbone,
)
from avalanche_ext.benchmarks.streams import benchmark_of
from tests.perf.timing import arguments, interleaved_samples, record

NETWORKS = {"mlp": ((1, 28, 28), (128, 128)), "conv_mlp": ((3, 32, 32), (256, 256))}
PLUGINS = {
    "naive": lambda: [],
    "slni": lambda: [SLNIPlugin(1e-3)],
    "slnid": lambda: [SLNIPlugin(1e-3, form="slnid")],
    "l1_rep": lambda: [L1RepPlugin(1e-3)],
    "decov": lambda: [DeCovPlugin(0.1)],
    "orthreg": lambda: [OrthRegPlugin(1e-2)],
    "mas": lambda: [MASPlugin(0.1)],
    "ewc": lambda: [EWCPlugin(1.0)],
    "si": lambda: [SynapticIntelligencePlugin(0.1)],
}
BATCH = 200


def epoch(name: str, make, steps: int):
    """One more epoch of the second experience."""
    shape, hidden = NETWORKS[name]
    RNGManager.set_random_seeds(0)
    images = [(torch.rand(BATCH * steps, *shape), torch.randint(10, (BATCH * steps,)))] * 2
    stream = benchmark_of(images, images).train_stream
    model = build_backbone(name, 10, shape, hidden=hidden)
    strategy = Naive(
        model=model, optimizer=torch.optim.SGD(model.parameters(), 1e-3, 0.9),
        train_mb_size=BATCH, plugins=[DeviceDataPlugin(), *make()], evaluator=None,
    )  # fmt: skip
    strategy.train(stream[0], eval_streams=[])
    inner, spent = strategy.training_epoch, []

    def timed(**kwargs):
        start = time.process_time()
        inner(**kwargs)
        spent.append(time.process_time() - start)

    strategy.training_epoch = timed

    def run() -> float:
        strategy.train(stream[1], eval_streams=[])
        return spent[-1] / steps

    return run


def main() -> None:
    options = arguments(__doc__.splitlines()[0])
    rows = []
    for name in NETWORKS:
        steps = {"mlp": 50, "conv_mlp": 4}[name] if not options.quick else 2
        variants = {key: epoch(name, make, steps) for key, make in PLUGINS.items()}
        samples = interleaved_samples(variants, options.repeats)
        seconds = {key: statistics.median(values) for key, values in samples.items()}
        for key, value in seconds.items():
            ratio = value / seconds["naive"]
            rows.append(
                {"network": name, "method": key, "ms_per_step": 1e3 * value, "over_naive": ratio}
            )
            print(f"{name:9s} {key:8s} {1e3 * value:8.3f} ms a step, {ratio:.3f} of naive's",
                  flush=True)  # fmt: skip
    record(options, "selfless_step", rows, batch=BATCH)


if __name__ == "__main__":
    main()
