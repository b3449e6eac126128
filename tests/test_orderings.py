"""What DRL + BER is good for, on real MNIST: the orderings of the small protocol, with margins."""

from __future__ import annotations

import dataclasses
import statistics

import pytest
from avalanche.training.determinism.rng_manager import RNGManager
from avalanche.training.plugins import EvaluationPlugin

from avalanche_ext import MLP, BERPlugin, DRLPlugin, SparsityMetrics
from avalanche_ext.benchmarks import split_mnist
from avalanche_ext.experiments.build import build_strategy
from avalanche_ext.experiments.run import run_seed
from avalanche_ext.recipes import find_recipe
from tests.conftest import naive

SEEDS = (0, 1, 2)


@pytest.fixture(scope="module")
def accuracy(tmp_path_factory):
    """Final accuracy in per cent of each method, over the same seeds, 300 exemplars in all."""

    def measure(method, **changes):
        recipe = find_recipe(f"{method}/split_mnist_small")
        recipe = dataclasses.replace(recipe, **changes)
        folder = tmp_path_factory.mktemp(method)
        return [100 * run_seed(recipe, s, folder / f"s{s}")["average_accuracy"] for s in SEEDS]

    return measure


@pytest.mark.slow
@pytest.mark.data
def test_drl_ber_beats_ber_beats_er_beats_naive(mnist_root, accuracy):
    values = {m: accuracy(m) for m in ("naive", "er", "ber", "drl_ber", "drl")}
    mean = {method: statistics.fmean(v) for method, v in values.items()}
    assert mean["drl_ber"] - mean["ber"] >= 1.0
    assert mean["ber"] - mean["er"] >= 1.5
    assert mean["er"] - mean["naive"] >= 40
    assert all(a > b for a, b in zip(values["drl_ber"], values["ber"], strict=True))
    assert abs(mean["drl"] - mean["naive"]) < 2  # without replay DRL does not help


@pytest.mark.slow
@pytest.mark.data
def test_the_printed_sign_diverges_where_the_authors_sign_trains(mnist_root):
    """At lr 0.05 and lam 1e-3 with BER the printed form fails before its 400th step."""
    benchmark = split_mnist(train_per_experience=1000, root=mnist_root)
    for form in ("drl", "eq3"):
        strategy = naive(
            MLP(784, (100, 100), 10), [DRLPlugin(1e-3, form=form), BERPlugin(300)],
            lr=0.05, batch=10,
        )  # fmt: skip

        def train(strategy=strategy):
            for experience in benchmark.train_stream:
                strategy.train(experience, eval_streams=[])

        if form == "drl":
            train()
        else:
            with pytest.raises(ValueError, match='form="eq3"'):
                train()
            assert strategy.clock.train_iterations < 400


@pytest.fixture(scope="module")
def selfless(tmp_path_factory):
    """Average accuracy in per cent after five permutations of MNIST, 10,000 images each."""

    def measure(name, **changes):
        recipe = dataclasses.replace(find_recipe(f"{name}/permuted_mnist_5_small"), **changes)
        folder = tmp_path_factory.mktemp(name)
        return [100 * run_seed(recipe, s, folder / f"s{s}")["average_accuracy"] for s in SEEDS]

    return measure


@pytest.mark.slow
@pytest.mark.data
def test_selfless_learning_makes_room_for_later_tasks(mnist_root, selfless):
    """The safe orderings of the specification, at MAS 0.1, margins about half of what it found."""
    keys = ("naive", "mas", "slni", "slnid", "l1_rep", "decov", "orthreg", "l2_decay", "l1_param")
    values = {key: selfless(key) for key in keys}
    mean = {key: statistics.fmean(v) for key, v in values.items()}
    assert mean["mas"] - mean["naive"] >= 5
    assert mean["slni"] - mean["mas"] >= 2
    assert all(a > b for a, b in zip(values["slni"], values["mas"], strict=True))
    assert mean["slnid"] - mean["mas"] >= 1.5
    assert min(mean[key] for key in ("slni", "slnid", "l1_rep", "decov")) > mean["orthreg"]
    assert mean["orthreg"] > mean["mas"]
    assert abs(mean["l2_decay"] - mean["mas"]) <= 1
    assert abs(mean["l1_param"] - mean["mas"]) <= 1


@pytest.mark.slow
@pytest.mark.data
def test_inhibition_helps_ewc_too_and_leaves_few_units_active(mnist_root, selfless):
    ewc = {"importance": "ewc", "anchor_lam": find_recipe("ewc/split_digits").lam}
    plain = selfless("slni", **ewc, lam=0.0)
    inhibited = selfless("slni", **ewc, lam=2e-3)
    assert statistics.fmean(inhibited) - statistics.fmean(plain) >= 1.5
    shares = {}
    for key in ("mas", "slni"):
        recipe = find_recipe(f"{key}/permuted_mnist_5_small")
        RNGManager.set_random_seeds(0)
        sparsity = SparsityMetrics()
        evaluator = EvaluationPlugin(sparsity, loggers=[], strict_checks=False)
        strategy = build_strategy(recipe, evaluator=evaluator)
        benchmark = recipe.benchmark.build(0)
        strategy.train(benchmark.train_stream[0], eval_streams=[])
        strategy.eval(benchmark.test_stream[:1])
        active = [v for n, v in sparsity.result().items() if n.startswith("ActiveShare")]
        shares[key] = statistics.fmean(active)
    assert shares["slni"] <= 0.6 * shares["mas"]
