"""Accuracy against bytes kept from the past: exemplars, generators, memories in latent space.

    python examples/memory_figure.py --out runs/memory_figure
    python examples/memory_figure.py --smoke        # a minute, no MNIST needed

Split MNIST, two classes at a time, one solver (784-400-400-10) and one schedule (Adam 1e-3, batches
of 64, three passes) for all:

- exemplars: ER and BER, from 10 to 3000 images. They are held as the network reads them, four bytes
  a pixel; the dashed line is the same at one byte a pixel;
- generators in pixel space: DGR with VAEs of several widths, MeRGAN;
- in latent space, behind a random first layer: densities of each class's features, a VAE, stored
  features. The layer is part of the solver and not counted.

Writes ``memory.png``, and ``memory.json`` with every point and, for each memory that makes its
samples, how many bytes of BER's exemplars give the same accuracy (linear in the logarithm of the
bytes between BER's points). An interrupted call goes on where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import torch

from avalanche_ext.evaluation.tables import aggregate
from avalanche_ext.experiments.provenance import commit, versions
from avalanche_ext.experiments.run import run_seed
from avalanche_ext.recipes import Recipe, find_recipe
from avalanche_ext.recipes.streams import SplitMNIST

PROTOCOL = {
    "benchmark": SplitMNIST(), "hidden": (400, 400), "optimizer": "adam", "lr": 1e-3,
    "batch_size": 64, "epochs": 3,
}  # fmt: skip
RANDOM = {"encoder": "frozen"}
# Curve: method, what all its points change in its recipe, and its points.
CURVES: dict[str, tuple[str, dict[str, Any], list[dict[str, Any]]]] = {
    "ER": ("er", {}, [{"mem": n} for n in (10, 30, 100, 300, 1000, 3000)]),
    "BER": ("ber", {}, [{"mem": n} for n in (10, 30, 100, 300, 1000, 3000)]),
    "DGR": ("dgr", {"generator": "small_vae"}, [
        {"generator_widths": (n, n)} for n in (32, 64, 128, 256)
    ]),
    "MeRGAN-JTR": ("mergan_jtr", {}, [{}]),
    "MeRGAN-RA": ("mergan_ra", {}, [{}]),
    "Densities of features": ("latent_generative_memory", RANDOM, [
        {"memory": name} for name in ("diagonal", "mixture", "gaussian", "full")
    ]),
    "VAE of features": ("latent_generative_memory", RANDOM, [{"memory": "vae"}]),
    "Stored features": ("latent_replay", {**RANDOM, "stored": None}, [
        {"stored_bytes": n} for n in (32_000, 100_000, 336_000, 1_000_000, 3_200_000)
    ]),
}  # fmt: skip
MADE = ("DGR", "MeRGAN-JTR", "MeRGAN-RA", "Densities of features", "VAE of features")
PIXELS = 784  # bytes of an image at one byte a pixel


def recipe_of(key: str, changes: dict[str, Any], smoke: bool) -> Recipe:
    found = find_recipe(f"{key}/{'split_digits' if smoke else 'split_mnist'}")
    if smoke:
        small = {k: v for k, v in changes.items() if k not in ("generator",)}
        return dataclasses.replace(found.smoke(), **small)
    return dataclasses.replace(found, **PROTOCOL, **changes)


def measure(out: Path, seeds: list[int], smoke: bool) -> dict[str, list[dict[str, Any]]]:
    """Accuracy and bytes of every point of every curve."""
    curves: dict[str, list[dict[str, Any]]] = {}
    for title, (key, common, points) in CURVES.items():
        curves[title] = []
        few = points[: 2 if title == "BER" else 1]  # two to measure the others by
        for point in few if smoke else points:
            recipe = recipe_of(key, {**common, **point}, smoke)
            name = "_".join([title, *(f"{k}={v}" for k, v in point.items())]).replace(" ", "_")
            results = [one(recipe, seed, out / "points" / name / str(seed)) for seed in seeds]
            found = {
                "settings": {k: str(v) for k, v in {**common, **point}.items()},
                "bytes": results[0]["bytes_remembered"],
                "accuracy": aggregate([r["average_accuracy"] for r in results]),
                "seconds": aggregate([r["seconds"] for r in results]),
                **{
                    field: aggregate([r[field] for r in results])
                    for field in ("generator_accuracy", "reverse_accuracy", "critic_accuracy")
                    if results[0].get(field) is not None
                },
            }
            curves[title].append(found)
            print(
                f"{title:22s} {point} {found['bytes']:>10,} bytes, "
                f"{100 * found['accuracy']['mean']:.1f} %",
                flush=True,
            )
    return curves


def one(recipe: Recipe, seed: int, folder: Path) -> dict[str, Any]:
    """The result of a seed; of an earlier call if that finished it."""
    path = folder / "result.json"
    if path.exists():
        return json.loads(path.read_text("utf-8"))
    return run_seed(recipe, seed, folder)


def equal_bytes(curve: list[dict[str, Any]], accuracy: float) -> float | None:
    """Bytes at which a curve reaches an accuracy first; ``None`` if it does not."""
    before: tuple[float, float] | None = None
    for point in curve:
        at, reached = point["bytes"], point["accuracy"]["mean"]
        if reached >= accuracy:
            if before is None:
                return float(at)
            share = (accuracy - before[1]) / (reached - before[1])
            return math.exp(math.log(before[0]) + share * math.log(at / before[0]))
        before = at, reached
    return None


def draw(curves: dict[str, list[dict[str, Any]]], title: str, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9.5, 5.6), layout="constrained")
    for k, (name, points) in enumerate(curves.items()):
        mean = [100 * p["accuracy"]["mean"] for p in points]
        spread = [100 * (p["accuracy"]["sd"] or 0.0) for p in points]
        line = axes.errorbar(
            [p["bytes"] for p in points], mean, spread, label=name, marker="osd^vPX*"[k],
            color=plt.get_cmap("tab10")(k), capsize=2, markersize=7 if len(points) > 1 else 10,
        )  # fmt: skip
        if name in ("ER", "BER"):
            axes.plot(
                [p["raw_bytes"] for p in points], mean, "--", color=line.lines[0].get_color(),
                alpha=0.6, label=f"{name}, one byte a pixel",
            )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlabel("bytes kept between experiences")
    axes.set_ylabel("accuracy % at the end")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/memory_figure"))
    parser.add_argument("--smoke", action="store_true", help="digits, few images, one seed")
    options = parser.parse_args()
    import matplotlib

    matplotlib.use("Agg")
    torch.set_num_threads(1)
    seeds = options.seeds[:1] if options.smoke else options.seeds
    options.out.mkdir(parents=True, exist_ok=True)
    curves = measure(options.out, seeds, options.smoke)
    pixels = 64 if options.smoke else PIXELS
    for name in ("ER", "BER"):
        for point in curves[name]:
            point["raw_bytes"] = int(point["settings"]["mem"]) * pixels
    equal = {
        f"{name} at {point['bytes']} bytes": equal_bytes(curves["BER"], point["accuracy"]["mean"])
        for name in MADE
        for point in curves[name]
    }
    for text, found in equal.items():
        told = "more than BER was given" if found is None else f"{found:,.0f} bytes of BER"
        print(f"{text}: {told}")
    stream = "Split digits (smoke)" if options.smoke else "Split MNIST, two classes at a time"
    draw(curves, stream, options.out / "memory.png")
    record = {
        "stream": stream, "seeds": seeds, "versions": versions(), "commit": commit(),
        "curves": curves, "equal_bytes_of_ber": equal,
    }  # fmt: skip
    (options.out / "memory.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    print(f"memory.png and memory.json are in {options.out}")


if __name__ == "__main__":
    main()
