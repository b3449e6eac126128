"""A file, a command line and a call in Python that say the same give the same recipe."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from avalanche_ext.recipes import RECIPES, find_recipe, load_recipe, with_settings
from avalanche_ext.recipes.settings import completed, to_json
from avalanche_ext.recipes.streams import BENCHMARKS, SplitCIFAR100, SplitDigits, SplitMNIST

YAML = """
like: drl_ber/split_digits
lr: 5e-2
hidden: [64, 32]
max_groups: 3
benchmark:
  n_experiences: 2
  validation: true
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(YAML)
    return path


def test_a_file_equals_the_same_settings_as_text_and_in_python(file):
    text = {
        "lr": "5e-2", "hidden": "[64, 32]", "max_groups": "3", "benchmark.n_experiences": "2",
        "benchmark.validation": "true",
    }  # fmt: skip
    value = {
        "lr": 0.05, "hidden": (64, 32), "max_groups": 3,
        "benchmark": {"n_experiences": 2, "validation": True},
    }  # fmt: skip
    start = find_recipe("drl_ber/split_digits")
    expected = dataclasses.replace(
        start, lr=0.05, hidden=(64, 32), max_groups=3,
        benchmark=dataclasses.replace(start.benchmark, n_experiences=2, validation=True),
    )  # fmt: skip
    assert find_recipe(str(file)) == expected
    assert with_settings(start, text) == expected
    assert with_settings(start, value) == expected
    assert load_recipe("drl_ber/split_digits", text)[0] == expected


def test_baselines_share_what_a_file_and_a_command_line_change(file):
    recipe, baselines = load_recipe(str(file), {"lr": "0.2"}, seeds=[4, 4, 5])
    assert [b.name for b in baselines] == list(recipe.baselines)
    for member in (recipe, *baselines):
        assert (member.lr, member.hidden, member.benchmark.n_experiences) == (0.2, (64, 32), 2)
        assert member.seeds == (4, 5)
    assert {b.method for b in baselines} == {"naive", "er"}


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_survives_its_own_record(name, tmp_path):
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(to_json(RECIPES[name])))
    assert find_recipe(str(path)) == RECIPES[name]


def test_a_file_may_change_the_kind_of_benchmark(tmp_path):
    path = tmp_path / "mine.yml"
    path.write_text(
        "like: er/split_digits\nname: er/mine\nbenchmark: {augment: false, kind: SplitCIFAR100}"
    )
    recipe = find_recipe(str(path))
    assert recipe.name == "er/mine"
    assert recipe.benchmark == SplitCIFAR100(augment=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr: 0.1", "expects 'like: RECIPE'"),
        ("- 1\n- 2", "got list"),
        ("like: er/split_digit", "there is no recipe 'er/split_digit'. Close: er/split_digits"),
        ("like: er/split_digits\nlearning_rate: 1", "no field 'learning_rate'"),
        ("like: er/split_digits\nlr: fast", "'lr' expects float; got 'fast'"),
        ("like: er/split_digits\nlr: {a: 1}", "no fields of its own"),
        ("like: er/split_digits\nbenchmark: 3", "is a group"),
        ("like: er/split_digits\nbenchmark: {kind: SplitDigit}", "Close: SplitDigits"),
        ("like: er/split_digits\nlr: null", "'lr' expects float; got None"),
        ("a: [", "neither YAML nor JSON"),
    ],
)
def test_a_wrong_file_says_what_is_wrong(text, message, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        find_recipe(str(path))


def test_an_absent_file_is_named():
    with pytest.raises(FileNotFoundError, match=r"absent\.yaml"):
        find_recipe("absent.yaml")


# seeds ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seeds", "orders", "runs"),
    [
        ((0, 1), (), ((0, None), (1, None))),
        ((0, 1), (7,), ((0, 7), (1, 7))),
        ((3,), (7, 8), ((3, 7), (3, 8))),
        ((0, 1), (7, 8), ((0, 7), (1, 8))),
    ],
)
def test_seeds_of_initialisation_and_order_pair_up(seeds, orders, runs):
    recipe = find_recipe("er/split_digits")
    assert dataclasses.replace(recipe, seeds=seeds, order_seeds=orders).runs == runs


def test_seeds_that_do_not_pair_up_are_an_error():
    recipe = find_recipe("er/split_digits")
    for change in ({"seeds": (0, 1, 2), "order_seeds": (1, 2)}, {"seeds": ()}):
        with pytest.raises(ValueError, match="one for each seed"):
            dataclasses.replace(recipe, **change)


def test_the_orders_seed_moves_the_classes_and_nothing_else():
    settings = SplitDigits()
    plain, moved = settings.build(0), settings.build(0, order_seed=5)
    order = np.random.RandomState(5).permutation(10)
    assert settings.ordered(5) == tuple(order)
    for k in range(5):
        # Label 2k of the moved stream is the k-th pair's first digit in the plain one.
        digit = int(order[2 * k])
        y = plain.train_stream[digit // 2].dataset.targets
        theirs = plain.train_stream[digit // 2].dataset
        x = [theirs[i][0] for i in range(len(y)) if y[i] == digit]
        mine = moved.train_stream[k].dataset
        ours = [mine[i][0] for i in range(len(mine)) if mine.targets[i] == 2 * k]
        assert len(x) == len(ours)
        assert all(bool((a == b).all()) for a, b in zip(x, ours, strict=True))


def test_seed_1993_is_the_order_of_the_literature():
    order = SplitCIFAR100().ordered(1993)
    assert order is not None
    assert order[:6] == (68, 56, 78, 8, 23, 84)
    assert sorted(order) == list(range(100))


def test_the_range_of_values_is_that_of_normalised_images():
    assert SplitMNIST().value_range == (0, 1)
    assert BENCHMARKS["SplitSVHN"]().value_range == (-1, 1)
    low, high = SplitCIFAR100().value_range
    assert low == pytest.approx(-0.4867 / 0.2565)
    assert high == pytest.approx((1 - 0.4408) / 0.2761)
    toy = BENCHMARKS["ToyCORe50"](objects=10, frames=2)
    x = torch.stack([x for x, *_ in toy.build(0).train_stream[0].dataset])
    assert toy.value_range[0] - 1e-5 <= float(x.min()) < float(x.max()) <= toy.value_range[1] + 1e-5


def test_published_orders_are_the_first_order_seeds():
    settings = SplitCIFAR100(orders="podnet_cifar100")
    starts = [settings.ordered(seed)[:6] for seed in (1, 2, 3)]  # type: ignore[index]
    assert starts == [(87, 0, 52, 58, 44, 91), (58, 30, 93, 69, 21, 77), (71, 54, 45, 32, 4, 8)]
    assert all(sorted(settings.ordered(seed) or ()) == list(range(100)) for seed in (1, 2, 3))
    assert settings.ordered(4) == SplitCIFAR100().ordered(4)
    assert SplitCIFAR100().ordered(1) != settings.ordered(1)
    with pytest.raises(ValueError, match=r"no orders 'podnet'.*podnet_cifar100"):
        SplitCIFAR100(orders="podnet").ordered(1)


def test_the_recipes_of_expandable_der_on_cifar100_take_the_papers_orders():
    recipe = find_recipe("expandable_der/cifar100_b0_10")
    assert recipe.runs == ((0, 1), (1, 2), (2, 3))
    table = [recipe, *(find_recipe(name) for name in recipe.baselines)]
    last = {r.name.split("_b0_10")[1]: {p.quantity: p.value for p in r.published} for r in table}
    assert last[""]["average_accuracy"] == 0.6534
    assert last["_expandable"]["average_accuracy"] == 0.4081
    assert last["_no_auxiliary"]["average_incremental_accuracy_samples"] == 0.7326
    assert last["_pruned"]["parameters_mean"] == 4_960_000
    assert {r.epochs for r in table} == {170}
    assert {r.mem for r in table} == {2000}  # type: ignore[attr-defined]


def test_a_recorded_recipe_gains_the_fields_that_came_later():
    recorded = to_json(find_recipe("er/split_mnist"))
    old = {k: v for k, v in recorded.items() if k not in ("backbone", "order_seeds", "freeze")}
    old["benchmark"] = {k: v for k, v in old["benchmark"].items() if k != "class_order"}
    assert completed(old) == recorded
    assert completed({**old, "lr": 7.0})["lr"] == 7.0
    latent = to_json(find_recipe("latent_replay/split_mnist"))
    assert completed({k: v for k, v in latent.items() if k != "slow"}) == latent  # its kind's own
    assert SplitMNIST().n_outputs == 10


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0), ("epochs", -1), ("batch_size", 0), ("warmup_epochs", -5), ("lr", -0.1),
        ("lr", math.nan), ("momentum", -1.0), ("weight_decay", math.inf), ("milestones", (-5,)),
        ("milestones", (3, 2)),
    ],
)  # fmt: skip
def test_numbers_out_of_range_are_refused(field, value):
    with pytest.raises(ValueError, match=rf"er/split_digits: expected .*{field} .*got"):
        dataclasses.replace(find_recipe("er/split_digits"), **{field: value})
