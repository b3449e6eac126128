"""Real strategies on tiny streams, with a record of every batch that was trained on."""

from __future__ import annotations

import torch
from avalanche.benchmarks import tensors_benchmark
from avalanche.training.plugins import SupervisedPlugin

from tests.conftest import naive

WIDTH = 4


class Recorder(SupervisedPlugin):
    """Labels, task labels and sample numbers of each batch, per experience."""

    def __init__(self):
        super().__init__()
        self.batches = []

    def before_training_exp(self, strategy, **kwargs):
        self.batches.append([])

    def before_forward(self, strategy, **kwargs):
        x, y, *t = (c.clone() for c in strategy.mbatch)
        self.batches[-1].append((number(x), y.tolist(), *(c.tolist() for c in t)))


def number(x):
    return [round(v * 1000) for v in x[:, 0].tolist()]


def numbered(sizes, *, labels=None, tasks=None):
    """Experience k has ``sizes[k]`` samples numbered from 1000 k; x[0] is number / 1000."""
    parts = []
    for k, n in enumerate(sizes):
        x = torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(k))
        x[:, 0] = (1000 * k + torch.arange(n)) / 1000
        y = torch.tensor(labels[k]) if labels else torch.arange(n) % 2 + 2 * k
        parts.append((x, y))
    stream = tensors_benchmark(
        train_tensors=parts, test_tensors=parts[:1], task_labels=tasks or [0] * len(sizes)
    ).train_stream
    return list(stream)


def linear(width=100):
    torch.manual_seed(1)
    return torch.nn.Linear(WIDTH, width)


def trained(plugins, stream, *, seed=0, model=None, kwargs=None, **options):
    """Train; return the recorded batches and the final weights."""
    recorder = Recorder()
    model = linear() if model is None else model
    torch.manual_seed(seed)
    strategy = naive(model, [*plugins, recorder], lr=0.01, **options)
    for exp in stream:
        strategy.train(exp, eval_streams=[], **(kwargs or {}))
    return recorder.batches, weights(model)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def origins(batch):
    """The experience of each row."""
    return [n // 1000 for n in batch[0]]
