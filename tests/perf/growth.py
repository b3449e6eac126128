"""How the cost of a step grows: with the experiences seen, the exemplars kept, the classes known.

Each point is the time of a training step with ``DeviceDataPlugin``, the time of a hand-written step
on as many rows with the same network, and the bytes that the memory holds. Flat is right for the
first two sweeps; with the classes the head grows, and the hand-written step with it.
"""

from __future__ import annotations

import itertools
import time

import torch
from avalanche.benchmarks import tensors_benchmark
from avalanche.training.plugins import SupervisedPlugin
from avalanche.training.supervised import Naive

from avalanche_ext import MLP, BERPlugin, DeviceDataPlugin, ERPlugin
from tests.perf.timing import arguments, record

WIDTH, BATCH, SAMPLES = 16, 64, 2_048

SYSTEMS = {
    "ER": lambda mem: ERPlugin(mem, mem_scope="total"),
    "BER, balanced": lambda mem: BERPlugin(mem, mem_scope="total", mode="balanced"),
}
BY_CLASS = {
    "BER, balanced by class": lambda mem: BERPlugin(
        mem, mem_scope="total", mode="balanced", group_by="class"
    ),
}


class Steps(SupervisedPlugin):
    """Time of each step of the last experience, and its rows."""

    def before_training_epoch(self, strategy, **kwargs):
        self.rows, self.clock = [], []

    def before_training_iteration(self, strategy, **kwargs):
        self.clock.append(time.perf_counter())
        self.rows.append(len(strategy.mb_y))

    @property
    def gaps(self):
        """Milliseconds of each step, loading included: from its start to the next one's."""
        return [1e3 * (b - a) for a, b in itertools.pairwise(self.clock)]


def samples(n, classes, generator):
    return torch.rand(n, WIDTH, generator=generator), torch.randint(
        classes[0], classes[1], (n,), generator=generator
    )


def train(make_plugin, parts, n_classes, points):
    """Milliseconds, rows and bytes after the experiences ``points``; the last always."""
    benchmark = tensors_benchmark(
        train_tensors=parts, test_tensors=parts[:1], task_labels=[0] * len(parts)
    )
    model, steps, plugin = MLP(WIDTH, (64,), n_classes), Steps(), make_plugin()
    strategy = Naive(
        model=model, optimizer=torch.optim.SGD(model.parameters(), 0.01), train_mb_size=BATCH,
        plugins=[DeviceDataPlugin(), plugin, steps], evaluator=None,
    )  # fmt: skip
    seen = []
    for experience in benchmark.train_stream:
        strategy.train(experience, eval_streams=[])
        seen.append((steps.gaps, steps.rows[0], plugin.bytes_remembered))
    found = {}
    for k in points:  # the median over the steps of this experience and up to four on either side
        gaps = sorted(gap for near in seen[max(1, k - 4) : k + 5] for gap in near[0])
        found[k] = (gaps[len(gaps) // 2], *seen[k][1:])
    return found


def by_hand(rows, n_classes, mem=0):
    """Milliseconds of a step with ``rows`` rows, half of them from a memory of ``mem``."""
    generator = torch.Generator().manual_seed(0)
    model = MLP(WIDTH, (64,), n_classes)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    x, y = samples(SAMPLES, (0, n_classes), generator)
    mem_x, mem_y = samples(max(mem, 1), (0, n_classes), generator)
    half, clock = rows // 2, []
    for _ in range(SAMPLES // BATCH + 1):
        clock.append(time.perf_counter())
        here = torch.randint(SAMPLES, (rows - half,))
        there = torch.randint(len(mem_y), (half,))
        bx = torch.cat([x.index_select(0, here), mem_x.index_select(0, there)])
        by = torch.cat([y.index_select(0, here), mem_y.index_select(0, there)])
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(bx), by).backward()
        optimizer.step()
    gaps = sorted(b - a for a, b in itertools.pairwise(clock))
    return 1e3 * gaps[len(gaps) // 2]


def row_of(sweep, system, at, measured, hand):
    milliseconds, rows, held = measured
    row = {
        "sweep": sweep, "system": system, "at": at, "rows_per_step": rows,
        "milliseconds_per_step": milliseconds, "by_hand_milliseconds_per_step": hand,
        "bytes_of_exemplars": held,
    }  # fmt: skip
    print(
        f"{sweep} {at:>8,}, {system}: {milliseconds:.3f} ms per step of {rows} rows, by hand "
        f"{hand:.3f}; {held:,} bytes",
        flush=True,
    )
    return row


def over_experiences(points):
    generator = torch.Generator().manual_seed(0)
    parts = [samples(SAMPLES // 4, (0, 10), generator) for _ in range(max(points) + 1)]
    for name, make in SYSTEMS.items():
        found = train(lambda make=make: make(2_000), parts, 10, points)
        for k in points:
            yield row_of("experiences", name, k, found[k], by_hand(found[k][1], 10, 2_000))


def over_exemplars(sizes):
    generator = torch.Generator().manual_seed(0)
    for mem in sizes:
        parts = [samples(n, (0, 10), generator) for n in (mem, SAMPLES)]
        for name, make in SYSTEMS.items():
            found = train(lambda make=make, mem=mem: make(mem), parts, 10, {1})[1]
            yield row_of("exemplars", name, mem, found, by_hand(found[1], 10, mem))


def over_classes(numbers):
    generator = torch.Generator().manual_seed(0)
    for n in numbers:
        halves = ((0, n // 2), (n // 2, n))
        parts = [samples(max(SAMPLES, 10 * n), half, generator) for half in halves]
        for name, make in BY_CLASS.items():
            found = train(lambda make=make, n=n: make(20 * n), parts, n, {1})[1]
            yield row_of("classes", name, n, found, by_hand(found[1], n, 20 * n))


def draw(rows, path):
    """Step time above, bytes below, one column for each sweep."""
    import matplotlib.pyplot as plt

    sweeps = list(dict.fromkeys(row["sweep"] for row in rows))
    figure, axes = plt.subplots(2, len(sweeps), figsize=(4 * len(sweeps), 6), squeeze=False)
    for column, sweep in zip(axes.T, sweeps, strict=True):
        mine = [row for row in rows if row["sweep"] == sweep]
        for colour, name in enumerate(dict.fromkeys(row["system"] for row in mine)):
            points = [row for row in mine if row["system"] == name]
            at = [row["at"] for row in points]
            for key, style, label in (
                ("milliseconds_per_step", "o-", name),
                ("by_hand_milliseconds_per_step", "x--", f"{name}: by hand"),
            ):
                values = [row[key] for row in points]
                column[0].plot(at, values, style, color=f"C{colour}", label=label)
            held = [row["bytes_of_exemplars"] / 1e6 for row in points]
            column[1].plot(at, held, "o-", color=f"C{colour}", label=name)
        for axis in column:
            axis.set_xscale("log")
            axis.grid(alpha=0.3)
        highest = max(row["milliseconds_per_step"] for row in mine)
        column[0].set_ylim(0, 1.5 * highest)
        column[0].legend(fontsize=7, loc="upper left")
        if sweep == "experiences":
            column[1].set_ylim(bottom=0)  # the budget is a total
        else:
            column[1].set_yscale("log")
        column[1].set_xlabel(sweep)
    axes[0][0].set_ylabel("milliseconds per step")
    axes[1][0].set_ylabel("megabytes of exemplars")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    print(path)


def main() -> None:
    options = arguments(__doc__.splitlines()[0])
    if options.quick:
        rows = [*over_experiences([1, 4]), *over_exemplars([100, 1_000]), *over_classes([10, 100])]
    else:
        rows = [
            *over_experiences([1, 2, 5, 10, 20, 50, 100, 200, 400]),
            *over_exemplars([10**k for k in range(2, 7)]),
            *over_classes([10, 20, 50, 100, 200, 500, 1000]),
        ]
    record(options, "growth", rows, batch=BATCH, width=WIDTH)
    draw(rows, options.out / "growth.png")


if __name__ == "__main__":
    main()
