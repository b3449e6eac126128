"""L1 and DeCov on activations; OrthReg, L1 and L2 on parameters, inside the training loop."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from avalanche.models import IncrementalClassifier, MTSimpleMLP, SimpleMLP
from avalanche.training.plugins import EvaluationPlugin
from torch import nn
from torch.nn import functional as F

from avalanche_ext import DRLPlugin
from avalanche_ext.functional.sparsity import decov, l1_activation, orthogonality
from avalanche_ext.models.competition import CompetitiveMLP
from avalanche_ext.models.mlp import MLP
from avalanche_ext.training.plugins.activation_penalty import DeCovPlugin, L1RepPlugin
from avalanche_ext.training.plugins.parameter_penalty import (
    L1ParamPlugin,
    L2DecayPlugin,
    OrthRegPlugin,
)
from tests.conftest import class_stream, naive
from tests.training.plugins.test_slni import Probe, count_hooks, equal, first_term, hidden, weights

ALL = [
    lambda lam: L1RepPlugin(lam),
    lambda lam: DeCovPlugin(lam),
    lambda lam: OrthRegPlugin(lam),
    lambda lam: L1ParamPlugin(lam),
    lambda lam: L2DecayPlugin(lam),
]
IDS = ["l1_rep", "decov", "orthreg", "l1_param", "l2_decay"]


def mlp(*widths):
    torch.manual_seed(0)
    return MLP(8, widths or (16, 12), 6)


def dropout_net():
    torch.manual_seed(0)
    return SimpleMLP(num_classes=6, input_size=8, hidden_size=16, drop_rate=0.5)


def run(model, plugins, *, n=3, seed=1, lr=0.1, optimizer=None, stream=None, **kwargs):
    torch.manual_seed(seed)
    strategy = naive(model, plugins, lr=lr, **kwargs)
    if optimizer is not None:
        strategy.optimizer = optimizer
    for experience in (stream or class_stream().train_stream)[:n]:
        strategy.train(experience)
    return strategy


# values -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plugin", "f"), [(L1RepPlugin, l1_activation), (DeCovPlugin, decov)], ids=["l1", "decov"]
)
def test_the_loss_is_cross_entropy_plus_lam_times_the_sum_over_hidden_layers(plugin, f):
    step = first_term(mlp(), plugin(0.1))
    want = sum(float(f(h)) for h in hidden(step["model"], step["x"]))
    assert step["term"] == pytest.approx(want, rel=1e-4)
    step = first_term(mlp(), plugin(0.1, layers="features.3"))
    want = float(f(hidden(step["model"], step["x"])[1]))
    assert step["term"] == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("conv", ["pool", "location"])
def test_feature_maps(conv):
    model = nn.Sequential(
        nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(20, 6)
    )
    stream = class_stream(width=16).train_stream
    step = first_term(model, L1RepPlugin(0.1, layers="2", conv=conv), stream=stream)
    maps = step["model"][:3](step["x"])
    assert step["term"] == pytest.approx(float(maps.sum() / 8 / 4), rel=1e-4)
    with pytest.raises(ValueError, match="'2' gives shape"):
        first_term(model, DeCovPlugin(0.1, layers="2"), stream=stream)


@pytest.mark.parametrize("activation", ["maxout", "lwta"])
def test_negative_activations_are_as_good_as_others(activation):
    torch.manual_seed(0)
    model = CompetitiveMLP(8, (12, 8), 6, activation=activation)
    step = first_term(model, L1RepPlugin(0.1, layers="features.1"))
    h = step["model"].features[:2](step["x"])
    assert (h < 0).any()
    assert step["term"] == pytest.approx(float(l1_activation(h)), rel=1e-4)


@pytest.mark.parametrize(
    "settings",
    [{}, {"form": "global"}, {"sharpness": 3.0}, {"gradient": "authors"}, {"layers": "features.0"}],
)
def test_orthreg_adds_its_term_and_gradient(settings):
    plugin, probe, lr = OrthRegPlugin(0.1, **settings), Probe(), 0.1
    strategy = run(mlp(), [plugin, probe], n=1, batch=40)
    step = probe.steps[0]
    model = step["model"]
    linear = [model.features[0], model.features[2], model.classifier]
    how = {k: v for k, v in settings.items() if k != "layers"}
    terms = [orthogonality(m.weight, **how) for m in linear[: 1 if "layers" in settings else 3]]
    want = torch.stack(terms).sum()
    assert step["term"] / 0.1 == pytest.approx(float(want), rel=1e-4)
    (F.cross_entropy(model(step["x"]), step["y"]) + 0.1 * want).backward()
    for before, after in zip(model.parameters(), strategy.model.parameters(), strict=True):
        torch.testing.assert_close(after, before - lr * before.grad, rtol=1e-4, atol=1e-6)
    assert [float(v) for v in plugin.last.values()] == pytest.approx([float(t) for t in terms])


def test_orthreg_makes_rows_orthogonal_and_leaves_growing_heads_alone():
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), IncrementalClassifier(6))
    nn.init.constant_(model[0].weight, 1.0)
    model[0].weight.data += 0.1 * torch.randn(6, 8)
    before = orthogonality(model[0].weight).item()
    plugin = OrthRegPlugin(0.1)
    strategy = run(model, [plugin], epochs=5)
    assert list(plugin.last) == ["0"]
    assert orthogonality(strategy.model[0].weight).item() < 0.1 * before
    plugin = OrthRegPlugin(0.1)
    run(MTSimpleMLP(input_size=8, hidden_size=16), [plugin],
        stream=class_stream(task_labels=True).train_stream)  # fmt: skip
    assert list(plugin.last) == ["features.0"]


@pytest.mark.parametrize("include_bias", [True, False])
@pytest.mark.parametrize("kind", ["l1", "l2"])
def test_parameter_penalties_add_their_gradient_to_gradients(kind, include_bias):
    lam, probe = 0.05, Probe()
    plugin = (L1ParamPlugin if kind == "l1" else L2DecayPlugin)(lam, include_bias=include_bias)
    strategy = run(mlp(), [plugin, probe], n=1, batch=40)
    model = probe.steps[0]["model"]
    F.cross_entropy(model(probe.steps[0]["x"]), probe.steps[0]["y"]).backward()
    for p, after in zip(model.parameters(), strategy.model.parameters(), strict=True):
        penalty = lam * (p.sign() if kind == "l1" else p) * (include_bias or p.ndim > 1)
        torch.testing.assert_close(after, p - 0.1 * (p.grad + penalty), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_l2_is_weight_decay_bit_for_bit(momentum):
    def trained(plugins, decay):
        model = dropout_net()
        sgd = torch.optim.SGD(model.parameters(), 0.1, momentum, weight_decay=decay)
        return weights(run(model, plugins, optimizer=sgd).model)

    assert equal(trained([L2DecayPlugin(0.01)], 0.0), trained([], 0.01))
    assert not equal(trained([], 0.0), trained([], 0.01))


@pytest.mark.parametrize("make", ALL[2:], ids=IDS[2:])
def test_heads_that_a_batch_does_not_use_keep_still(make):
    stream = class_stream(task_labels=True).train_stream
    model = MTSimpleMLP(input_size=8, hidden_size=16)
    strategy = run(model, [make(0.1)], n=1, stream=stream)
    head = {k: v.clone() for k, v in model.state_dict().items() if ".classifiers.0" in k}
    body = model.features[0].weight.detach().clone()
    for experience in stream[1:]:
        strategy.train(experience)
    old = {k: v for k, v in model.state_dict().items() if k in head}
    names = [k for k in head if "weight" in k or "bias" in k]
    assert names
    assert all(torch.equal(old[k], head[k]) for k in names)
    assert not torch.equal(body, model.features[0].weight)


# what every one keeps to ------------------------------------------------------------------------


@pytest.mark.parametrize("make", ALL, ids=IDS)
def test_weight_zero_is_plain_training_bit_for_bit(make):
    plain = weights(run(dropout_net(), []).model)
    evaluator = EvaluationPlugin()
    assert equal(weights(run(dropout_net(), [make(0)], evaluator=evaluator).model), plain)
    assert evaluator.get_all_metrics() == {}
    assert not equal(weights(run(dropout_net(), [make(0.01)]).model), plain)


@pytest.mark.parametrize("make", ALL, ids=IDS)
def test_the_order_of_the_plugins_does_not_matter(make):
    one = run(dropout_net(), [make(0.01), DRLPlugin(1e-3)])
    two = run(dropout_net(), [DRLPlugin(1e-3), make(0.01)])
    for a, b in zip(weights(one.model), weights(two.model), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("make", ALL, ids=IDS)
def test_a_copy_made_between_experiences_continues_with_the_same_numbers(make, clone):
    whole = run(dropout_net(), [make(0.01)])
    model, plugin = dropout_net(), make(0.01)
    run(model, [plugin], n=1)
    model, plugin = clone((model, plugin))
    strategy = naive(model, [plugin])
    for experience in class_stream().train_stream[1:]:
        strategy.train(experience)
    assert equal(weights(model), weights(whole.model))
    assert count_hooks(model) == 0


@pytest.mark.parametrize("make", ALL, ids=IDS)
@pytest.mark.parametrize("lam", [-1.0, float("nan"), float("inf")])
def test_bad_weights_are_refused(make, lam):
    with pytest.raises(ValueError, match="a finite lam >= 0"):
        make(lam)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"form": "both"}, "form to be one of"),
        ({"gradient": "both"}, "gradient to be one of"),
        ({"sharpness": 0}, "sharpness > 0"),
        ({"form": "global", "gradient": "authors"}, "with form='local'"),
    ],
)
def test_bad_settings_of_orthreg(settings, message):
    with pytest.raises(ValueError, match=f"OrthRegPlugin expects.*{message}"):
        OrthRegPlugin(0.1, **settings)


def test_orthreg_refuses_layers_without_weights():
    with pytest.raises(ValueError, match=r"\['features.1'\] are none.*'features.0'"):
        run(mlp(), [OrthRegPlugin(0.1, layers=["features.0", "features.1"])])
    with pytest.raises(ValueError, match="found no linear or convolution layer"):
        run(nn.Sequential(nn.Flatten(), IncrementalClassifier(8)), [OrthRegPlugin(0.1)])


@pytest.mark.parametrize(
    ("make", "name"),
    [(ALL[0], "L1Rep_R"), (ALL[1], "DeCov_R"), (ALL[2], "OrthReg_R")],
    ids=IDS[:3],
)
def test_epoch_means_are_published(make, name):
    probe, evaluator = Probe(), EvaluationPlugin()
    run(mlp(), [make(0.1), probe], n=1, epochs=2, evaluator=evaluator, batch=16)
    terms = [step["term"] / 0.1 for step in probe.steps]
    ((key, (_, got)),) = evaluator.get_all_metrics().items()
    assert key.startswith(f"{name}/train_phase/train_stream")
    want = [sum(terms[:3]) / 3, sum(terms[3:]) / 3]
    assert got == pytest.approx(want, rel=1e-3, abs=1e-4)


def test_l1_that_silences_the_network_warns():
    with pytest.warns(UserWarning, match=r"'features.1' was active for 100 %.*L1RepPlugin\(lam=5"):
        run(mlp(16), [L1RepPlugin(5.0)], n=1, epochs=4)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="no unit of layer")
        run(mlp(16), [L1RepPlugin(1e-3)], n=1, epochs=2)
