"""Measure ratios in one run: variants interleaved, medians, the machine named."""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parents[2] / "examples" / "results" / "perf"


def interleaved(variants: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each variant; one round runs each of them once, after a warm-up round.

    Each round begins with another variant: what one leaves behind (freed memory, a warm cache)
    would otherwise always fall to the same one.
    """

    def timed(run: Callable[[], Any]) -> float:
        start = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start

    clocks = {name: functools.partial(timed, run) for name, run in variants.items()}
    seconds = interleaved_samples(clocks, repeats)
    return {name: statistics.median(values) for name, values in seconds.items()}


def interleaved_samples(
    variants: dict[str, Callable[[], Any]], repeats: int
) -> dict[str, list[Any]]:
    """What each variant returned, round by round, in rounds as in ``interleaved``."""
    found: dict[str, list[Any]] = {name: [] for name in variants}
    names = list(variants)
    for round_ in range(repeats + 1):
        first = round_ % len(names)
        for name in names[first:] + names[:first]:
            value = variants[name]()
            if round_:
                found[name].append(value)
    return found


def peak_bytes(prepare: Callable[..., Callable[[], Any]], *args: Any) -> int:
    """How far ``prepare(*args)()`` raises the peak resident memory, in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_raised_by, (prepare, args))


def _raised_by(prepare: Callable[..., Callable[[], Any]], args: tuple[Any, ...]) -> int:
    run = prepare(*args)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far (Linux)
    before = _peak()
    run()
    return _peak() - before


def _peak() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def arguments(description: str, parts: Sequence[str] = ()) -> argparse.Namespace:
    """``--threads``, ``--repeats``, ``--out``, ``--quick``; ``--part`` where there are parts."""
    parser = argparse.ArgumentParser(description=description)
    if parts:
        parser.add_argument("--part", choices=parts, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="small cells only, to see it run")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    return options


def record(
    options: argparse.Namespace, name: str, rows: list[dict[str, Any]], **facts: Any
) -> None:
    """Write ``OUT/name.json`` with what the figures depend on."""
    options.out.mkdir(parents=True, exist_ok=True)
    data = {
        "benchmark": name,
        "command": " ".join([f"python -m tests.perf.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": f"{platform.machine()}, {os.cpu_count()} cores, {options.threads} thread(s)",
        "repeats": options.repeats,
        **facts,
        "rows": rows,
    }
    path = options.out / f"{name}.json"
    path.write_text(json.dumps(data, indent=1) + "\n", "utf-8")
    print(path)
