"""The DRL loss, forward and backward: class sums against Gram against the bandwidth floor.

The floor is one read of the activations forward, and one read and one write backward: a sum, and
a product with a number into fresh memory.
"""

from __future__ import annotations

import itertools
import time

import torch

from avalanche_ext.functional.drl import drl_loss
from tests.perf.timing import arguments, interleaved, peak_bytes, record

CLASSES = 10


def case(batch: int, width: int):
    torch.manual_seed(0)
    h = torch.rand(batch, width).requires_grad_()
    y = torch.randint(0, CLASSES, (batch,))
    return h, y


def step(h, y, method):
    def run():
        h.grad = None
        drl_loss(h, y, form="drl", method=method).backward()

    return run


def many(run, times):
    return lambda: [run() for _ in range(times)]


def floor(h):
    values = h.detach()

    def run():
        return values.sum(), values * 2.0

    return run


def prepared(batch, width, method):
    step(*case(64, 4096), method)()  # what torch sets up once is not the method's
    return step(*case(batch, width), method)


def main() -> None:
    options = arguments(__doc__.splitlines()[0])
    sizes = list(itertools.product([16, 64, 512, 4096], [1_000, 100_000]))
    rows = []
    for batch, width in sizes[:4] if options.quick else sizes:
        h, y = case(batch, width)
        methods = ["class_sums", "auto", "gram"]
        heavy = batch * batch * width > 1e12  # a minute per Gram step: once is enough to see it
        repeats = min(3, options.repeats) if heavy else options.repeats
        # A millisecond's worth of steps in each measurement, so that the clock does not matter.
        inner = max(1, round(2e6 / (batch * width)))
        variants = {"floor": floor(h), **{m: step(h, y, m) for m in methods}}
        alone = variants.pop("gram") if heavy else None
        repeated = {name: many(run, inner) for name, run in variants.items()}
        seconds = {k: v / inner for k, v in interleaved(repeated, repeats).items()}
        if alone is not None:
            start = time.perf_counter()
            alone()
            seconds["gram"] = time.perf_counter() - start
        row = {
            "batch": batch,
            "width": width,
            "repeats": repeats,
            "seconds": seconds,
            "class_sums_over_floor": seconds["class_sums"] / seconds["floor"],
            "auto_over_floor": seconds["auto"] / seconds["floor"],
            "gram_over_class_sums": seconds["gram"] / seconds["class_sums"],
            "auto_over_best": seconds["auto"] / min(seconds["gram"], seconds["class_sums"]),
            "activations_bytes": 4 * batch * width,
            "peak_bytes": {m: peak_bytes(prepared, batch, width, m) for m in methods},
        }
        rows.append(row)
        print(
            f"B {batch:5d} D {width:7d}: class sums / floor {row['class_sums_over_floor']:6.2f}, "
            f"auto / floor {row['auto_over_floor']:6.2f}, Gram / class sums "
            f"{row['gram_over_class_sums']:7.2f}, auto / best {row['auto_over_best']:.2f}",
            flush=True,
        )
    record(options, "drl_loss", rows, classes=CLASSES)


if __name__ == "__main__":
    main()
