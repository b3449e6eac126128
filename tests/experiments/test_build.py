"""From a recipe to its strategy: which head it has."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from avalanche_ext.experiments.build import build_model, build_strategy
from avalanche_ext.models.heads import FixedSizeClassifier
from avalanche_ext.recipes import find_recipe


def growing(name):
    return dataclasses.replace(find_recipe(name).smoke(), head="growing")


@pytest.mark.parametrize("backbone", ["mlp", "small_convnet"])
def test_a_growing_head_has_the_units_of_the_classes_trained_on(backbone):
    recipe = dataclasses.replace(growing("naive/split_digits"), backbone=backbone)
    benchmark = recipe.benchmark.build(0)
    torch.manual_seed(0)
    strategy = build_strategy(recipe)
    x = torch.rand(3, 1, 8, 8)
    for k, experience in enumerate(benchmark.train_stream):
        strategy.train(experience, eval_streams=[])
        with torch.no_grad():
            logits = strategy.model.eval()(x)
        assert logits.shape == (3, 10)
        known = 2 * (k + 1)
        assert (logits[:, known:] == -1000).all()
        assert (logits[:, :known] > -1000).all()


def test_a_fixed_head_has_all_units_from_the_start():
    model = build_model(find_recipe("naive/split_digits"))
    assert not any(isinstance(m, FixedSizeClassifier) for m in model.modules())
    assert (model(torch.rand(3, 1, 8, 8)) > -1000).all()


def test_methods_and_benchmarks_with_their_own_heads_say_so():
    with pytest.raises(ValueError, match="makes its own heads; got head='growing'"):
        build_strategy(growing("expandable_der/split_digits"))
    with pytest.raises(ValueError, match="one for each experience"):
        build_model(growing("hat/split_digits"))
    with pytest.raises(ValueError, match="head 'fixed' or 'growing'; got 'other'"):
        dataclasses.replace(find_recipe("naive/split_digits"), head="other")
