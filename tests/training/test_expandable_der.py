"""ExpandableDER: schedule, losses, the second stage, resuming."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from avalanche.training.determinism.rng_manager import RNGManager
from avalanche.training.plugins import SupervisedPlugin
from torch.nn import functional as F

from avalanche_ext import (
    ChannelMasks,
    ClassifierStage,
    CompilePlugin,
    DRLPlugin,
    ExpandableDER,
    Schedule,
    build_backbone,
)
from avalanche_ext.benchmarks import split_digits
from avalanche_ext.evaluation.accounting import bytes_by_kind
from avalanche_ext.experiments.build import build_strategy
from avalanche_ext.experiments.checkpoint import Checkpoints
from avalanche_ext.experiments.run import run_seed
from avalanche_ext.recipes import find_recipe
from avalanche_ext.recipes.streams import SplitDigits
from tests.conftest import class_stream

PAPER = Schedule(0.1, 10, (100, 120))


@pytest.mark.parametrize(
    ("epoch", "rate"),
    [(0, 0.01), (4, 0.05), (9, 0.1), (10, 0.1), (109, 0.1), (110, 0.01), (129, 0.01),
     (130, 0.001), (169, 0.001)],
)  # fmt: skip
def test_the_papers_learning_rates(epoch, rate):
    assert PAPER.at(epoch) == pytest.approx(rate)


def strategy_of(plugins=(), shape=(8,), **options):
    RNGManager.set_random_seeds(0)
    given = {
        "mem": 18, "train_epochs": 3, "train_mb_size": 8, "eval_mb_size": 64, "evaluator": None,
        "schedule": Schedule(0.05, 1, (2,)), "momentum": 0.9,
        "classifier_stage": ClassifierStage(2, Schedule(0.05, 0, (1,)), 5.0), **options,
    }  # fmt: skip
    backbone = options.pop("backbone", None) or build_backbone("mlp", 0, shape, hidden=(7,))
    given.pop("backbone", None)
    return ExpandableDER(backbone=backbone, plugins=list(plugins), **given)


class Watch(SupervisedPlugin):
    """Recompute the loss of every step from its definition."""

    def __init__(self):
        super().__init__()
        self.rates, self.differences, self.trained, self.scales = [], [], [], []

    def before_backward(self, strategy, **kwargs):
        model = strategy.model
        self.scales.append(None if model.gates is None else float(model.gates.s))
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
        if model.gates is not None:  # one linear layer of 8 inputs and 7 channels
            e, scale = model.gates.embeddings[0], float(model.gates.s)
            kept = 8 * torch.sigmoid(scale * e).sum() / 56
            loss = loss + strategy.prune.lam * kept
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


def test_with_masks_every_steps_loss_is_the_definitions():
    watch = Watch()
    strategy = strategy_of([watch], prune=ChannelMasks(lam=0.3, s_max=10.0))
    stream = class_stream(3).train_stream
    strategy.train(stream[0])
    assert max(watch.differences) < 1e-5
    # Five batches of an epoch: from 1/10 to 10.
    assert watch.scales[:5] == pytest.approx([0.1, 2.575, 5.05, 7.525, 10.0])
    weights, gates = strategy.optimizer.param_groups
    assert (weights["weight_decay"], gates["weight_decay"]) == (5e-4, 0.0)
    assert gates["lr"] == pytest.approx(10 * weights["lr"])
    for experience in stream[1:]:
        strategy.train(experience)
    assert max(watch.differences) < 1e-5
    assert all(watch.trained)


def masked(**options):
    settings = {"lam": 1.0, "s_max": 30.0, "lr_factor": 10.0, **options}
    backbone = build_backbone("small_convnet", 0, (1, 8, 8))
    return strategy_of(backbone=backbone, prune=ChannelMasks(**settings), mem=60, train_mb_size=32)


def test_pruning_keeps_what_the_hard_masks_gave(monkeypatch):
    strategy, x, seen = masked(recalibrate=False), torch.rand(6, 1, 8, 8), []
    settle = strategy.model.settle

    def watched():
        model = strategy.model.eval()
        features, z = model.super_feature(x), model(x)
        dense = copy.deepcopy(model.gates.network.state_dict())
        kept = model.gates.kept()[model.gates.groups.output]
        shares = settle()
        after = model.super_feature(x)
        base = sum(model.widths[:-1])
        closed = torch.ones(features.shape[1] - base, dtype=torch.bool)
        closed[kept] = False
        assert features[:, base:][:, closed].abs().max() == 0
        new = torch.cat([features[:, :base], features[:, base:][:, kept]], 1)
        torch.testing.assert_close(after, new, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model(x), z, atol=1e-5, rtol=1e-5)
        seen.append((dense, len(kept)))
        model.train()
        return shares

    monkeypatch.setattr(strategy.model, "settle", watched)
    stream = split_digits(5).train_stream
    width = strategy.model.width
    for k, experience in enumerate(stream[:3]):
        if k == 2:  # the third extractor starts from the second one before its surgery
            grow = strategy.model.grow

            def grown(classes, grow=grow):
                grow(classes)
                now = strategy.model.gates.network.state_dict()
                assert all(torch.equal(now[name], v) for name, v in seen[1][0].items())

            monkeypatch.setattr(strategy.model, "grow", grown)
        strategy.train(experience)
    widths = strategy.model.widths
    assert widths == [n for _, n in seen]
    assert 0 < min(widths) < width
    assert strategy.model.classifier.in_features == sum(widths)
    assert [list(shares.values())[-1] * width for shares in strategy.channels_kept] == widths
    # The weights that the next extractor would start from are kept, and counted.
    dense = sum(v.nbytes for v in seen[2][0].values())
    assert bytes_by_kind(strategy)["networks"] == dense
    n = sum(p.numel() for p in strategy.model.extractors[0].parameters())
    assert n < sum(v.numel() for v in seen[0][0].values())


def test_statistics_are_measured_again_under_hard_masks():
    stream = split_digits(5).train_stream
    losses = {}
    for recalibrate in (False, True):
        strategy = masked(recalibrate=recalibrate, lam=0.3)
        strategy.train(stream[0])
        norm = next(m for m in strategy.model.extractors[0].modules()
                    if isinstance(m, torch.nn.BatchNorm2d))  # fmt: skip
        conv = next(m for m in strategy.model.extractors[0].modules()
                    if isinstance(m, torch.nn.Conv2d))  # fmt: skip
        x = torch.stack([stream[0].dataset[k][0] for k in range(len(stream[0].dataset))])
        mean = conv(x).mean((0, 2, 3))
        losses[recalibrate] = float((norm.running_mean - mean).abs().max().detach())
    assert losses[True] < 0.02 < losses[False]


@pytest.mark.parametrize("alters", [False, True])
def test_looking_ahead_gives_the_same_numbers(alters):
    stream = class_stream(3).train_stream

    class Doubles(SupervisedPlugin):
        """Alters a batch behind the look-ahead's back, in place or not."""

        def before_forward(self, strategy, **kwargs):
            if strategy.clock.train_exp_iterations % 3 == 1:
                strategy.mbatch[0] = strategy.mbatch[0] * 2
            elif strategy.clock.train_exp_iterations % 3 == 2:
                strategy.mbatch[0].mul_(2)

    results, calls = [], []
    for ahead in (1, 3):
        strategy = strategy_of([Doubles()] if alters else [], lookahead=ahead)
        frozen = strategy.model.old_features
        count = []
        strategy.model.old_features = lambda x, frozen=frozen, count=count: (
            count.append(len(x)),
            frozen(x),
        )[1]
        for experience in stream:
            strategy.train(experience)
        results.append(strategy.model.state_dict())
        calls.append(count)
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, atol=1e-5, rtol=1e-5)
    assert 24 not in calls[0]
    assert 24 in calls[1]  # three batches of eight


def test_frozen_parts_stay_bit_for_bit():
    recipe = dataclasses.replace(
        find_recipe("expandable_der/split_digits").smoke(), backbone="small_convnet"
    )
    strategy = build_strategy(recipe)
    stream = recipe.benchmark.build(0).train_stream
    strategy.train(stream[0])
    strategy.train(stream[1])
    model, x = strategy.model.eval(), torch.rand(4, 1, 8, 8)
    before = copy.deepcopy(model.extractors[0].state_dict())
    features = model.super_feature(x)
    strategy.train(stream[2])
    after = model.extractors[0].state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert len(model.extractors) == 3
    # The second one was folded when it was frozen: the same function up to rounding.
    assert not any("running_mean" in name for name in model.extractors[1].state_dict())
    n = features.shape[1]
    torch.testing.assert_close(model.eval().super_feature(x)[:, :n], features, atol=1e-5, rtol=1e-5)


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


def run(folder, kill_in_stage_two=False, every=None, **settings):
    recipe = dataclasses.replace(find_recipe("expandable_der/split_digits").smoke(), **settings)
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


@pytest.mark.parametrize(
    ("every", "settings"),
    [(None, {}), (2, {}), (None, {"prune": True, "backbone": "small_convnet"}),
     (2, {"prune": True, "backbone": "small_convnet", "lookahead": 3})],
)  # fmt: skip
def test_killed_in_the_second_stage_it_goes_on_to_the_same_weights(tmp_path, every, settings):
    whole = run(tmp_path / "whole", **settings)
    with pytest.raises(KilledError):
        run(tmp_path / "killed", kill_in_stage_two=True, every=every, **settings)
    resumed = run(tmp_path / "killed", every=every, **settings)
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


@pytest.mark.parametrize("prune", [None, ChannelMasks()])
def test_the_extractor_that_is_trained_is_compiled(prune):
    compiled = []

    def backend(graph, inputs):
        compiled.append(1)
        return graph.forward

    results = []
    for plugins in ([], [CompilePlugin(backend=backend)]):
        strategy = strategy_of(plugins, prune=prune)
        counts = []
        for experience in class_stream(3).train_stream[:2]:
            strategy.train(experience)
            counts.append(len(compiled))
        results.append(strategy.model.state_dict())
    assert 0 < counts[0] < counts[1]
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, atol=1e-5, rtol=1e-5)


def test_nothing_is_exported_under_the_name_that_avalanche_uses():
    import avalanche_ext

    assert not hasattr(avalanche_ext, "DER")


def test_the_first_experience_may_have_a_schedule_of_its_own():
    watch = Watch()
    strategy = strategy_of([watch], first_schedule=Schedule(0.3, 0, (1,)))
    for experience in class_stream(3).train_stream[:2]:
        strategy.train(experience)
    assert watch.rates[:15] == pytest.approx([0.3] * 5 + [0.03] * 10)
    assert watch.rates[15] == pytest.approx(0.05)


def test_a_run_trains_the_first_experience_for_its_own_epochs(tmp_path):
    recipe = dataclasses.replace(
        find_recipe("expandable_der/cifar100_b50_5"), benchmark=SplitDigits().smoke(),
        backbone="mlp", hidden=(5,), epochs=1, first_epochs=3, warmup_epochs=0, batch_size=40,
        classifier_epochs=0, mem=20, mem_per_class=None, order_seeds=(), published=(),
    )  # fmt: skip
    assert [recipe.epochs_of(k) for k in range(3)] == [3, 1, 1]
    result = run_seed(recipe, 0, tmp_path / "s")
    # Forty images each; 20, 20, 18 and 16 exemplars beside them.
    assert result["samples_trained"] == 3 * 40 + 4 * 40 + 20 + 20 + 18 + 16
    assert result["parameters_per_experience"] == [(65 * 5 + 5 * 2 * t) * t for t in range(1, 6)]


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Schedule(lr=math.nan), "finite lr"),
        (lambda: Schedule(lr=-0.1), "finite lr"),
        (lambda: Schedule(warmup_epochs=-1), "warmup_epochs"),
        (lambda: Schedule(milestones=(5, 2)), "ascending"),
        (lambda: ClassifierStage(epochs=-1), "finite epochs"),
        (lambda: ClassifierStage(temperature=0), "temperature > 0"),
        (lambda: ClassifierStage(temperature=math.nan), "finite temperature"),
        (lambda: ChannelMasks(lam=math.nan), "lam=nan"),
        (lambda: ChannelMasks(s_max=0.0, lr_factor=1.0), "s_max=0"),
        (lambda: ChannelMasks(min_share=1.5), "min_share=1.5"),
    ],
)
def test_settings_out_of_range_are_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize("name", ["prune", "schedule", "first_schedule", "classifier_stage"])
def test_settings_of_another_kind_are_refused(name):
    with pytest.raises(TypeError, match=rf"expects {name} to be a .* got 0.1"):
        ExpandableDER(backbone=build_backbone("mlp", 0, (8,)), **{name: 0.1})


def test_a_backbone_with_a_classifier_is_refused():
    strategy = ExpandableDER(backbone=build_backbone("mlp", 10, (8,)), train_mb_size=8)
    with pytest.raises(ValueError, match=r"ExpandableNet expects features \(B, 100\).*\(8, 10\)"):
        strategy.train(class_stream().train_stream[0], eval_streams=[])
