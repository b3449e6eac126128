"""Time of a training step with online look-ahead, distillation and projection, over a plain one.

An MLP 100-100 on images of 8 x 8 and one of 400-400 on 28 x 28, mini-batches of 10, memories of 200
samples in tensors; processor time per step, in the second and in the last of 10 experiences of the
same size, whose ratio says whether a step's time grows with the stream.
"""

from __future__ import annotations

import statistics
import time

import torch
from avalanche.benchmarks import tensors_benchmark
from avalanche.training.plugins import SupervisedPlugin
from avalanche.training.supervised import Naive

from avalanche_ext import MLP, DeviceDataPlugin, ERPlugin
from avalanche_ext.training.plugins.online_distillation import OnlineDistillationPlugin
from avalanche_ext.training.plugins.online_lookahead import OnlineLookaheadPlugin
from avalanche_ext.training.plugins.online_projection import OnlineProjectionPlugin
from tests.perf.timing import arguments, interleaved_samples, record

EXPERIENCES, BATCH = 10, 10
METHODS = {
    "plain": SupervisedPlugin,
    "er": lambda: ERPlugin(200, mem_scope="total"),
    "lookahead": lambda: OnlineLookaheadPlugin(1e-3, n_inputs=32),
    "lookahead_first_order": lambda: OnlineLookaheadPlugin(1e-3, form="first_order", n_inputs=32),
    "distillation_1": lambda: OnlineDistillationPlugin(1e-3, steps=1, n_inputs=32),
    "distillation_10": lambda: OnlineDistillationPlugin(1e-3, n_inputs=32),
    "projection_16": lambda: OnlineProjectionPlugin(n_inputs=16),
    "projection_64": lambda: OnlineProjectionPlugin(n_inputs=64),
    "projection_16_eps": lambda: OnlineProjectionPlugin(1e-4, n_inputs=16),
    "projection_16_spectral": lambda: OnlineProjectionPlugin(1e-4, norm="spectral", n_inputs=16),
}


class Clock(SupervisedPlugin):
    """Processor time from the first step of an experience to its last, per step."""

    def __init__(self):
        super().__init__()
        self.steps, self.began, self.seconds = 0, 0.0, []

    def before_training_epoch(self, strategy, **kwargs):
        self.steps, self.began = 0, time.process_time()

    def after_training_iteration(self, strategy, **kwargs):
        self.steps += 1

    def after_training_epoch(self, strategy, **kwargs):
        self.seconds.append((time.process_time() - self.began) / self.steps)


def stream(width, samples):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(EXPERIENCES, samples, width, generator=generator)
    y = torch.randint(0, 10, (EXPERIENCES, samples), generator=generator)
    parts = list(zip(x, y, strict=True))
    return tensors_benchmark(
        train_tensors=parts, test_tensors=parts[:1], task_labels=[0] * EXPERIENCES
    )


def training(benchmark, width, hidden, make):
    """Train a whole stream; seconds of a step in each of its experiences."""

    def run():
        torch.manual_seed(0)
        model, clock = MLP(width, (hidden, hidden), 10), Clock()
        strategy = Naive(
            model=model, optimizer=torch.optim.SGD(model.parameters(), 0.01),
            train_mb_size=BATCH, plugins=[DeviceDataPlugin(), make(), clock], evaluator=None,
        )  # fmt: skip
        for experience in benchmark.train_stream:
            strategy.train(experience, eval_streams=[])
        return clock.seconds

    return run


def main() -> None:
    options = arguments(__doc__.splitlines()[0])
    rows = []
    for width, hidden in [(64, 100)] if options.quick else [(64, 100), (784, 400)]:
        benchmark = stream(width, 100 if options.quick else 300)
        variants = {
            name: training(benchmark, width, hidden, make) for name, make in METHODS.items()
        }
        samples = interleaved_samples(variants, options.repeats)
        plain = statistics.median(t for run in samples["plain"] for t in run[1:])
        for name, runs in samples.items():
            early = statistics.median(t for run in runs for t in run[1:4])
            late = statistics.median(t for run in runs for t in run[-3:])
            whole = statistics.median(t for run in runs for t in run[1:])
            rows.append({
                "width": width,
                "hidden": hidden,
                "method": name,
                "milliseconds": 1e3 * whole,
                "over_plain": whole / plain,
                "late_over_early": late / early,
            })  # fmt: skip
            print(f"{width}-{hidden}-{hidden} {name}: {1e3 * whole:.3f} ms, {whole / plain:.2f} "
                  f"times a plain step, late / early {late / early:.2f}", flush=True)  # fmt: skip
    record(options, "online_memory", rows, experiences=EXPERIENCES, batch=BATCH)


if __name__ == "__main__":
    main()
