"""Neural inhibition, forward and backward: dense, Fourier, low rank and the released form.

The floor is one read of the activations and one write of as many numbers: a product with a number
into fresh memory. The released form is the batch moment matrix, weighted and summed entry by entry,
with the Gaussian built once (the released code builds it in every step). ``sigma`` is ``N/6``.
"""

from __future__ import annotations

import itertools

import torch

from avalanche_ext.functional.inhibition import inhibition_loss
from avalanche_ext.functional.inhibition_operators import inhibition_operator
from tests.perf.timing import arguments, interleaved, record

# The released form and the dense one hold several N x N matrices.
DENSE_MAX_WIDTH = 4096


def activations(batch: int, width: int):
    torch.manual_seed(0)
    return (torch.randn(batch, width) - 0.5).relu().requires_grad_()


def step(h, operator):
    def run():
        h.grad = None
        inhibition_loss(h, operator=operator).backward()

    return run


def released(h, weights):
    def run():
        h.grad = None
        moments = (h.T @ h / len(h)) * weights
        (moments.abs().sum() - moments.diagonal().abs().sum()).backward()

    return run


def floor(h):
    values = h.detach()
    return lambda: values * 2.0


def many(run, times):
    return lambda: [run() for _ in range(times)]


def gradient(run, h):
    run()
    return h.grad.double()


def main() -> None:
    options = arguments(__doc__.splitlines()[0])
    sizes = list(itertools.product([128, 256, 512, 2000, 4096, 16384], [64, 256]))
    rows = []
    for width, batch in sizes[:7] if options.quick else sizes:
        h = activations(batch, width)
        methods = ["low_rank", "fft", "auto"]
        if width <= DENSE_MAX_WIDTH:
            methods.insert(0, "dense")
        built = {m: inhibition_operator(width, width / 6, method=m) for m in methods}
        variants = {"floor": floor(h), **{m: step(h, op) for m, op in built.items()}}
        if width <= DENSE_MAX_WIDTH:
            weights = built["dense"].weights + torch.eye(width)
            variants["released"] = released(h, weights)
        exact = inhibition_operator(width, width / 6, method="fft", like=h.double())
        truth = 2 * exact.apply(h.detach().double()) / batch
        errors = {m: float((gradient(variants[m], h) - truth).abs().max() / truth.abs().max())
                  for m in methods}  # fmt: skip
        inner = max(1, round(1e6 / (batch * width)))
        repeated = {name: many(run, inner) for name, run in variants.items()}
        seconds = {k: v / inner for k, v in interleaved(repeated, options.repeats).items()}
        best = min(seconds[m] for m in methods)
        row = {
            "width": width,
            "batch": batch,
            "seconds": seconds,
            "auto_is": type(built["auto"]).__name__,
            "rank": built["low_rank"].factor.shape[1],
            "auto_over_floor": seconds["auto"] / seconds["floor"],
            "auto_over_best": seconds["auto"] / best,
            "released_over_auto": seconds.get("released", 0.0) / seconds["auto"] or None,
            "gradient_error": errors,
        }
        rows.append(row)
        times = ", ".join(f"{name} {1e3 * s:.3f}" for name, s in seconds.items())
        print(f"N {width:5d} B {batch:3d} ms: {times}; auto / best {row['auto_over_best']:.2f}, "
              f"worst gradient error {max(errors.values()):.0e}", flush=True)  # fmt: skip
    record(options, "inhibition", rows)


if __name__ == "__main__":
    main()
