"""ExpandableDER: schedule, losses, the second stage, resuming."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from avalanche.training.determinism.rng_manager import RNGManager
from avalanche.training.plugins import SupervisedPlugin
from torch.nn import functional as F

from avalanche_ext import ClassifierStage, DRLPlugin, ExpandableDER, Schedule, build_backbone
from avalanche_ext.experiments.checkpoint import Checkpoints
from avalanche_ext.experiments.run import build_strategy, run_seed
from avalanche_ext.recipes import find_recipe
from tests.conftest import class_stream

PAPER = Schedule(0.1, 10, (100, 120))


@pytest.mark.parametrize(
    ("epoch", "rate"),
    [(0, 0.01), (4, 0.05), (9, 0.1), (10, 0.1), (109, 0.1), (110, 0.01), (129, 0.01),
     (130, 0.001), (169, 0.001)],
)  # fmt: skip
def test_the_papers_learning_rates(epoch, rate):
    assert PAPER.at(epoch) == pytest.approx(rate)


def strategy_of(plugins=(), **options):
    RNGManager.set_random_seeds(0)
    given = {
        "mem": 18, "train_epochs": 3, "train_mb_size": 8, "eval_mb_size": 64, "evaluator": None,
        "schedule": Schedule(0.05, 1, (2,)), "momentum": 0.9,
        "classifier_stage": ClassifierStage(2, Schedule(0.05, 0, (1,)), 5.0), **options,
    }  # fmt: skip
    backbone = build_backbone("mlp", 0, (8,), hidden=(7,))
    return ExpandableDER(backbone=backbone, plugins=list(plugins), **given)


class Watch(SupervisedPlugin):
    """Recompute the loss of every step from its definition."""

    def __init__(self):
        super().__init__()
        self.rates, self.differences, self.trained = [], [], []

    def before_backward(self, strategy, **kwargs):
        model = strategy.model
        frozen = [f(strategy.mb_x) for f in list(model.extractors)[:-1]]
        new = model.extractors[-1](strategy.mb_x)
        z = torch.cat([*frozen, new], 1) @ model.classifier.weight.T
        y = torch.tensor([model.classes.index(int(c)) for c in strategy.mb_y])
        loss = F.cross_entropy(z, y)
        if frozen:
            old = [c for c in model.classes if c not in model.new_classes]
            labels = [0 if c in old else 1 + model.new_classes.index(c)
                      for c in strategy.mb_y.tolist()]  # fmt: skip
            loss = loss + strategy.auxiliary * F.cross_entropy(
                model.auxiliary(new), torch.tensor(labels)
            )
        self.differences.append(float((loss - strategy.loss).abs().detach()))
        self.rates.append(strategy.optimizer.param_groups[0]["lr"])
        held = {id(p) for g in strategy.optimizer.param_groups for p in g["params"]}
        live = {id(p) for p in model.parameters() if p.requires_grad}
        self.trained.append(held == live)


def test_every_steps_loss_is_the_definitions():
    watch = Watch()
    strategy = strategy_of([watch], auxiliary=0.7)
    for experience in class_stream(3).train_stream:
        strategy.train(experience)
    assert max(watch.differences) < 1e-5
    assert all(watch.trained)  # nothing frozen, nothing forgotten in the optimizer
    steps = 40 // 8
    assert watch.rates[: 3 * steps] == pytest.approx([0.05] * (3 * steps))  # warm-up of one epoch
    more = -(-58 // 8)
    assert watch.rates[3 * steps : 3 * steps + more] == pytest.approx([0.05] * more)


def test_frozen_parts_stay_bit_for_bit():
    recipe = dataclasses.replace(
        find_recipe("expandable_der/split_digits").smoke(), backbone="small_convnet"
    )
    strategy = build_strategy(recipe)
    stream = recipe.benchmark.build(0).train_stream
    strategy.train(stream[0])
    strategy.train(stream[1])
    before = copy.deepcopy(strategy.model.extractors.state_dict())
    strategy.train(stream[2])
    after = strategy.model.extractors.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert len(strategy.model.extractors) == 3


def test_stage_two_trains_the_classifier_alone_on_as_many_of_each_class(monkeypatch):
    strategy = strategy_of()
    stream = class_stream(3).train_stream
    strategy.train(stream[0])
    seen, before = [], {}
    plain = strategy._balanced

    def watched(draws):
        balanced = plain(draws)
        _, y = balanced.gather(torch.arange(len(balanced.place)), draws)
        seen.append(y)
        before.update(copy.deepcopy(strategy.model.extractors.state_dict()))
        return balanced

    monkeypatch.setattr(strategy, "_balanced", watched)
    strategy.train(stream[1])
    (y,) = seen
    # 9 exemplars of each old class, 20 samples of each new one: 9 of each.
    assert y.bincount().tolist() == [9, 9, 9, 9]
    after = strategy.model.extractors.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert len(strategy.memory) == 16  # 18 // 4 of each


def test_the_first_experience_has_neither_auxiliary_loss_nor_second_stage():
    results = []
    for options in ({"auxiliary": 1.0}, {"auxiliary": 0.0},
                    {"classifier_stage": ClassifierStage(0)}):  # fmt: skip
        strategy = strategy_of(**options)
        strategy.train(class_stream(3).train_stream[0])
        results.append(strategy.model.classifier.weight.detach().clone())
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_evaluation_before_training_and_in_between():
    recipe = find_recipe("expandable_der/split_digits").smoke()
    strategy = build_strategy(recipe)
    benchmark = recipe.benchmark.build(0)
    strategy.eval(benchmark.test_stream)
    strategy.train(benchmark.train_stream[0])
    strategy.eval(benchmark.test_stream)
    assert strategy.model.n_outputs == 10


class KilledError(Exception):
    pass


def run(folder, kill_in_stage_two=False, every=None):
    recipe = find_recipe("expandable_der/split_digits").smoke()
    benchmark = recipe.benchmark.build(0)
    RNGManager.set_random_seeds(5)
    strategy = build_strategy(recipe)
    checkpoints = Checkpoints(folder, strategy, benchmark, every=every)
    done = checkpoints.resume().get("done", 0)
    if kill_in_stage_two:
        gather = strategy._train_classifier

        def interrupted():
            if strategy.clock.train_exp_counter == 2:
                torch.rand(7)  # some way into it
                raise KilledError
            gather()

        strategy._train_classifier = interrupted
    for k, experience in enumerate(benchmark.train_stream):
        if k >= done:
            checkpoints.train(k, experience)
            checkpoints.save(k + 1, {"done": k + 1})
    return strategy


@pytest.mark.parametrize("every", [None, 2])
def test_killed_in_the_second_stage_it_goes_on_to_the_same_weights(tmp_path, every):
    whole = run(tmp_path / "whole")
    with pytest.raises(KilledError):
        run(tmp_path / "killed", kill_in_stage_two=True, every=every)
    resumed = run(tmp_path / "killed", every=every)
    ours, theirs = whole.model.state_dict(), resumed.model.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert whole.model.classes == resumed.model.classes
    x, y = (m.gather(m.index().slots)[0] for m in (whole.memory, resumed.memory))
    assert torch.equal(x, y)


@pytest.mark.slow
def test_it_beats_replay_on_one_network_with_the_same_exemplars(tmp_path):
    means = {}
    for name in ("expandable_der/split_digits", "shuffle_replay/split_digits_expandable"):
        home = tmp_path / name.split("/")[0]
        results = [run_seed(find_recipe(name), s, home / str(s)) for s in range(3)]
        means[name.split("/")[0]] = sum(r["average_accuracy"] for r in results) / 3
    assert means["expandable_der"] - means["shuffle_replay"] >= 0.01


def test_a_memory_smaller_than_the_number_of_classes_is_refused():
    strategy = strategy_of(mem=3)
    stream = class_stream(3).train_stream
    strategy.train(stream[0])
    with pytest.raises(ValueError, match="one sample for each of 4"):
        strategy.train(stream[1])


def test_drl_on_top_changes_the_loss_by_its_term():
    plain, with_drl = strategy_of(), strategy_of([DRLPlugin(lam=1e-2, layers="logits")])
    for strategy in (plain, with_drl):
        strategy.train(class_stream(3).train_stream[0])
    assert not torch.equal(plain.model.classifier.weight, with_drl.model.classifier.weight)


def test_nothing_is_exported_under_the_name_that_avalanche_uses():
    import avalanche_ext

    assert not hasattr(avalanche_ext, "DER")
