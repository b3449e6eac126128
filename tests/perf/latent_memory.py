"""Time of a training step with a memory in latent space, over a plain one.

MLP 784-400-200-10 cut behind its first layer, mini-batches of 64 and as many features, one new
class in each of 10 experiences as large as Split MNIST's, one epoch each; processor time of a step,
and of whole experiences over their steps: what is measured and fitted at their ends is in that.
"""

from __future__ import annotations

import statistics
import time

import torch
from avalanche.benchmarks import tensors_benchmark
from avalanche.training.plugins import SupervisedPlugin
from avalanche.training.supervised import Naive
from torch import nn

from avalanche_ext import (
    MLP,
    DeviceDataPlugin,
    LatentGenerativeMemoryPlugin,
    LatentReplayPlugin,
)
from tests.perf.online_memory import Clock
from tests.perf.timing import arguments, interleaved_samples, record

EXPERIENCES, BATCH, LAYER = 10, 64, "features.1"


def latent(encoder, **options):
    return lambda: LatentGenerativeMemoryPlugin(LAYER, encoder=encoder, **options)


METHODS = {
    "plain": SupervisedPlugin,
    "gaussian": latent("frozen"),
    "gaussian_diagonal": latent("frozen", memory="diagonal"),
    "gaussian_full": latent("frozen", memory="full"),
    "mixture": latent("frozen", memory="mixture"),
    "vae": latent("frozen", memory="vae"),
    "freeze_after_first": latent("freeze_after_first"),
    "distill": latent("distill", memory="full", drift="linear"),
    "replay": lambda: LatentReplayPlugin(LAYER, mem_bytes=336_000, encoder="frozen"),
}


def stream(samples):
    draws = torch.Generator().manual_seed(0)
    parts = [
        (torch.rand(samples, 784, generator=draws), torch.full((samples,), k))
        for k in range(EXPERIENCES)
    ]
    return tensors_benchmark(
        train_tensors=parts, test_tensors=parts[:1], task_labels=[0] * EXPERIENCES
    )


def training(benchmark, make, samples):
    """Train a whole stream; seconds per step of each experience, without and with its ends."""
    steps = -(-samples // BATCH)

    def run():
        torch.manual_seed(0)
        model, clock = MLP(784, (400, 200), EXPERIENCES), Clock()
        strategy = Naive(
            model=model, optimizer=torch.optim.Adam(model.parameters(), 1e-3, fused=True),
            criterion=nn.CrossEntropyLoss(), train_mb_size=BATCH,
            plugins=[DeviceDataPlugin(), make(), clock], evaluator=None,
        )  # fmt: skip
        seconds = []
        for experience in benchmark.train_stream:
            start = time.process_time()
            strategy.train(experience, eval_streams=[])
            seconds.append((time.process_time() - start) / steps)
        return clock.seconds, seconds

    return run


def median_of(runs, part, place=slice(1, None)):
    """Of the experiences of all runs, the first one left out."""
    return statistics.median(t for run in runs for t in run[part][place])


def main() -> None:
    options = arguments(__doc__.splitlines()[0])
    samples = 640 if options.quick else 12_000  # as Split MNIST
    benchmark = stream(samples)
    variants = {name: training(benchmark, make, samples) for name, make in METHODS.items()}
    found = interleaved_samples(variants, options.repeats)
    plain = [median_of(found["plain"], part) for part in (0, 1)]
    rows = []
    for name, runs in found.items():
        step, whole = (median_of(runs, part) for part in (0, 1))
        early, late = (median_of(runs, 0, place) for place in (slice(1, 4), slice(-3, None)))
        rows.append({
            "method": name,
            "milliseconds": 1e3 * step,
            "over_plain": step / plain[0],
            "experience_over_plain": whole / plain[1],
            "late_over_early": late / early,
        })  # fmt: skip
        print(f"{name:20s} {1e3 * step:.3f} ms, {step / plain[0]:.2f} times a plain step; "
              f"experience {whole / plain[1]:.2f} times; late / early {late / early:.2f}",
              flush=True)  # fmt: skip
    record(options, "latent_memory", rows, experiences=EXPERIENCES, batch=BATCH, samples=samples)


if __name__ == "__main__":
    main()
