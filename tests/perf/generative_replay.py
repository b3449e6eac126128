"""Time of a step with generated replay, over the same step without, and Avalanche's replay.

Split MNIST, second experience, after a first one; MLP 784-400-400-10 and the VAE of 784-400-400-100
(or h 256, z 32 with ``--quick``), batch 128 and as many replays.

``replay`` draws, labels and learns from the replay, and does not train the generator;
``interleaved`` trains it as well; ``in turn`` trains solver and then generator, an epoch each, on
new samples and as many replays: so does ``avalanche``, its ``GenerativeReplayPlugin`` with the same
networks, loss and optimizers. ``flops_over_naive`` is what each has to compute: matrix products
counted in a run.

``--part stream`` trains on all five experiences of Split MNIST, one and three epochs of solver and
generator (784-256-256-32), batch 64, and has seconds and accuracy at the end: seeds 0, 1, ...
"""

from __future__ import annotations

import copy
import functools
import statistics
import time
import warnings

import torch
from avalanche.training.plugins import GenerativeReplayPlugin
from avalanche.training.plugins.generative_replay import TrainGeneratorAfterExpPlugin
from avalanche.training.supervised import Naive, VAETraining
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from torch.utils.flop_counter import flop_registry

from avalanche_ext.benchmarks.mnist import split_mnist
from avalanche_ext.models.generators.build import build_generator
from avalanche_ext.models.mlp import MLP
from avalanche_ext.training.plugins.dgr import DGRPlugin
from avalanche_ext.training.supervised.generator_training import GeneratorTraining
from tests.perf.timing import arguments, interleaved_samples, record

BATCH = 128


class TheirInterface(nn.Module):
    """Our VAE as Avalanche's generator: ``forward`` for its criterion, and ``generate``."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model.data_loss(x, x)

    def generate(self, n):
        return self.model.decode(self.model.noise(n))


def mean_loss(x, losses):
    return losses.mean()


class Idle(GeneratorTraining):
    """Only made use of."""

    def step(self, x, y, replay):
        if self.experiences == 1:
            super().step(x, y, replay)


def solver(plugins, device, *, batch=BATCH, epochs=1, seed=0):
    torch.manual_seed(seed)
    model = MLP(784, (400, 400), 10)
    return Naive(
        model=model, optimizer=torch.optim.Adam(model.parameters(), 1e-3),
        criterion=nn.CrossEntropyLoss(), train_mb_size=batch, train_epochs=epochs,
        eval_mb_size=1000, plugins=plugins, evaluator=None, device=device,
    )  # fmt: skip


def ours(name, device, cls=GeneratorTraining, *, batch=BATCH, epochs=1, seed=0, **options):
    torch.manual_seed(seed)
    model = build_generator(name, (1, 28, 28), 10)
    source = cls(model=model, train_mb_size=batch, train_epochs=epochs, device=device)
    plugins = [DGRPlugin(source, **options)]
    return solver(plugins, device, batch=batch, epochs=epochs, seed=seed)


def theirs(name, device, *, batch=BATCH, epochs=1, seed=0):
    torch.manual_seed(seed)
    model = TheirInterface(build_generator(name, (1, 28, 28), 10))
    training = VAETraining(
        model=model, optimizer=torch.optim.Adam(model.parameters(), 1e-3), criterion=mean_loss,
        train_mb_size=batch, train_epochs=epochs, plugins=[GenerativeReplayPlugin()],
        evaluator=None, device=device,
    )  # fmt: skip
    plugins = [GenerativeReplayPlugin(generator_strategy=training), TrainGeneratorAfterExpPlugin()]
    return solver(plugins, device, batch=batch, epochs=epochs, seed=seed)


def seconds(prepared, experience):
    strategy = copy.deepcopy(prepared)
    start = time.perf_counter()
    strategy.train(experience, eval_streams=[])
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


class Work(TorchDispatchMode):
    """Adds up the FLOPs of matrix products; torch's counter trips over Avalanche's replay."""

    def __init__(self):
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=out)
        return out


def flops(prepared, experience):
    strategy = copy.deepcopy(prepared)
    with Work() as work:
        strategy.train(experience, eval_streams=[])
    return work.flops


def right(strategy, benchmark):
    """Share of test images that the model names."""
    strategy.model.eval()
    hits = total = 0
    with torch.no_grad():
        for experience in benchmark.test_stream:
            for x, y, *_ in DataLoader(experience.dataset, batch_size=1000):
                logits = strategy.model(x.to(strategy.device))
                hits += int((logits.argmax(1).cpu() == y).sum())
                total += len(y)
    return hits / total


def stream(options, device) -> None:
    made = {
        "interleaved": ours,
        "in turn": functools.partial(ours, schedule="after"),
        "avalanche": theirs,
    }
    images = 1024 if options.quick else None
    cells = [(name, epochs) for epochs in (1, 3) for name in made]
    found = {cell: {"seconds": [], "accuracy": []} for cell in cells}
    for seed in range(options.repeats):
        benchmark = split_mnist(train_per_experience=images, seed=seed)
        for name, epochs in cells[seed:] + cells[:seed]:
            strategy = made[name]("small_vae", device, batch=64, epochs=epochs, seed=seed)
            start = time.perf_counter()
            for experience in benchmark.train_stream:
                strategy.train(experience, eval_streams=[])
            if device == "cuda":
                torch.cuda.synchronize()
            seconds, accuracy = time.perf_counter() - start, right(strategy, benchmark)
            found[name, epochs]["seconds"].append(seconds)
            found[name, epochs]["accuracy"].append(accuracy)
            print(f"seed {seed}, {name}, {epochs} epochs: {seconds:.1f} s, {100 * accuracy:.1f} %")
    rows = [
        {"method": name, "epochs": epochs, "device": device, **values}
        for (name, epochs), values in found.items()
    ]
    record(options, "generative_replay_stream", rows, batch=64, generator="small_vae")


def main() -> None:
    options = arguments(__doc__.splitlines()[0], ("step", "stream"))
    warnings.simplefilter("ignore")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    (stream if options.part == "stream" else step)(options, device)


def step(options, device) -> None:
    images, name = (1024, "small_vae") if options.quick else (4096, "vae")
    experiences = split_mnist(train_per_experience=images).train_stream
    prepared = {
        "naive": solver([], device),
        "replay": ours(name, device, Idle),
        "replay, 8 steps at once": ours(name, device, Idle, prefetch=8),
        "interleaved": ours(name, device),
        "in turn": ours(name, device, schedule="after"),
        "avalanche": theirs(name, device),
    }
    for strategy in prepared.values():
        strategy.train(experiences[0], eval_streams=[])
    runs = {k: functools.partial(seconds, s, experiences[1]) for k, s in prepared.items()}
    samples = interleaved_samples(runs, options.repeats)
    steps = images // BATCH
    work = {k: flops(s, experiences[1]) for k, s in prepared.items()}
    medians = {k: statistics.median(v) / steps for k, v in samples.items()}
    row = {
        "generator": name,
        "device": device,
        "seconds_per_step": medians,
        "over_naive": {k: s / medians["naive"] for k, s in medians.items()},
        "flops_over_naive": {k: w / work["naive"] for k, w in work.items()},
        "avalanche_over_in_turn": medians["avalanche"] / medians["in turn"],
    }
    for k, s in medians.items():
        over, need = s / medians["naive"], work[k] / work["naive"]
        print(f"{k:24s} {1e3 * s:8.2f} ms per step, {over:5.2f} x naive, work {need:5.2f} x")
    record(options, "generative_replay", [row], steps=steps, batch=BATCH)


if __name__ == "__main__":
    main()
