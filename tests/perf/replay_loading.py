"""Replay loading: time per step of BER and ER against Avalanche's ReplayPlugin and a raw loop.

Data alone, no model. The raw loop draws the same numbers of samples from the same tensors with
one permutation and one ``randint`` per step, as one would write it by hand.
"""

from __future__ import annotations

import torch
from avalanche.benchmarks import nc_benchmark
from avalanche.training.plugins import ReplayPlugin
from avalanche.training.supervised import Naive
from torch.utils.data import TensorDataset

from avalanche_ext import MLP, BERPlugin, ERPlugin
from tests.perf.timing import arguments, interleaved, record

SAMPLES, EXPERIENCES, MEM = 30_000, 5, 2_000


def stream():
    x = torch.rand(SAMPLES, 1, 28, 28)
    data = TensorDataset(x, torch.arange(SAMPLES) % 10)
    data.targets = data.tensors[1].tolist()
    return nc_benchmark(data, data, EXPERIENCES, task_labels=False, shuffle=False)


class TakeLoader(Exception):  # noqa: N818 - a way out of training, not an error
    """Leave training with the loader in hand."""


def loader_of(plugin, benchmark, batch):
    """The loader that the plugin builds for the third experience, after two others."""
    model = MLP(784, (8,), 10)
    strategy = Naive(
        model=model, optimizer=torch.optim.SGD(model.parameters(), 0.0),
        train_mb_size=batch, plugins=[plugin], evaluator=None,
    )  # fmt: skip
    for experience in benchmark.train_stream[:2]:
        strategy.train(experience, eval_streams=[])
    taken = []

    def take(**kwargs):
        taken.append(strategy.dataloader)
        raise TakeLoader

    strategy.training_epoch = take
    try:
        strategy.train(benchmark.train_stream[2], eval_streams=[])
    except TakeLoader:
        return taken[0]
    raise AssertionError("training did not reach an epoch")


def raw_loop(benchmark, batch, groups):
    """B current samples and B from each of ``groups`` parts of the memory."""
    x = benchmark.train_stream[0].dataset[0][0].new_empty((SAMPLES, 1, 28, 28)).uniform_()
    y = torch.arange(SAMPLES) % 10
    t = torch.zeros(SAMPLES, dtype=torch.int64)
    current, size = SAMPLES // EXPERIENCES, MEM // groups

    def run():
        order = torch.randperm(current)
        starts = current + size * torch.arange(groups)
        for chunk in order.split(batch):
            drawn = torch.randint(size, (groups, batch)) + starts[:, None]
            rows = torch.cat([chunk, drawn.flatten()])
            x.index_select(0, rows), y[rows], t[rows]

    return run


def main() -> None:
    options = arguments(__doc__.splitlines()[0])
    benchmark = stream()
    rows = []
    for batch in [64] if options.quick else [10, 64, 256]:
        loaders = {
            "er": loader_of(ERPlugin(MEM, mem_scope="total"), benchmark, batch),
            "ber": loader_of(BERPlugin(MEM, mem_scope="total"), benchmark, batch),
            "avalanche_replay": loader_of(ReplayPlugin(MEM), benchmark, batch),
        }
        variants = {
            "raw_er": raw_loop(benchmark, batch, 1),
            "raw_ber": raw_loop(benchmark, batch, 2),
            **{k: (lambda v=v: sum(1 for _ in v)) for k, v in loaders.items()},
        }
        steps = len(loaders["er"])
        per_step = {k: v / steps for k, v in interleaved(variants, options.repeats).items()}
        row = {
            "batch": batch,
            "seconds_per_step": per_step,
            "er_over_raw": per_step["er"] / per_step["raw_er"],
            "ber_over_raw": per_step["ber"] / per_step["raw_ber"],
            "avalanche_replay_over_er": per_step["avalanche_replay"] / per_step["er"],
        }
        rows.append(row)
        print(
            f"B {batch:4d}: ER / raw {row['er_over_raw']:.2f}, BER / raw "
            f"{row['ber_over_raw']:.2f}, Avalanche's ReplayPlugin / ER "
            f"{row['avalanche_replay_over_er']:.2f}",
            flush=True,
        )
    facts = {"samples_per_experience": SAMPLES // EXPERIENCES, "mem": MEM}
    record(options, "replay_loading", rows, **facts)


if __name__ == "__main__":
    main()
