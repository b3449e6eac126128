"""Run folders made of invented numbers, without training."""

from __future__ import annotations

import json
import random

from avalanche_ext.evaluation.accuracy_matrix import (
    average_accuracy,
    average_incremental_accuracy,
    forgetting,
)
from avalanche_ext.evaluation.tables import COLUMNS, aggregate
from avalanche_ext.recipes import find_recipe
from avalanche_ext.recipes.settings import to_json

VERSIONS = {"avalanche_ext": "0.1.0", "torch": "2.9", "avalanche-lib": "0.6.0", "numpy": "2"}
SYSTEMS = ("naive/split_digits", "er/split_digits", "drl_ber/split_digits")  # the main one last


def dump(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))


def invented(draw, recipe, seed, experiences, classes, columns):
    n = experiences if columns is None else columns
    matrix = [
        [draw.random() if j <= i or n == 1 else 0.0 for j in range(n)] for i in range(experiences)
    ]
    return {
        "recipe": recipe, "seed": seed, "accuracy_matrix": matrix,
        "average_accuracy": average_accuracy(matrix),
        "average_incremental_accuracy": average_incremental_accuracy(matrix),
        "forgetting": forgetting(matrix) if n > 1 or experiences == 1 else 0.0,
        "seconds": 10 * draw.random(), "samples_trained": 1000, "bytes_remembered": 2048,
        "parameters": 17610,
        "seconds_per_experience": [draw.random() for _ in range(experiences)],
        "per_class_accuracy": [None, *(draw.random() for _ in range(classes - 1))],
        "peak_rss_bytes": 5 * 2**20, "peak_device_bytes": None, "flops_per_sample": 34_800,
    }  # fmt: skip


def write_run(
    folder, *, seeds=(0, 1, 2), systems=SYSTEMS, experiences=4, classes=10, columns=None,
    settings=None, results=True, versions=VERSIONS, device="cpu",
):  # fmt: skip
    """Write a finished run; ``settings`` changes recorded recipes, by name. Gives the summary."""
    draw = random.Random(len(systems))
    rows, main = [], systems[-1]
    for name in systems:
        home = folder if name == main else folder / "baselines" / name.replace("/", "__")
        made = [invented(draw, name, s, experiences, classes, columns) for s in seeds]
        if results:
            for result in made:
                dump(home / f"seed_{result['seed']}" / "result.json", result)
        recorded = {
            **to_json(find_recipe(name)),
            "seeds": list(seeds),
            **(settings or {}).get(name, {}),
        }
        dump(home / "recipe.json", recorded)
        rows.append(
            {
                "title": recorded["method"].upper(), "recipe": name, "seeds": len(seeds),
                **{f: aggregate([r[f] for r in made]) for f, *_ in COLUMNS},
                "parameters": 17610,
                "accuracy_matrices": [r["accuracy_matrix"] for r in made],
            }
        )  # fmt: skip
    summary = {"recipe": main, "device": device, "versions": versions, "rows": rows}
    dump(folder / "summary.json", summary)
    return summary


def published(value, deviation=None, quantity="average_accuracy", source="Table 2"):
    return {"quantity": quantity, "value": value, "deviation": deviation, "source": source}
