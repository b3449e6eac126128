"""All 391 experiences of the rendered NIC track: time per experience, from first to last.

Processor time of one thread, so that other work on the machine does not count. The recipes are
those of ``toy_core50_nic``; evaluation is left out. The methods take turns at every experience.
"""

from __future__ import annotations

import statistics
import time

from avalanche.training.determinism.rng_manager import RNGManager

from avalanche_ext.experiments.build import build_strategy
from avalanche_ext.recipes import find_recipe
from tests.perf.timing import arguments, record

METHODS = ("naive", "er", "drl_er", "ber", "drl_ber")
PART = 50


def main() -> None:
    options = arguments(__doc__.splitlines()[0])
    recipes = {method: find_recipe(f"{method}/toy_core50_nic") for method in METHODS}
    train_stream = list(recipes["naive"].benchmark.build(0).train_stream)
    strategies = {}
    for method, recipe in recipes.items():
        RNGManager.set_random_seeds(0)
        strategies[method] = build_strategy(recipe)
    seconds: dict[str, list[float]] = {method: [] for method in METHODS}
    for experience in train_stream[: 5 if options.quick else None]:
        for method, strategy in strategies.items():
            start = time.process_time()
            strategy.train(experience, eval_streams=[])
            seconds[method].append(time.process_time() - start)
    rows = []
    for method, values in seconds.items():
        later = values[1:]  # the first experience has ten times as many samples
        # BER reaches its bound of past experiences first.
        bound = recipes[method].max_groups if "ber" in method else 0
        begin = later[bound or 0 :]
        rows.append(
            {
                "method": method,
                "experiences": len(values),
                "first_ms": 1000 * statistics.median(begin[:PART]),
                "last_ms": 1000 * statistics.median(later[-PART:]),
                "ms": [round(1000 * v, 2) for v in values],
            }
        )
        print(
            f"{method:10} first {rows[-1]['first_ms']:7.1f} ms  last {rows[-1]['last_ms']:7.1f} ms"
        )
    record(options, "nic_stream", rows)


if __name__ == "__main__":
    main()
