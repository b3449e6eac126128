"""Mistakes in the set-up become errors that say what was expected and what came."""

from __future__ import annotations

import copy
import pickle
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from avalanche_ext import BERPlugin, DRLPlugin
from avalanche_ext.catalog import CATALOG
from avalanche_ext.experiments.build import build_strategy
from avalanche_ext.models.mlp import MLP
from avalanche_ext.training.checks import (
    check_experience,
    check_labels_fit,
    check_nonnegative,
    check_one_of,
)
from tests.conftest import class_stream, naive


@pytest.mark.parametrize("value", [0, 0.0, 3, 1e-12, np.float32(0.5), np.int64(2)])
def test_finite_numbers_from_zero_up_are_accepted(value):
    assert check_nonnegative("Owner", lam=value) is None


@pytest.mark.parametrize("value", [-1, -1e-12, float("nan"), float("inf"), -float("inf")])
def test_negative_and_not_finite_numbers_are_refused(value):
    with pytest.raises(ValueError, match=rf"Owner expects a finite lam >= 0; got lam={value}\."):
        check_nonnegative("Owner", ok=1, lam=value)


@pytest.mark.parametrize("value", [True, False, "1", None, [1.0], 1j])
def test_what_is_not_a_number_is_a_type_error(value):
    with pytest.raises(TypeError, match="Owner expects a number lam >= 0; got"):
        check_nonnegative("Owner", lam=value)


def test_one_of_lists_what_is_allowed():
    assert check_one_of("Owner", "pool", None, (None, "gap")) is None
    with pytest.raises(ValueError, match=r"Owner expects pool to be one of \[None, 'gap'\]; got 3"):
        check_one_of("Owner", "pool", 3, (None, "gap"))


def test_an_empty_experience_is_named_by_its_index():
    experience = SimpleNamespace(dataset=[], current_experience=4)
    with pytest.raises(ValueError, match="experience 4 of the training stream is empty"):
        check_experience(SimpleNamespace(experience=experience))
    experience.dataset = [0]
    assert check_experience(SimpleNamespace(experience=experience)) is None


def strategy(output, classes=None, labels=(0,)):
    experience = SimpleNamespace(classes_in_this_experience=classes)
    return SimpleNamespace(mb_output=output, mb_y=torch.tensor(labels), experience=experience)


@pytest.mark.parametrize("classes", [[0, 2], {2}, None, []])
def test_labels_that_fit_the_head_are_accepted(classes):
    assert check_labels_fit(strategy(torch.zeros(2, 3), classes, labels=(0, 2))) is None


@pytest.mark.parametrize(
    ("classes", "labels", "named"),
    [
        ([0, 3], (0, 1), "labels 0 to 3"),  # also where the first batch lacks the label
        (None, (1, 3), "labels 1 to 3"),
        ({-1, 2}, (2, 2), "labels -1 to 2"),
    ],
)
def test_labels_outside_the_head_are_refused(classes, labels, named):
    with pytest.raises(ValueError, match=rf"{named}, .* 3 units \(labels 0 to 2\)"):
        check_labels_fit(strategy(torch.zeros(2, 3), classes, labels))


@pytest.mark.parametrize("output", [torch.zeros(2), torch.zeros(2, 3, 4, 4), {"a": 1}])
def test_outputs_that_are_no_class_scores_are_not_judged(output):
    assert check_labels_fit(strategy(output, [0, 99])) is None


# every plugin ------------------------------------------------------------------------------------


def plugins_of(key):
    """The method's plugins in its smallest recipe, and that recipe."""
    recipe = next(r for r in CATALOG[key].recipes if "split_digits" in r.name).smoke()
    return CATALOG[key].build(recipe), recipe


OURS = sorted(
    key for key, card in CATALOG.items()
    if card.make is None and not key.startswith("hat")
    and any(type(p).__module__.startswith("avalanche_ext.") for p in plugins_of(key)[0])
)  # fmt: skip


@pytest.mark.parametrize("key", OURS)
def test_labels_outside_the_head_are_refused_by_every_plugin(key):
    _, recipe = plugins_of(key)
    torch.manual_seed(0)
    strategy = build_strategy(recipe)
    experience = recipe.benchmark.build(0).train_stream[0]
    for name in ("classifier",):
        head = getattr(strategy.model, name)
        if not isinstance(head, torch.nn.Linear):
            pytest.skip("a head that grows, or one for each task")
        setattr(strategy.model, name, torch.nn.Linear(head.in_features, 1))
    with pytest.raises(ValueError, match=r"labels 0 to \d, .* 1 units"):
        strategy.train(experience, eval_streams=[])


def learn(plugin, n=2, seed=0):
    torch.manual_seed(seed)
    strategy = naive(MLP(8, (16,), 6), [plugin])
    for experience in class_stream().train_stream[:n]:
        strategy.train(experience, eval_streams=[])
    return strategy


@pytest.mark.parametrize("make", [lambda: BERPlugin(10), lambda: DRLPlugin(1e-2)])
def test_a_second_strategy_with_the_same_plugin_is_warned_of(make):
    plugin = make()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "this .* has been trained")
        strategy = learn(plugin)
        going_on = pickle.loads(pickle.dumps(strategy)), copy.deepcopy(strategy)
        for one in (strategy, *going_on):
            one.train(class_stream().train_stream[2], eval_streams=[])
        learn(copy.deepcopy(plugin), n=1)  # a copy is meant to go on
    with pytest.warns(UserWarning, match=rf"this {type(plugin).__name__} has been trained with an"):
        learn(plugin, n=1)


def test_outputs_of_a_regression_are_no_class_scores():
    torch.manual_seed(0)
    strategy = naive(MLP(8, (16,), 1), [DRLPlugin(0.0)])
    strategy._criterion = lambda z, y: (z[:, 0] - y).square().mean()
    strategy.train(class_stream().train_stream[1], eval_streams=[])
