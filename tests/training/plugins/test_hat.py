"""HAT inside Avalanche's training loop: what earlier tasks use does not move by a single bit."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.models import SimpleMLP
from avalanche.training.plugins import EvaluationPlugin, ReplayPlugin, SupervisedPlugin
from torch import nn
from torch.nn import functional as F

from avalanche_ext import BERPlugin, DRLPlugin
from avalanche_ext.benchmarks.digits import split_digits
from avalanche_ext.functional.channel_mask import hat_gradient_mask
from avalanche_ext.models.backbones import build_backbone
from avalanche_ext.models.hat_net import HATNet
from avalanche_ext.models.mlp import MLP
from avalanche_ext.training.plugins.hat import HATPlugin
from tests.conftest import class_stream, naive
from tests.experiments import checkpoint_cases

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1),
    "sgd_momentum_decay": lambda p: torch.optim.SGD(p, 0.05, 0.9, weight_decay=0.01, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, 0.01),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
}


def hat_net(backbone=None, **kwargs):
    torch.manual_seed(0)
    return HATNet(MLP(8, (16, 12), 0) if backbone is None else backbone, **kwargs)


def tasks(n=3, **kwargs):
    return class_stream(n, task_labels=True, **kwargs)


def start(model=None, plugins=None, *, optimizer="sgd", seed=1, **kwargs):
    model = hat_net() if model is None else model
    torch.manual_seed(seed)
    strategy = naive(model, [HATPlugin()] if plugins is None else plugins, **kwargs)
    strategy.optimizer = OPTIMIZERS[optimizer](model.parameters())
    return strategy


def train(strategy, n=3, stream=None):
    for experience in (tasks().train_stream if stream is None else stream)[:n]:
        strategy.train(experience)
    return strategy


def weights(model):
    return [p.detach().clone() for p in model.state_dict().values()]


def equal(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@torch.no_grad()
def decide(model):
    """Bring the newest task's gates to their limits, so that its final masks are 0 and 1."""
    e = model.gates.embeddings[-1]
    e.copy_(torch.where(e >= 0, 6.0, -6.0))


class Watch(SupervisedPlugin):
    """Keep every step's model, batch, scale, loss term and gradients."""

    def __init__(self):
        super().__init__()
        self.steps = []

    def before_forward(self, strategy, **kwargs):
        self.steps.append({"model": copy.deepcopy(strategy.model)})

    def before_update(self, strategy, **kwargs):
        named = strategy.model.named_parameters()
        classified = F.cross_entropy(strategy.mb_output, strategy.mb_y)
        self.steps[-1] |= {
            "x": strategy.mb_x, "y": strategy.mb_y, "scale": strategy.model.gates.s.item(),
            "term": (strategy.loss - classified).item(),
            "grad": {name: p.grad.clone() for name, p in named if p.grad is not None},
        }  # fmt: skip


# one step ---------------------------------------------------------------------------------------


def test_the_scale_grows_from_its_inverse_to_its_end_in_every_epoch():
    watch = Watch()
    train(start(hat_net(s_max=50.0), [HATPlugin(), watch], epochs=2), n=2)
    wanted = [0.02 + (50 - 0.02) * b / 4 for b in range(5)]  # 40 samples, 8 in a batch
    assert [step["scale"] for step in watch.steps] == pytest.approx(4 * wanted)


def test_the_loss_gains_the_capacity_that_the_task_takes_of_what_is_free():
    watch = Watch()
    plugin = HATPlugin(0.5)
    train(start(hat_net(s_max=3.0), [plugin, watch]), n=2)
    first, second = watch.steps[2], watch.steps[7]
    m = torch.sigmoid(first["scale"] * first["model"].gates.embeddings[0])
    assert first["term"] == pytest.approx(0.5 * m.mean().item(), rel=1e-4)
    m = torch.sigmoid(second["scale"] * second["model"].gates.embeddings[1])
    free = 1 - torch.sigmoid(3.0 * second["model"].gates.embeddings[0])
    pairs = zip(m.tolist(), free.tolist(), strict=True)
    wanted = sum(a * b for a, b in pairs) / sum(free.tolist())
    assert second["term"] == pytest.approx(0.5 * wanted, rel=1e-4)


def test_the_first_steps_gradient_by_hand():
    watch = Watch()
    train(start(hat_net(s_max=3.0), [HATPlugin(0.5), watch]), n=1)
    step = watch.steps[1]
    model = step["model"].train()
    e = model.gates.embeddings[0]
    m = torch.sigmoid(step["scale"] * e)
    first, second = model.gates.network.features[0], model.gates.network.features[2]
    h = m[16:] * second(m[:16] * first(step["x"]).relu()).relu()
    (F.cross_entropy(model.heads[0](h), step["y"]) + 0.5 * m.mean()).backward()
    s = step["scale"]
    ratio = 3 / s * (torch.cosh(s * e) + 1) / (torch.cosh(e) + 1)
    grads = {
        "gates.embeddings.0": (e.grad * ratio).detach(),
        "gates.network.features.0.weight": first.weight.grad,
        "heads.0.weight": model.heads[0].weight.grad,
    }
    for name, wanted in grads.items():
        torch.testing.assert_close(step["grad"][name], wanted, rtol=1e-4, atol=1e-6, msg=name)


def test_a_step_of_plain_sgd_is_that_of_the_masked_gradient():
    watch = Watch()
    strategy = start(hat_net(s_max=2.0), [HATPlugin(), watch])
    stream = tasks().train_stream
    train(strategy, stream=stream, n=1)
    strategy.train(stream[1])
    before, after = watch.steps[6]["model"], watch.steps[7]["model"]
    m1, m2 = torch.sigmoid(2 * before.gates.embeddings[0]).detach().split([16, 12])
    factors = {
        "gates.network.features.0.weight": 1 - m1[:, None],
        "gates.network.features.0.bias": 1 - m1,
        "gates.network.features.2.weight": 1 - torch.minimum(m2[:, None], m1[None]),
        "gates.network.features.2.bias": 1 - m2,
        "heads.1.weight": torch.tensor(1.0),
    }
    assert torch.equal(
        factors["gates.network.features.2.weight"],
        hat_gradient_mask(m1, m2, (12, 16)),
    )
    for name, factor in factors.items():
        old, new = before.get_parameter(name), after.get_parameter(name)
        wanted = old - 0.1 * factor * watch.steps[6]["grad"][name]
        torch.testing.assert_close(new, wanted, rtol=1e-5, atol=1e-7, msg=name)
        assert not torch.equal(new, old)


def test_gradients_are_clipped_and_embeddings_stay_within_six():
    watch = Watch()
    strategy = train(start(hat_net(), [HATPlugin(clip=0.01), watch]), n=1)
    norms = [torch.stack([g.norm() for g in s["grad"].values()]).norm().item() for s in watch.steps]
    assert max(norms) == pytest.approx(0.01, rel=1e-3)
    with torch.no_grad():
        strategy.model.gates.embeddings[0].fill_(9.0)
    strategy.train(tasks().train_stream[0])
    assert strategy.model.gates.embeddings[0].max() <= 6


def test_the_exact_compensation_has_the_factor_of_the_scale_as_well():
    watch = Watch()
    train(start(hat_net(s_max=30.0, compensation="exact"), [HATPlugin(0.0), watch]), n=1)
    step = watch.steps[4]
    model = step["model"].train()
    z = model(step["x"], 0)
    F.cross_entropy(z, step["y"]).backward()
    found, plain = step["grad"]["gates.embeddings.0"], model.gates.embeddings[0].grad
    torch.testing.assert_close(found, 30 * plain, rtol=1e-4, atol=1e-6)
    assert plain.abs().sum() > 0


# what is kept -----------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_weights_between_channels_in_use_keep_every_bit_under_any_optimizer(optimizer):
    strategy = start(optimizer=optimizer)
    stream = tasks().train_stream
    train(strategy, stream=stream, n=1)
    decide(strategy.model)
    m1, m2 = (m > 0.5 for m in strategy.model.final_masks(0))
    assert 0 < m1.sum() < 16
    assert 0 < m2.sum() < 12
    held = {
        "features.0.weight": m1[:, None].expand(16, 8),
        "features.0.bias": m1,
        "features.2.weight": m2[:, None] & m1[None],
        "features.2.bias": m2,
    }
    network = strategy.model.gates.network
    old = {name: network.get_parameter(name).detach().clone() for name in held}
    frozen = [strategy.model.gates.embeddings[0], *strategy.model.heads[0].parameters()]
    frozen_old = [p.detach().clone() for p in frozen]
    train(strategy, stream=stream[1:], n=2)
    for name, mask in held.items():
        new = network.get_parameter(name)
        assert torch.equal(new[mask], old[name][mask]), name
        assert (new[~mask] != old[name][~mask]).any(), name
    assert equal(frozen, frozen_old)


BACKBONES = {
    "mlp": lambda: MLP(64, (20, 20), 0),
    "dropout_and_a_slope": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(64, 20), nn.PReLU(), nn.Dropout(0.5), nn.Linear(20, 10)
    ),
    "convolutions_with_batch_norm": lambda: build_backbone("small_convnet", 0, (1, 8, 8)),
    "flattened": lambda: nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(54, 10)
    ),
}


@pytest.mark.parametrize("optimizer", ["sgd", "sgd_momentum_decay", "adam"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_outputs_of_earlier_tasks_stay_bit_for_bit(backbone, optimizer):
    torch.manual_seed(0)
    network = BACKBONES[backbone]()
    if isinstance(network, nn.Sequential):
        network.num_features = 10
    strategy = start(hat_net(network), [HATPlugin(0.1)], optimizer=optimizer)
    benchmark = split_digits(5, scenario="task", train_per_experience=40)
    x = torch.randn(30, 1, 8, 8)
    expected = {}
    for k, experience in enumerate(benchmark.train_stream[:3]):
        strategy.train(experience)
        decide(strategy.model)
        strategy.model.eval()
        for label, old in expected.items():
            assert torch.equal(strategy.model(x, label), old), (k, label)
        expected[k] = strategy.model(x, k)
    assert len(expected) == 3
    assert all(z.std(0)[:2].min() > 0 for z in expected.values())


def test_a_task_is_trained_again_without_its_own_masks_in_the_way():
    stream = tasks().train_stream
    strategy = train(start(), stream=stream, n=2)
    decide(strategy.model)
    (m2,) = (m > 0.5 for m in strategy.model.final_masks(1)[1:])
    old = strategy.model.gates.network.features[2].bias.detach().clone()
    free = m2 & (strategy.model.final_masks(0)[1] < 0.5)
    assert free.any()
    strategy.train(stream[1])
    assert (strategy.model.gates.network.features[2].bias[free] != old[free]).any()
    assert strategy.model.tasks == [0, 1]


def test_the_model_held_by_a_plain_strategy_does_forget():
    # What the plugin is for: without it the same network loses its first task's outputs.
    strategy = start(plugins=[])
    stream = tasks().train_stream
    train(strategy, stream=stream, n=1)
    decide(strategy.model)
    x = torch.randn(30, 8)
    expected = strategy.model.eval()(x, 0)
    strategy.train(stream[1])
    assert not torch.equal(strategy.model.eval()(x, 0), expected)


def test_digits_are_learnt_and_none_forgotten():
    benchmark = split_digits(5, scenario="task")
    evaluator = EvaluationPlugin(accuracy_metrics(experience=True), loggers=[])
    model = hat_net(build_backbone("mlp", 0, (1, 8, 8), hidden=(64, 64)))
    strategy = start(model, batch=10, epochs=4, evaluator=evaluator)
    rows = []
    for experience in benchmark.train_stream:
        strategy.train(experience)
        found = strategy.eval(benchmark.test_stream)
        rows.append([v for name, v in sorted(found.items()) if "Top1_Acc_Exp" in name])
    rows = torch.tensor(rows)
    learnt = rows.diagonal()
    assert learnt.mean() > 0.95
    assert (learnt - rows[-1]).max() <= 0.01
    # Tasks that were not trained on: every sample is said to be of class 0, about half are.
    assert (rows.triu(1)[rows.triu(1) > 0] - 0.5).abs().max() < 0.03
    used = strategy.plugins[0].used
    assert used == sorted(used)
    assert 0.05 < used[0] < used[-1] < 0.9


# reports ----------------------------------------------------------------------------------------


def test_the_capacity_in_use_is_published_after_each_experience():
    evaluator = EvaluationPlugin()
    plugin = HATPlugin(1.0)
    strategy = train(start(hat_net(s_max=5.0), [plugin], evaluator=evaluator), n=2)
    gates = strategy.model.gates
    m = [torch.sigmoid(5.0 * e.detach()) for e in gates.embeddings]
    assert plugin.used == pytest.approx([m[0].mean().item(), torch.maximum(*m).mean().item()])
    first, second = (gates.embeddings[1] >= 0).float().split([16, 12])
    kept = {
        "features.0": first.mean().item(),
        "features.2": first.mean().item() * second.mean().item(),
    }
    assert plugin.kept[1] == pytest.approx(kept)
    for name, values in {
        "HAT_Used": plugin.used,
        "HAT_Kept_features.0": [k["features.0"] for k in plugin.kept],
        "HAT_Kept_features.2": [k["features.2"] for k in plugin.kept],
    }.items():
        found = [v for key, (_, v) in evaluator.get_all_metrics().items() if f"{name}/" in key]
        assert sorted(v for vs in found for v in vs) == sorted(values)


def test_a_larger_weight_leaves_more_capacity_free():
    used = []
    for lam in (0.0, 0.75, 3.0):
        plugin = HATPlugin(lam)
        strategy = train(start(plugins=[plugin], epochs=4), n=1)
        used.append(plugin.used[0])
        assert all(p.isfinite().all() for p in strategy.model.parameters())
    assert used[0] > used[1] > used[2]


def test_a_task_that_closes_a_whole_layer_is_told_of():
    with pytest.warns(UserWarning, match=r"task 0 has closed all channels of features.0, .*2: "):
        train(start(plugins=[HATPlugin(20.0)], epochs=2), n=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="task 0 has closed")
        train(start(hat_net(hard=True), [HATPlugin(20.0)], epochs=2), n=1)
        train(start(), n=1)


# what every plugin keeps to ---------------------------------------------------------------------


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("optimizer", ["sgd_momentum_decay", "adam"])
def test_a_copy_made_between_experiences_continues_with_the_same_numbers(clone, optimizer):
    stream = tasks().train_stream
    whole = train(start(optimizer=optimizer), stream=stream)
    half = train(start(optimizer=optimizer), stream=stream, n=1)
    state = torch.get_rng_state()
    half = clone(half)
    torch.set_rng_state(state)
    train(half, stream=stream[1:])
    assert equal(weights(half.model), weights(whole.model))
    assert half.plugins[0].used == whole.plugins[0].used


class Pickled(SupervisedPlugin):
    def after_training_iteration(self, strategy, **kwargs):
        plugin = strategy.plugins[0]
        twin = pickle.loads(pickle.dumps(plugin))
        vars(plugin).update(vars(twin))


def test_pickling_within_an_experience_changes_nothing():
    whole = train(start())
    pickled = train(start(plugins=[HATPlugin(), Pickled()]))
    assert equal(weights(whole.model), weights(pickled.model))
    assert whole.plugins[0]._held == {}  # no copy of the weights outlives its step


class Interrupted(Exception):  # noqa: N818 - a way out, not an error
    """Stands for the end of the process."""


class Stop(SupervisedPlugin):
    """End at a training step; the number is not part of the state."""

    at = -1

    def after_training_iteration(self, strategy, **kwargs):
        if strategy.clock.train_iterations == Stop.at:
            raise Interrupted


@pytest.mark.filterwarnings("ignore")
def test_an_interrupted_run_ends_as_if_it_had_not_been(tmp_path, monkeypatch):
    monkeypatch.setitem(checkpoint_cases.CASES, "hat", lambda optimizer: [HATPlugin()])
    monkeypatch.setattr(checkpoint_cases, "Net", lambda: HATNet(MLP(8, (16, 12), 0)))
    monkeypatch.setattr(checkpoint_cases, "class_stream", tasks)
    Stop.at = -1
    whole = checkpoint_cases.train("hat", tmp_path / "whole", None, [Stop()])
    for Stop.at in (4, 13, 23):  # within each of the three experiences
        with pytest.raises(Interrupted):
            checkpoint_cases.train("hat", tmp_path / "parts", 1, [Stop()])
    Stop.at = -1
    assert checkpoint_cases.train("hat", tmp_path / "parts", 1, [Stop()]) == whole


class Evaluate(SupervisedPlugin):
    def __init__(self, stream):
        super().__init__()
        self.stream = stream

    def after_training_iteration(self, strategy, **kwargs):
        with torch.random.fork_rng():  # Avalanche's evaluation loader draws a seed it never uses
            strategy.eval(self.stream)


def test_evaluation_in_mid_training_of_tasks_to_come_changes_nothing():
    benchmark = tasks()
    watched = [HATPlugin(), Evaluate(benchmark.test_stream)]
    observed = train(start(plugins=watched), stream=benchmark.train_stream, n=2)
    assert observed.model.max_class_label == 6
    plain = train(start(), stream=benchmark.train_stream, n=2)
    assert equal(weights(observed.model), weights(plain.model))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "make",
    [lambda: ReplayPlugin(20), lambda: BERPlugin(20), lambda: DRLPlugin(0.01)],
    ids=["replay", "ber", "drl"],
)
def test_it_composes_with_other_plugins_in_either_order(make):
    one = train(start(plugins=[HATPlugin(), make()]))
    two = train(start(plugins=[make(), HATPlugin()]))
    for a, b in zip(weights(one.model), weights(two.model), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)
    assert not equal(weights(one.model), weights(train(start()).model))


@pytest.mark.parametrize("values", [{"lam": -1.0}, {"lam": float("nan")}, {"clip": 0.0},
                                    {"clip": -1.0}])  # fmt: skip
def test_bad_arguments(values):
    with pytest.raises(ValueError, match=f"HATPlugin expects.*{next(iter(values))}"):
        HATPlugin(**values)


def test_a_network_without_masks_is_refused():
    with pytest.raises(TypeError, match=r"a HATNet; got a SimpleMLP. Wrap .*build_backbone"):
        train(start(SimpleMLP(6, 8, 16)), n=1)


def test_a_stream_without_task_labels_is_refused():
    strategy = start()
    stream = class_stream(3).train_stream
    strategy.train(stream[0])
    with pytest.raises(ValueError, match=r"experience 1 has the task labels \[0\]"):
        strategy.train(stream[1])
