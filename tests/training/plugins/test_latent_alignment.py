"""Latent space alignment through Avalanche's own evaluation, beside embedders kept to compare."""

from __future__ import annotations

import copy
import pickle
import weakref

import pytest
import torch
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.models import MTSimpleMLP, as_multitask
from avalanche.training.plugins import EvaluationPlugin, EWCPlugin, LwFPlugin, SupervisedPlugin
from torch import nn

from avalanche_ext import DRLPlugin
from avalanche_ext.benchmarks.digits import split_digits
from avalanche_ext.evaluation.accounting import bytes_by_kind
from avalanche_ext.functional.linear_map import r_squared, ridge
from avalanche_ext.models.frozen import FrozenCopy
from avalanche_ext.models.mlp import MLP
from avalanche_ext.training.plugins.latent_alignment import LatentAlignmentPlugin
from avalanche_ext.training.plugins.precision import PrecisionPlugin
from tests.conftest import class_stream, naive
from tests.experiments import checkpoint_cases

pytestmark = pytest.mark.filterwarnings("ignore:No loggers")

MODELS = {
    "decorated": lambda: as_multitask(MLP(8, (16, 6), 2), "classifier"),
    "their_own": lambda: MTSimpleMLP(8, 6),
}


def benchmark(n=3):
    return class_stream(n, task_labels=True)


def run(plugins, *, model="decorated", n=3, seed=1, stream=None, **options):
    torch.manual_seed(seed)
    strategy = naive(MODELS[model](), plugins, **options)
    for experience in (stream or benchmark().train_stream)[:n]:
        strategy.train(experience, eval_streams=[])
    return strategy


def weights(strategy):
    return torch.cat([p.detach().flatten() for p in strategy.model.parameters()])


class Kept(SupervisedPlugin):
    """Embedders after each task, and what was predicted in evaluation."""

    def __init__(self):
        super().__init__()
        self.models, self.outputs = [], {}

    def after_training_exp(self, strategy, **kwargs):
        self.models.append(copy.deepcopy(strategy.model).eval())

    def after_eval_iteration(self, strategy, **kwargs):
        self.outputs[int(strategy.mb_task_id[0])] = (strategy.mb_x, strategy.mb_output)


@torch.no_grad()
def embed(model, x):
    inner = model.model if hasattr(model, "classifier_name") else model
    return inner.features(x)


@pytest.mark.parametrize("model", MODELS)
def test_predictions_are_those_of_heads_on_features_led_back(model):
    plugin, kept = LatentAlignmentPlugin(lam=0.1), Kept()
    strategy = run([plugin, kept], model=model)
    stream = benchmark()
    data = [torch.stack([x for x, *_ in e.dataset]) for e in stream.train_stream]
    bridges = [
        ridge(embed(kept.models[k + 1], data[k + 1]), embed(kept.models[k], data[k + 1]), 0.1)
        for k in range(2)
    ]
    strategy.eval(stream.test_stream)
    strategy.model.eval()
    for task in range(3):
        x, found = kept.outputs[task]
        u = embed(strategy.model, x)
        for weight, bias in reversed(bridges[task:]):
            u = u @ weight.T + bias
        want = strategy.model.classifier(u, task)
        torch.testing.assert_close(found[:, : want.shape[1]], want, atol=1e-4, rtol=1e-4)
        plain = strategy.model(x, torch.full((len(x),), task))
        assert torch.allclose(found, plain, atol=1e-3) == (task == 2)


def test_a_turned_embedding_predicts_as_before():
    """T13: the new embedder is the old one behind a rotation, so nothing is forgotten."""

    class Turn(SupervisedPlugin):
        def before_training_exp(self, strategy, **kwargs):
            if strategy.clock.train_exp_counter:
                layer = strategy.model.model.features[2]
                turn = torch.linalg.qr(torch.randn(6, 6))[0]
                with torch.no_grad():
                    layer.weight.copy_(turn @ layer.weight)
                    layer.bias.copy_(turn @ layer.bias)

    torch.manual_seed(0)
    model = MLP(8, (16, 6), 2)
    model.features[3] = nn.Identity()
    plugin, kept = LatentAlignmentPlugin(lam=0.0), Kept()
    strategy = naive(as_multitask(model, "classifier"), [plugin, Turn(), kept], lr=0.1)
    stream = benchmark()
    strategy.train(stream.train_stream[0], eval_streams=[])
    strategy.eval(stream.test_stream[0])
    before = kept.outputs[0][1]
    for group in strategy.optimizer.param_groups:
        group["lr"] = 0.0
    for experience in stream.train_stream[1:]:
        strategy.train(experience, eval_streams=[])
    strategy.eval(stream.test_stream[0])
    after = kept.outputs[0][1][:, : before.shape[1]]
    torch.testing.assert_close(after, before, atol=1e-3, rtol=1e-3)
    assert plugin.r2 == pytest.approx([1.0, 1.0], abs=1e-5)
    x = kept.outputs[0][0]
    assert not torch.allclose(strategy.model(x, 0)[:, : before.shape[1]], before, atol=0.1)


def test_training_is_naive_bit_for_bit():
    for options in ({}, {"bridge": "mlp"}, {"compose": "direct"}):
        assert torch.equal(weights(run([LatentAlignmentPlugin(**options)])), weights(run([])))


def test_the_old_embedder_goes():
    alive = []

    class Watch(SupervisedPlugin):
        def before_training_epoch(self, strategy, **kwargs):
            old = strategy.plugins[0]._old
            alive.append(old is not None and weakref.ref(old.module))

    strategy = run([LatentAlignmentPlugin(), Watch()])
    assert alive[0] is False
    assert [ref() for ref in alive[1:]] == [None, None]
    assert bytes_by_kind(strategy) == {
        "exemplars": 0, "networks": 2 * (6 * 6 + 6) * 4, "tensors": 0,
    }  # fmt: skip


def test_fits_and_errors_of_the_chain_are_told():
    found = {}

    class Logger:
        def log_metrics(self, values):
            for v in values:
                found.setdefault(v.name.split("/")[0], []).append(v.value)

        def __getattr__(self, name):
            return lambda *args, **kwargs: None

    evaluator = EvaluationPlugin(accuracy_metrics(stream=True))
    evaluator.loggers = [Logger()]
    plugin, kept = LatentAlignmentPlugin(), Kept()
    run([plugin, kept], evaluator=evaluator)
    x = torch.stack([x for x, *_ in benchmark().train_stream[2].dataset])
    last, one = embed(kept.models[1], x), plugin.bridges(embed(kept.models[2], x), 1)
    assert plugin.r2[1] == pytest.approx(float(r_squared(one, last)), abs=1e-5)
    first = plugin.bridges.maps[0]
    two = 1 - float(r_squared(first(one), first(last)))
    assert plugin.chain_errors[1] == pytest.approx([1 - plugin.r2[1], two], abs=1e-5)
    assert found["LatentAlignment_R2"] == plugin.r2
    assert found["LatentAlignment_ChainError_1"] == [errors[0] for errors in plugin.chain_errors]
    assert found["LatentAlignment_ChainError_2"] == [plugin.chain_errors[1][1]]


@pytest.mark.parametrize("kind", ["tensor", "dataset"])
def test_bridges_are_fitted_on_other_inputs_where_they_are_given(kind):
    x = torch.randn(70, 8)
    if kind == "dataset":
        data = class_stream(1, n_per_class=10, seed=4).train_stream[0].dataset
        x = torch.stack([x for x, *_ in data])
    plugin, kept = LatentAlignmentPlugin(data=x if kind == "tensor" else data), Kept()
    run([plugin, kept], n=2)
    weight, _ = ridge(embed(kept.models[1], x), embed(kept.models[0], x))
    torch.testing.assert_close(plugin.bridges.maps[0].weight, weight, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("model", MODELS)
def test_a_batch_of_several_tasks_goes_to_each_ones_space(model):
    plugin, kept = LatentAlignmentPlugin(), Kept()
    strategy = run([plugin, kept], model=model)
    stream = benchmark()
    strategy.eval(stream.test_stream)
    alone = {task: out for task, (_, out) in kept.outputs.items()}
    xs = torch.stack([kept.outputs[task][0][k] for k in range(4) for task in (2, 0, 1)])
    tasks = torch.tensor([2, 0, 1] * 4)
    strategy.mbatch = [xs, tasks, tasks]
    strategy.is_training = False
    strategy.model.eval()
    strategy.experience = stream.test_stream[0]
    for old in (None, FrozenCopy(strategy.model)):  # the latter as during a later task
        plugin._old = old
        with torch.no_grad():
            found = plugin._forward(strategy, type(strategy).forward.__get__(strategy))
        for i, (task, row) in enumerate(zip(tasks.tolist(), found, strict=True)):
            torch.testing.assert_close(row, alone[task][i // 3], atol=1e-4, rtol=1e-4)


def test_during_training_earlier_tasks_are_asked_of_the_last_embedder():
    stream, plugin, kept = benchmark(), LatentAlignmentPlugin(), Kept()
    strategy = run([plugin, kept], n=2)
    with torch.random.fork_rng():  # Avalanche's evaluation loader draws a seed it never uses
        strategy.eval(stream.test_stream[:2])
    before = {task: out.clone() for task, (_, out) in kept.outputs.items()}

    class Evaluate(SupervisedPlugin):
        def after_training_epoch(self, strategy, **kwargs):
            kept.outputs.clear()
            with torch.random.fork_rng():
                strategy.eval(stream.test_stream)

    strategy.plugins.insert(0, Evaluate())
    strategy.train(stream.train_stream[2], eval_streams=[])
    for task in (0, 1):
        torch.testing.assert_close(
            kept.outputs[task][1][:, : before[task].shape[1]], before[task], atol=1e-5, rtol=1e-5
        )
    assert len(kept.outputs) == 3
    assert torch.equal(weights(strategy), weights(run([])))


def test_tasks_that_have_not_come_are_left_to_the_newest_embedder():
    plugin, kept = LatentAlignmentPlugin(), Kept()
    strategy = run([plugin, kept], n=2)
    strategy.eval(benchmark().test_stream[2])
    x, found = kept.outputs[2]
    torch.testing.assert_close(found, strategy.model.eval()(x, torch.full((len(x),), 2)))


# what it is worth -------------------------------------------------------------------------------


def test_what_bridges_are_worth_on_real_digits():
    def accuracy(plugins):
        stream = split_digits(scenario="task")
        torch.manual_seed(0)
        model = as_multitask(MLP(64, (64, 32), 2), "classifier")
        evaluator = EvaluationPlugin(accuracy_metrics(experience=True))
        strategy = naive(model, plugins, batch=16, epochs=4, evaluator=evaluator)
        strategy.optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        for experience in stream.train_stream:
            strategy.train(experience, eval_streams=[])
        found = strategy.eval(stream.test_stream)
        values = [v for k, v in found.items() if k.startswith("Top1_Acc_Exp")]
        assert len(values) == 5
        return sum(values) / 5

    bridged, plain = accuracy([LatentAlignmentPlugin()]), accuracy([])
    assert bridged > plain + 0.02
    assert bridged > 0.95


# Avalanche --------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize(
    "other", [lambda: EWCPlugin(0.1), lambda: LwFPlugin(0.5, 2), lambda: DRLPlugin(1e-2)]
)
def test_composes_with_other_plugins_in_either_order(other, place):
    alone = weights(run([other()]))
    plugins = [other()]
    plugins.insert(place, LatentAlignmentPlugin())
    assert torch.equal(weights(run(plugins)), alone)


def outputs(strategy):
    kept = Kept()
    strategy.plugins.insert(0, kept)
    strategy.eval(benchmark().test_stream)
    strategy.plugins.remove(kept)
    return torch.cat([out.flatten() for _, out in kept.outputs.values()])


@pytest.mark.parametrize("options", [{}, {"bridge": "mlp", "compose": "direct"}])
def test_a_strategy_pickled_in_mid_stream_goes_on_to_the_same_predictions(options):
    stream = benchmark().train_stream
    whole, half = (run([LatentAlignmentPlugin(**options)], n=n) for n in (3, 2))
    stored, state = pickle.dumps(half), torch.get_rng_state()
    seed = torch.initial_seed()
    torch.manual_seed(99)
    resumed = pickle.loads(stored)
    torch.manual_seed(seed)
    torch.set_rng_state(state)
    resumed.train(stream[2], eval_streams=[])
    assert torch.equal(outputs(resumed), outputs(whole))


class StoppedError(Exception):
    pass


class Stop(SupervisedPlugin):
    at = -1

    def after_training_iteration(self, strategy, **kwargs):
        if strategy.clock.train_iterations == Stop.at:
            raise StoppedError


def test_an_interrupted_run_ends_as_if_it_had_not_been(tmp_path, monkeypatch):
    """The metrics of the run are those of predictions over bridges."""
    monkeypatch.setitem(checkpoint_cases.CASES, "lsa", lambda optimizer: [LatentAlignmentPlugin()])
    monkeypatch.setattr(checkpoint_cases, "Net", MODELS["decorated"])
    monkeypatch.setattr(checkpoint_cases, "class_stream", benchmark)
    Stop.at = -1
    whole = checkpoint_cases.train("lsa", tmp_path / "whole", None, [Stop()])
    for Stop.at in (13, 23):  # within the second and the third experience
        with pytest.raises(StoppedError):
            checkpoint_cases.train("lsa", tmp_path / "parts", 1, [Stop()])
    Stop.at = -1
    assert checkpoint_cases.train("lsa", tmp_path / "parts", 1, [Stop()]) == whole


def test_nothing_is_left_on_strategy_and_model():
    strategy = run([LatentAlignmentPlugin()])
    strategy.eval(benchmark().test_stream)
    assert "forward" not in vars(strategy)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in strategy.model.modules())


@pytest.mark.parametrize("place", [0, 1])
def test_evaluates_in_mixed_precision_as_well(place):
    plugins = [PrecisionPlugin("bf16")]
    plugins.insert(place, LatentAlignmentPlugin())
    strategy = run(plugins, model="their_own")
    full = outputs(run([LatentAlignmentPlugin()], model="their_own"))
    assert (outputs(strategy)[full > -900] - full[full > -900]).abs().median() < 0.2


# what is wrong ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"bridge": "cubic"}, "'mlp'"),
        ({"compose": "tree"}, "'direct'"),
        ({"lam": -1.0}, "lam >= 0"),
    ],
)
def test_bad_arguments_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        LatentAlignmentPlugin(**options)
    with pytest.raises(TypeError, match="tensor of inputs"):
        LatentAlignmentPlugin(data=[1, 2])


def test_experiences_and_heads_have_to_match():
    stream = benchmark().train_stream
    with pytest.raises(ValueError, match=r"\[0\], after \[0, 1\]"):
        run([LatentAlignmentPlugin()], stream=[stream[0], stream[1], stream[0]])
    plain = class_stream().train_stream
    with pytest.raises(ValueError, match=r"\[0\], after \[0\]"):
        run([LatentAlignmentPlugin()], stream=list(plain))
    with pytest.raises(ValueError, match="MLP has 0"):
        naive(MLP(8, (16,), 6), [LatentAlignmentPlugin()]).train(stream[0], eval_streams=[])


def test_an_empty_experience_is_refused():
    experience = benchmark().train_stream[0]
    experience._dataset = experience.dataset.subset([])
    with pytest.raises(ValueError, match="empty"):
        run([LatentAlignmentPlugin()], stream=[experience])
