"""Every recipe whose data are at hand trains on two experiences and is tested, with few images."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import pytest
from avalanche.benchmarks.datasets import default_dataset_location
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.training.determinism.rng_manager import RNGManager
from avalanche.training.plugins import EvaluationPlugin

from avalanche_ext.experiments.build import build_strategy
from avalanche_ext.recipes import RECIPES, find_recipe

pytestmark = pytest.mark.data

# By benchmark: where Avalanche has it, or nothing if it is drawn. Others are in no test.
DATA = {
    "SplitDigits": None, "ToyCORe50": None, "SplitMNIST": "MNIST", "PermutedMNIST": "MNIST",
    "SplitCIFAR100": "cifar100.npz",
}  # fmt: skip
NAMES = [n for n, r in RECIPES.items() if type(r.benchmark).__name__ in DATA]
NAMES.sort(key=lambda name: repr(RECIPES[name].benchmark))  # what shares a benchmark, together


@functools.lru_cache(maxsize=4)
def benchmark(settings):
    return settings.build(0)


@pytest.mark.filterwarnings("ignore:the generator has collapsed")  # after a step or two
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if "cifar" in n else []) for n in NAMES],
)
def test_a_recipe_trains_and_is_tested(name):
    recipe = find_recipe(name).smoke()
    data = DATA[type(recipe.benchmark).__name__]
    if data and not (Path(default_dataset_location("")) / data).exists():
        pytest.skip(f"{data} is not in Avalanche's data folder")
    stream = benchmark(recipe.benchmark)
    RNGManager.set_random_seeds(0)
    metrics = EvaluationPlugin(accuracy_metrics(stream=True), strict_checks=False)
    strategy = build_strategy(recipe, evaluator=metrics)
    for experience in stream.train_stream[:2]:
        strategy.train(experience, eval_streams=[])
    found = strategy.eval(stream.test_stream[:1])
    [accuracy] = [value for key, value in found.items() if key.startswith("Top1_Acc_Stream/eval")]
    assert math.isfinite(accuracy)
    assert 0 <= accuracy <= 1
