"""Four hundred small experiences: what a step costs beyond its samples, and what memory holds.

For each mode of replay: time per step of loading and training a small network, divided by what the
same step costs by hand (the same number of rows gathered from one tensor, the same network), and
the bytes that a plugin holds beyond its exemplars, at several points of the stream.
"""

from __future__ import annotations

import pickle
import time

import torch
from avalanche.benchmarks import tensors_benchmark
from avalanche.training.plugins import SupervisedPlugin
from avalanche.training.supervised import Naive

from avalanche_ext import MLP, BERPlugin, ERPlugin, ShuffleReplayPlugin
from tests.perf.timing import arguments, record

EXPERIENCES, SAMPLES, WIDTH, MEM, BATCH = 400, 60, 256, 10, 10

MODES = {
    "naive": SupervisedPlugin,
    "er": lambda: ERPlugin(MEM),
    "ber_balanced": lambda: BERPlugin(MEM, mode="balanced"),
    "ber_max_groups_5": lambda: BERPlugin(MEM, max_groups=5),
    "ber": lambda: BERPlugin(MEM),
    "shuffle": lambda: ShuffleReplayPlugin(MEM),
    "er_total": lambda: ERPlugin(1000, mem_scope="total"),
}


def stream():
    x = torch.rand(EXPERIENCES, SAMPLES, WIDTH)
    y = torch.randint(0, 10, (EXPERIENCES, SAMPLES))
    parts = list(zip(x, y, strict=True))
    return tensors_benchmark(
        train_tensors=parts, test_tensors=parts[:1], task_labels=[0] * EXPERIENCES
    )


class Rows(SupervisedPlugin):
    """Rows and steps of the experience under way."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def after_training_iteration(self, strategy, **kwargs):
        self.rows.append(len(strategy.mb_y))


def by_hand(model, optimizer, rows):
    """Seconds for steps with the same numbers of rows, gathered from one tensor."""
    store, labels = torch.rand(20_000, WIDTH), torch.randint(0, 10, (20_000,))
    start = time.perf_counter()
    for n in rows:
        at = torch.randint(20_000, (n,))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(store[at]), labels[at]).backward()
        optimizer.step()
    return time.perf_counter() - start


def main() -> None:
    options = arguments(__doc__.splitlines()[0])
    benchmark = stream()
    points = {1, 2, 5, 10, 20, 50, 100, 200, 300, 399}
    rows = []
    for mode, make in list(MODES.items())[:3] if options.quick else MODES.items():
        plugin, counter = make(), Rows()
        model = MLP(WIDTH, (32,), 10)
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        strategy = Naive(
            model=model, optimizer=optimizer, train_mb_size=BATCH, plugins=[plugin, counter],
            evaluator=None,
        )  # fmt: skip
        for k, experience in enumerate(benchmark.train_stream):
            near = any(abs(k - p) <= 2 for p in points)  # five neighbours: take their median
            counter.rows = []
            start = time.perf_counter()
            strategy.train(experience, eval_streams=[])
            seconds = time.perf_counter() - start
            if near and k:
                hand = by_hand(model, optimizer, counter.rows)
                held = getattr(plugin, "bytes_remembered", 0)
                beyond = len(pickle.dumps(plugin)) - held if k in points else None
                rows.append({
                    "mode": mode,
                    "experience": k,
                    "steps": len(counter.rows),
                    "rows_per_step": sum(counter.rows) / len(counter.rows),
                    "milliseconds_per_step": 1e3 * seconds / len(counter.rows),
                    "by_hand_milliseconds_per_step": 1e3 * hand / len(counter.rows),
                    "bytes_of_exemplars": held,
                    "bytes_beyond_exemplars": beyond,
                })  # fmt: skip
        for p in sorted(points):
            mine = [r for r in rows if r["mode"] == mode and abs(r["experience"] - p) <= 2]
            extra = sorted(
                r["milliseconds_per_step"] - r["by_hand_milliseconds_per_step"] for r in mine
            )
            beyond = next(r["bytes_beyond_exemplars"] for r in mine if r["experience"] == p)
            print(
                f"{mode:17s} experience {p:3d}: {mine[0]['rows_per_step']:7.1f} rows per step, "
                f"{extra[len(extra) // 2]:.3f} ms per step beyond the hand-written one, "
                f"{beyond} bytes beyond exemplars",
                flush=True,
            )
    record(options, "long_stream", rows, experiences=EXPERIENCES, samples=SAMPLES, batch=BATCH)


if __name__ == "__main__":
    main()
